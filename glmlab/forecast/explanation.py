"""Why a forecast rises where it rises, and why it stays level where it does.

The allocator asks the driver for a segment when no inactive block serves a request: a :class:`Rise` names that request.
Where nothing rises, growing tensors find inactive blocks: a :class:`Plateau` names the tensors, their pool, the blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from glmlab.allocator.blocks import SegmentView
from glmlab.allocator.config import SMALL_REQUEST_BYTES
from glmlab.allocator.program import Int64Array, Replay
from glmlab.core.units import MIB, format_bytes
from glmlab.tracing.trace import AllocationTrace, Request, allocations

PLATEAU_STEPS, PLATEAU_SHARE = 64, 0.1
"""A plateau has at least so many steps, and at least this share of all steps."""

LARGEST_BLOCKS = 4
"""Inactive blocks that a plateau names."""


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
        where = f"step {self.step:,} (turn {self.turn}, {self.context_tokens:,} tokens)" if self.step else "loading"
        asked = format_bytes(self.request.requested_bytes)
        return f"{where}: +{self.mib:g} MiB, {self.pool} pool, for {asked} of {self.request}"


@dataclass(frozen=True)
class Growing:
    """Requests of a decode step that grow with the context, alike in operation and module."""

    request: Request  # one of them, at the end of the plateau
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
    growing: tuple[Growing, ...]  # most bytes a token first
    inactive_small_after_mib: float  # after the first step
    inactive_large_after_mib: float
    largest_inactive_mib: tuple[float, ...]  # blocks of the large pool

    def __str__(self) -> str:
        text = (
            f"steps {self.first_step:,} to {self.last_step:,} ({self.first_context:,} to {self.last_context:,} "
            f"tokens): level. At its start {self.inactive_small_after_mib:.2f} MiB of the small pool are inactive and "
            f"{self.inactive_large_after_mib:.2f} MiB of the large pool"
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
                f"{growing.bytes_per_token:,} B a token and are served by inactive blocks of the {pool} pool"
            )
            crossing = growing.leaves_small_pool_at
            if crossing is not None and crossing <= self.last_context:
                text += f" (above 1 MiB, and so in the large pool, from {crossing:,} tokens on)"
        return text + "."


def find_rises(trace: AllocationTrace, schedule: Int64Array, replay: Replay, steps: Int64Array) -> tuple[Rise, ...]:
    """Every segment that was taken, in order; ``steps`` are the schedule's rows that are loading or forward passes."""
    rises = []
    for row, event, n_bytes, pool in replay.growth.tolist():
        if row >= replay.rows:
            break  # this row ran out of memory
        turn, _, context, tokens = schedule[row].tolist()
        step = int(np.searchsorted(steps, row))
        request = trace.request(event, context, tokens)
        rises.append(Rise(step, turn, context, n_bytes / MIB, "large" if pool else "small", request))
    return tuple(rises)


def find_plateaus(
    trace: AllocationTrace,
    schedule: Int64Array,
    steps: Int64Array,
    rises: Sequence[Rise],
    segments_after: Callable[[int], list[SegmentView]],
) -> tuple[Plateau, ...]:
    """Long stretches of steps between two rises; ``segments_after`` gives the segments after a row of the schedule."""
    n_steps = len(steps) - 1
    least = max(PLATEAU_STEPS, int(PLATEAU_SHARE * n_steps))
    edges = [*sorted({1, *(rise.step for rise in rises if rise.step > 0)}), n_steps + 1]
    plateaus = []
    for first, after in pairwise(edges):
        if after - first < least:
            continue
        blocks = [(s.pool, b.size / MIB) for s in segments_after(int(steps[first])) for b in s.blocks if not b.live]
        large = sorted((size for pool, size in blocks if pool == "large"), reverse=True)
        # Describe a decode step, not a prefill in between: the last step of the section that runs most often.
        rows = steps[first:after]
        sections = schedule[rows, 1]
        typical = rows[sections == np.bincount(sections).argmax()][-1]
        plateaus.append(
            Plateau(
                first_step=first,
                last_step=after - 1,
                first_context=int(schedule[steps[first], 2]),
                last_context=int(schedule[steps[after - 1], 2]),
                growing=_growing(trace, *schedule[typical, 1:].tolist()),
                inactive_small_after_mib=sum(size for pool, size in blocks if pool == "small"),
                inactive_large_after_mib=sum(large),
                largest_inactive_mib=tuple(large[:LARGEST_BLOCKS]),
            )
        )
    return tuple(plateaus)


def _growing(trace: AllocationTrace, section: int, context: int, tokens: int) -> tuple[Growing, ...]:
    """Requests of a section that grow with the context."""
    program = trace.program
    alike: dict[tuple[str, str, int, int], list[Request]] = {}
    for event in allocations(program, program.section_names[section]).tolist():
        constant, slope = program.sizes[program.events[event, 2], :2].tolist()
        if slope > 0:
            request = trace.request(event, context, tokens)
            alike.setdefault((request.operation, request.module, constant, slope), []).append(request)
    growing = [
        Growing(
            request=requests[0],
            count=len(requests),
            bytes_per_token=slope,
            leaves_small_pool_at=(SMALL_REQUEST_BYTES - constant) // slope + 1
            if constant < SMALL_REQUEST_BYTES
            else None,
        )
        for (_, _, constant, slope), requests in alike.items()
    ]
    return tuple(sorted(growing, key=lambda group: -group.count * group.bytes_per_token))


def explanation_text(rises: Sequence[Rise], plateaus: Sequence[Plateau]) -> str:
    """Rises and plateaus in order, one a line; those of loading are one line."""
    loading = [rise.mib for rise in rises if rise.step == 0]
    lines = [f"loading: +{sum(loading):,.0f} MiB in {len(loading)} segments"] if loading else []
    parts = [(rise.step, str(rise)) for rise in rises if rise.step > 0]
    parts += [(plateau.first_step, str(plateau)) for plateau in plateaus]
    return "\n".join(lines + [text for _, text in sorted(parts, key=lambda part: part[0])])
