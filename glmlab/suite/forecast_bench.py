"""How fast the replay is: nanoseconds an event, and how the time grows with the number of decode steps."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glmlab.allocator.replay import StepReplayer
from glmlab.core.units import gib
from glmlab.tracing.trace import AllocationTrace, Turn

STEPS = (8_192, 32_768, 131_072)


class ReplaySpeed(NamedTuple):
    """One replay of a single turn from a short prompt; CPU seconds of one core, compilation not counted."""

    steps: int
    events: int
    seconds: float
    reserved_gib: float

    @property
    def nanoseconds_per_event(self) -> float:
        """CPU time of one allocation or free."""
        return self.seconds / self.events * 1e9


def benchmark_replay(trace: AllocationTrace, *, steps: Sequence[int] = STEPS, prompt: int = 8) -> list[ReplaySpeed]:
    """Replay one turn of each number of decode steps; compiles first, so that compilation is not measured.

    Example:
        >>> from glmlab.tracing.trace import load_recorded
        >>> speed = benchmark_replay(load_recorded("chatglm3-6b-original-int4"), steps=[50])[0]
        >>> speed.steps, speed.events > 50 * 2900
        (50, True)
    """
    program = trace.program
    lengths = np.diff(program.section_start)
    StepReplayer(program).run(trace.schedule([Turn(prompt, 4)]))
    speeds = []
    for n_steps in steps:
        schedule = trace.schedule([Turn(prompt, n_steps)])
        begin = time.process_time()
        replay = StepReplayer(program).run(schedule)
        seconds = time.process_time() - begin
        events = int(lengths[schedule[:, 1]].sum())
        speeds.append(ReplaySpeed(n_steps, events, seconds, gib(int(replay.reserved.max()))))
    return speeds


def speed_table(speeds: Sequence[ReplaySpeed]) -> str:
    """Return the benchmark as text, one row a number of steps.

    Example:
        >>> print(speed_table([ReplaySpeed(8192, 20_000_000, 0.25, 12.0), ReplaySpeed(32768, 80_000_000, 1.0, 14.0)]))
          steps       events  seconds  ns/event  growth
           8192     20000000     0.25      12.5    1.00
          32768     80000000     1.00      12.5    4.00
    """
    rows = ["  steps       events  seconds  ns/event  growth"]
    rows += [
        f"{speed.steps:7} {speed.events:12} {speed.seconds:8.2f} {speed.nanoseconds_per_event:9.1f} "
        f"{speed.seconds / speeds[0].seconds:7.2f}"
        for speed in speeds
    ]
    return "\n".join(rows)
