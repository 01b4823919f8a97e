"""The replay of event programs with the readable allocator, event by event: what the compiled one must give."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from glmlab.allocator.blocks import Block
from glmlab.allocator.caching import CachingAllocator
from glmlab.allocator.config import OutOfMemory
from glmlab.allocator.program import (
    ALLOCATE,
    EMPTY_CACHE,
    FREE,
    FREE_CARRIED,
    FREE_FIRST,
    EventProgram,
    EventProgramError,
    Replay,
)
from glmlab.allocator.replay import REPLAY_COLUMNS


class ReadableReplayer:
    """Replays rows of schedules through an allocator, which keeps the state at the end."""

    def __init__(self, program: EventProgram, allocator: CachingAllocator) -> None:
        self.program, self.allocator = program, allocator
        self.turn: int | None = None
        self.rows: list[list[Block]] = []  # slots of every row
        self.first: list[Block] = []
        self.carried: list[Block] = []
        self.next_carried: list[Block] = []
        self.owned = [0] * len(program.owners)

    def run(self, schedule: npt.ArrayLike) -> Replay:
        growth: list[tuple[int, int, int, int]] = []
        table, owned, error = [], [], None
        for number, row in enumerate(self.program.checked_schedule(schedule).tolist()):
            try:
                self._step(number, row, growth)
            except OutOfMemory as full:
                error = full
                break
            table.append([getattr(self.allocator, f"{name}_bytes") for name in REPLAY_COLUMNS])
            owned.append(list(self.owned))
        columns = np.array(table, np.int64).reshape(-1, len(REPLAY_COLUMNS)).T
        return Replay(
            **dict(zip(REPLAY_COLUMNS, columns, strict=True)),
            allocated_by_owner=np.array(owned, np.int64).reshape(-1, len(self.owned)),
            growth=np.array(growth, np.int64).reshape(-1, 4),
            out_of_memory=error,
        )

    def _step(self, number: int, row: Sequence[int], growth: list[tuple[int, int, int, int]]) -> None:
        turn, section, context, tokens = row
        program, allocator, slots = self.program, self.allocator, []
        sizes = program.bytes_at(context, tokens).tolist()
        if turn != self.turn:
            self.turn, self.first = turn, slots
            self.carried, self.next_carried = self.next_carried, []
        self.rows.append(slots)
        allocator.reset_peak()
        name, begin = program.section_names[section], int(program.section_start[section])
        for event, (mode, age, arg, owner) in enumerate(program.events_of(name).tolist(), begin):
            if mode == ALLOCATE:
                allocator.segments_taken.clear()
                slots.append(allocator.malloc(max(sizes[arg], 1), owner=owner))
                growth += [(number, event, n_bytes, int(not small)) for n_bytes, small in allocator.segments_taken]
                self.owned[owner] += slots[-1].size
            elif mode == EMPTY_CACHE:
                allocator.empty_cache()
            else:
                recent = self.rows[-1 - age] if age < len(self.rows) else []
                source = {FREE: recent, FREE_FIRST: self.first, FREE_CARRIED: self.carried}[mode]
                if arg >= len(source) or not source[arg].live:
                    bad = tuple(program.events[event].tolist())
                    raise EventProgramError(
                        f"row {number} of the schedule: event {event}, {bad}, frees what is not live"
                    )
                self.owned[source[arg].owner] -= source[arg].size
                allocator.free(source[arg])
        if name in program.carried:
            self.next_carried = [slots[slot] for slot in program.carried[name]]
