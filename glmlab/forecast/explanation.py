"""Why a forecast rises where it rises, and why it stays level where it does.

The allocator asks the driver for a segment when no idle block serves a request: :class:`Rise` names that request. Where
nothing rises, growing tensors find idle blocks: :class:`Plateau` names the tensors, their pool, and the blocks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from glmlab.allocator.config import SMALL_REQUEST_BYTES
from glmlab.allocator.program import ALLOCATE
from glmlab.core.curve import Curve
from glmlab.core.units import MIB, format_bytes
from glmlab.forecast.forecast import ForecastError, Run, run_workload, workload_from_fields
from glmlab.tracing.trace import Request

PLATEAU_STEPS, PLATEAU_SHARE = 64, 0.1
"""A plateau of note is at least so many steps, and at least this share of all steps."""

LARGEST_IDLE = 4
"""Idle blocks that a plateau names."""


@dataclass(frozen=True)
class Rise:
    """One segment that the allocator took from the driver, and the request that made it."""

    step: int
    turn: int
    context_tokens: int
    mib: float
    pool: str  # "small" or "large"
    request: Request

    def __str__(self) -> str:
        where = (
            "loading" if self.step == 0 else f"step {self.step:,} (turn {self.turn}, {self.context_tokens:,} tokens)"
        )
        asked = format_bytes(self.request.requested_bytes)
        return f"{where}: +{self.mib:g} MiB, {self.pool} pool, for {asked} of {self.request}"


@dataclass(frozen=True)
class Growing:
    """Requests of a decode step that grow with the context, alike in operation and module."""

    request: Request  # of one of them, at the end of the plateau
    count: int
    bytes_per_token: int
    leaves_small_pool_at: int | None  # context length from which on it asks for more than 1 MiB; None = from the first


@dataclass(frozen=True)
class Plateau:
    """A stretch of steps in which nothing is asked of the driver, with its reason."""

    first_step: int
    last_step: int
    first_context: int
    last_context: int
    growing: tuple[Growing, ...]
    inactive_small_after_mib: float  # at its beginning
    inactive_large_after_mib: float
    largest_inactive_mib: tuple[float, ...]  # blocks of the large pool

    def __str__(self) -> str:
        text = (
            f"steps {self.first_step:,} to {self.last_step:,} ({self.first_context:,} to {self.last_context:,} "
            f"tokens): level. At its beginning {self.inactive_small_after_mib:.2f} MiB lie idle in the small pool and "
            f"{self.inactive_large_after_mib:.2f} MiB in the large one"
        )
        if self.largest_inactive_mib:
            text += " (largest blocks: " + ", ".join(f"{size:.2f}" for size in self.largest_inactive_mib) + " MiB)"
        if not self.growing:
            return text + ". No request grows with the context."
        for growing in self.growing:
            request = growing.request
            pool = "small" if request.requested_bytes <= SMALL_REQUEST_BYTES else "large"
            text += (
                f"; {growing.count} x {request.operation} in {request.module or 'the loop'} grow by "
                f"{growing.bytes_per_token:,} B a token and are served by idle blocks of the {pool} pool"
            )
            crossing = growing.leaves_small_pool_at
            if crossing is not None and crossing <= self.last_context:
                text += f" (above 1 MiB, and so in the large pool, from {crossing:,} tokens on)"
        return text + "."


@dataclass(frozen=True)
class Explanation:
    """Every rise and every plateau of note of a forecast, in order."""

    rises: tuple[Rise, ...]
    plateaus: tuple[Plateau, ...]

    def __str__(self) -> str:
        loading = [rise for rise in self.rises if rise.step == 0]
        loaded_mib = sum(rise.mib for rise in loading)
        lines = [f"loading: +{loaded_mib:,.0f} MiB in {len(loading)} segments"] if loading else []
        parts = [(rise.step, str(rise)) for rise in self.rises if rise.step > 0]
        parts += [(plateau.first_step, str(plateau)) for plateau in self.plateaus]
        return "\n".join(lines + [text for _, text in sorted(parts, key=lambda part: part[0])])


def explain(curve: Curve) -> Explanation:
    """List every rise of a forecast with the tensor that asked, and every plateau of note with its reason.

    Raises:
        ForecastError: the curve is no forecast.

    Example:
        >>> from glmlab.forecast.forecast import forecast
        >>> from glmlab.forecast.workload import Workload
        >>> explanation = explain(forecast(Workload.recorded("chatglm3-6b-original-int4", turns="8:418"), seeds=()))
        >>> rise = explanation.rises[-1]
        >>> rise.pool, rise.mib, rise.request.operation
        ('small', 2.0, 'aten.sort.default')
    """
    if curve.kind != "forecast" or "workload" not in curve.provenance:
        raise ForecastError(
            f"{curve.label or 'this curve'} is {curve.kind}, not forecast: only a forecast knows its tensors."
        )
    run = run_workload(workload_from_fields(curve.provenance["workload"]))
    rises = _rises(run)
    return Explanation(rises, _plateaus(run, rises))


def _rises(run: Run) -> tuple[Rise, ...]:
    rows = run.rows
    rises = []
    for row, event, n_bytes, pool in run.replay.growth.tolist():
        if row >= run.replay.rows:
            break  # of the row that did not fit any more
        turn, _, context, tokens = run.schedule[row].tolist()
        rises.append(
            Rise(
                step=int(np.searchsorted(rows, row)),
                turn=turn,
                context_tokens=context,
                mib=n_bytes / MIB,
                pool="large" if pool else "small",
                request=run.trace.request(event, context, tokens),
            )
        )
    return tuple(rises)


def _plateaus(run: Run, rises: Sequence[Rise]) -> tuple[Plateau, ...]:
    rows = run.rows
    n_steps = len(rows) - 1
    least = max(PLATEAU_STEPS, int(PLATEAU_SHARE * n_steps))
    edges = [*sorted({1, *(rise.step for rise in rises if rise.step > 0)}), n_steps + 1]
    plateaus = []
    for first, after in pairwise(edges):
        if after - first < least:
            continue
        last = after - 1
        segments = run.segments_after(int(rows[first]))
        idle = [(segment.pool, block.size) for segment in segments for block in segment.blocks if not block.live]
        large = sorted((size for pool, size in idle if pool == "large"), reverse=True)
        plateaus.append(
            Plateau(
                first_step=first,
                last_step=last,
                first_context=int(run.schedule[rows[first], 2]),
                last_context=int(run.schedule[rows[last], 2]),
                growing=_growing(run, _typical_row(run, rows[first:after])),
                inactive_small_after_mib=sum(size for pool, size in idle if pool == "small") / MIB,
                inactive_large_after_mib=sum(large) / MIB,
                largest_inactive_mib=tuple(size / MIB for size in large[:LARGEST_IDLE]),
            )
        )
    return tuple(plateaus)


def _typical_row(run: Run, rows: npt.NDArray[np.int64]) -> int:
    """The last of those rows that run the section which most of them run: a decode step, not a prefill between."""
    sections = run.schedule[rows, 1]
    return int(rows[sections == np.bincount(sections).argmax()][-1])


def _growing(run: Run, row: int) -> tuple[Growing, ...]:
    """Requests of a row's section that grow with the context, most bytes a token first."""
    program = run.trace.program
    _, section, context, tokens = run.schedule[row].tolist()
    start, end = program.section_start[section], program.section_start[section + 1]
    found: Counter[tuple[str, str, int, int]] = Counter()
    example: dict[tuple[str, str, int, int], Request] = {}
    for event in range(start, end):
        mode, _, size_row, _ = program.events[event].tolist()
        if mode != ALLOCATE:
            continue
        constant, slope = program.sizes[size_row, :2].tolist()
        if slope <= 0:
            continue
        request = run.trace.request(event, context, tokens)
        key = (request.operation, request.module, constant, slope)
        found[key] += 1
        example.setdefault(key, request)
    growing = [
        Growing(
            example[key],
            count,
            key[3],
            (SMALL_REQUEST_BYTES - key[2]) // key[3] + 1 if key[2] < SMALL_REQUEST_BYTES else None,
        )
        for key, count in found.items()
    ]
    return tuple(sorted(growing, key=lambda group: -group.count * group.bytes_per_token))
