"""Replays an event program through the compiled allocator: one call for a whole conversation of decode steps."""

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.core import event as numba_events

from glmlab.allocator import kernels as k
from glmlab.allocator.blocks import BlockView, SegmentView
from glmlab.allocator.config import (
    BLOCK_BYTES,
    EXPANDABLE_SPACE_BYTES,
    FIRST_ADDRESS,
    Addresses,
    AllocatorSettings,
    OutOfMemory,
)
from glmlab.allocator.program import (
    ALLOCATE,
    FREE,
    FREE_CARRIED,
    FREE_FIRST,
    EventProgram,
    EventProgramError,
    Replay,
)
from glmlab.core.units import GIB, MIB, format_bytes

MAX_ADDRESS_BYTES = 1024 * GIB
"""With this limit, and that of a request, sizes and addresses of the compiled form fit 32 bits of 512 B."""

REPLAY_COLUMNS = (
    *("reserved", "reserved_small", "allocated", "peak_allocated", "peak_allocated_small"),
    *("inactive_small", "inactive_large"),
)
"""Columns of the kernel's results, as fields of :class:`Replay`."""

_log = logging.getLogger(__name__)


class StepReplayer:
    """The compiled allocator with an :class:`EventProgram`; ``run`` continues where the last one ended.

    Args:
        program: events, sizes and sections.
        settings: of the allocator; PyTorch's defaults without.
        capacity_bytes: of the device; None: no limit.
        outside_bytes: what the CUDA context and other programs hold of it.
        address_seed: an order of the driver's addresses, see :class:`~glmlab.allocator.config.Addresses`.

    Example:
        >>> program = EventProgram(
        ...     events=[(ALLOCATE, 0, 0, 0), (ALLOCATE, 0, 0, 0), (FREE, 1, 0, 0)],
        ...     sizes=[(0, 1024, 0, 0, 0)],
        ...     section_names=("prefill", "step"),
        ...     section_start=[0, 1, 3],
        ... )
        >>> replay = StepReplayer(program).run([(1, 0, 100, 100), (1, 1, 101, 101), (1, 1, 102, 102)])
        >>> replay.allocated.tolist(), replay.peak_allocated.tolist()
        ([102400, 103424, 104448], [102400, 205824, 207872])
    """

    def __init__(
        self,
        program: EventProgram,
        settings: AllocatorSettings | None = None,
        *,
        capacity_bytes: int | None = None,
        outside_bytes: int = 0,
        address_seed: int | None = None,
    ) -> None:
        self.program, self.settings = program, settings or AllocatorSettings()
        self.capacity_bytes, self.outside_bytes = capacity_bytes, outside_bytes
        self._allocate_state(Addresses(address_seed).seed)
        self._encode_program()

    def run(self, schedule: npt.ArrayLike) -> Replay:
        """Replay further rows of a schedule: (rows, 4) whole numbers (turn, section, L, n).

        Returns one entry a row; rows in ``growth`` count from this call's first. Running out of memory is no exception
        but part of the result.

        Raises:
            EventProgramError: a schedule that does not fit the program, a free of what is not live, a request over 256
                GiB, or more than 1 TiB asked of the driver.
        """
        rows = self.program.checked_schedule(schedule)
        out = np.zeros((len(rows), len(REPLAY_COLUMNS)), np.int64)
        out_owners = np.zeros((len(rows), len(self.program.owners)), np.int64)
        self._set(k.GROWTHS, 0)
        row, status = 0, k.NEEDS_ROOM
        while status == k.NEEDS_ROOM:
            with numba_events.install_listener("numba:compile", _CompilationNote()):
                row, status = k.run_schedule(self._pointers(), tuple(self._tables), rows, row, out, out_owners)
            if status == k.NEEDS_ROOM:
                self._make_room()
        self._set(k.ROWS_BEFORE, self._get(k.ROWS_BEFORE) + row)
        if status == k.BAD_FREE:
            event = self._get(k.EVENT)
            bad = tuple(self.program.events[event].tolist())
            raise EventProgramError(f"row {row} of the schedule: event {event}, {bad}, frees what is not live")
        is_full = status == k.OUT_OF_MEMORY
        asked = max(self._get(k.TOP), -self._get(k.LOWEST)) * BLOCK_BYTES
        is_space_full = is_full and self.capacity_bytes is None
        if asked > MAX_ADDRESS_BYTES or is_space_full:
            most = EXPANDABLE_SPACE_BYTES if is_space_full else MAX_ADDRESS_BYTES
            raise EventProgramError(
                f"row {row - 1 + is_full} of the schedule: the driver has been asked for more than "
                f"{format_bytes(most)}, which no GPU has. Give a capacity, or a smaller workload."
            )
        columns = np.ascontiguousarray(out[:row].T) * BLOCK_BYTES
        return Replay(
            **dict(zip(REPLAY_COLUMNS, columns, strict=True)),
            allocated_by_owner=out_owners[:row] * BLOCK_BYTES,
            growth=self._growth[: self._get(k.GROWTHS)] * (1, 1, BLOCK_BYTES, 1),
            out_of_memory=self._out_of_memory() if is_full else None,
        )

    def segments(self) -> list[SegmentView]:
        """Return every segment with its blocks after the last row, ordered by address."""
        records = self._records.reshape(-1, k.RECORD_BYTES // 4).tolist()
        unused = self._spare[self._get(k.RECORDS_USED) :] // k.RECORD_BYTES
        views: list[SegmentView] = []
        for head in set(range(len(records))).difference(unused.tolist()):
            if records[head][k.PREV // 4] >= 0:
                continue
            chain, block = [], head
            while block >= 0:
                chain.append(records[block])
                block = records[block][k.NEXT // 4] // k.RECORD_BYTES
            for is_unmapped, blocks in groupby(chain, key=lambda record: record[k.STATE // 4] & k.UNMAPPED):
                if not is_unmapped:
                    is_small = not chain[0][k.STATE // 4] & k.LARGE
                    views.append(SegmentView.of(is_small, 0, map(_view, blocks)))
        return sorted(views, key=lambda view: view.address)

    # -- memory of the kernel -----------------------------------------------------------------------------------------

    def _allocate_state(self, seed: int | None) -> None:
        n_records = 1 << 11
        self._records = np.zeros(n_records * k.RECORD_BYTES // 4, np.int32)
        self._spare = np.arange(0, n_records * k.RECORD_BYTES, k.RECORD_BYTES, dtype=np.int32)
        self._lists = np.full(3 * k.GROUP_LISTS, k.NONE, np.int32)
        self._bitmap = np.zeros(3 * k.GROUP_WORDS, np.int64)
        self._growth = np.zeros((1 << 12, 4), np.int64)
        self._counters = np.zeros(k.COUNTERS, np.int64)
        settings, capacity, limit = self.settings, k.NO_LIMIT, self.settings.max_split_size_mb
        if self.capacity_bytes is not None:
            capacity = max(self.capacity_bytes - self.outside_bytes, 0) // BLOCK_BYTES
        for counter, value in {
            k.RECORD_CAPACITY: n_records,
            k.GROWTH_CAPACITY: len(self._growth),
            k.SPACE_SMALL: k.NONE,
            k.SPACE_LARGE: k.NONE,
            k.TURN: -1,
            k.CAPACITY: capacity,
            k.SEED: k.NO_SEED if seed is None else seed,
            k.EXPANDABLE: int(settings.expandable_segments),
            k.MAX_SPLIT: k.NO_LIMIT if limit is None else limit * MIB // BLOCK_BYTES,
            k.NON_SPLIT_ROUNDING: settings.max_non_split_rounding_mb * MIB // BLOCK_BYTES,
            k.LARGE_SEGMENT: settings.large_segment_size_mb * MIB // BLOCK_BYTES,
        }.items():
            self._set(counter, value)

    def _encode_program(self) -> None:
        program, names = self.program, self.program.section_names
        slots = np.array([program.slots(name) for name in names], np.int64)
        carried = [program.carried.get(name, ()) for name in names]
        lane_size = max(1, *slots.tolist(), *map(len, carried))
        if lane_size > k.SLOT_MASK or len(program.owners) > 1 << k.OWNER_BITS:
            raise EventProgramError(
                f"a section allocates {lane_size} objects for {len(program.owners)} owners; the replay holds "
                f"{k.SLOT_MASK} and {1 << k.OWNER_BITS}"
            )
        modes, ages, args, owners = program.events.T.astype(np.int64)
        is_free = (modes == FREE) | (modes == FREE_FIRST) | (modes == FREE_CARRIED)
        if np.any(is_free & (args >= lane_size)):
            raise EventProgramError(f"an event frees slot {args.max()}, but no section allocates that many objects")
        lanes = np.select([modes == FREE, modes == FREE_FIRST, modes == FREE_CARRIED], [ages, k.FIRST, k.CARRIED])
        codes = np.where(is_free, (lanes << k.LANE_SHIFT) + args, k.EMPTY_CACHE << k.LANE_SHIFT)
        codes = np.where(modes == ALLOCATE, -1 - ((args << k.OWNER_BITS) + owners), codes)
        self._codes = codes.astype(np.int32)
        self._lanes = np.full(k.LANES * lane_size, k.NONE, np.int32)
        self._units = np.zeros(len(program.sizes) + 1, np.int64)
        self._owners = np.zeros(len(program.owners), np.int64)
        self._tables = k.Tables(
            section_start=program.section_start,
            section_slots=slots,
            sizes=program.sizes,
            divisions=np.array(self.settings.power2_divisions, np.int64),
            carried_start=np.cumsum([0, *map(len, carried)], dtype=np.int64),
            carried_slots=np.array([slot for slots in carried for slot in slots], np.int64),
            lane_size=np.array([lane_size]),
        )

    def _pointers(self) -> tuple[int, ...]:
        return tuple(int(getattr(self, f"_{name}").ctypes.data) for name in k.Memory._fields)

    def _get(self, counter: int) -> int:
        return int(self._counters[counter // 8])

    def _set(self, counter: int, value: int) -> None:
        self._counters[counter // 8] = value

    def _make_room(self) -> None:
        """Double what may be full: the records and the list of growths."""
        old = len(self._spare)
        self._records = np.concatenate([self._records, np.zeros_like(self._records)])
        more = np.arange(old * k.RECORD_BYTES, 2 * old * k.RECORD_BYTES, k.RECORD_BYTES, dtype=np.int32)
        self._spare = np.concatenate([self._spare, more])
        self._growth = np.concatenate([self._growth, np.zeros_like(self._growth)])
        self._set(k.RECORD_CAPACITY, 2 * old)
        self._set(k.GROWTH_CAPACITY, len(self._growth))

    def _out_of_memory(self) -> OutOfMemory:
        return OutOfMemory(
            tried=self.settings.segment_bytes(self._get(k.FAILED_SIZE) * BLOCK_BYTES),
            capacity=self.capacity_bytes or 0,
            outside=self.outside_bytes,
            allocated=self._get(k.ALLOCATED) * BLOCK_BYTES,
            reserved=self._get(k.RESERVED) * BLOCK_BYTES,
        )


def _view(record: Sequence[int]) -> BlockView:
    address, size, _, _, state, *_ = record
    is_live = not state & k.INACTIVE
    owner = state >> k.OWNER_SHIFT if is_live else 0
    return BlockView(FIRST_ADDRESS + address * BLOCK_BYTES, size * BLOCK_BYTES, owner, is_live)


class _CompilationNote(numba_events.Listener):  # type: ignore[misc]
    """Logs, once, that numba compiles; what comes from its disk cache is silent."""

    is_silent = True

    def on_start(self, event: Any) -> None:
        if self.is_silent:
            self.is_silent = False
            _log.warning("compiling the replay kernel, once on this machine: about 15 seconds")

    def on_end(self, event: Any) -> None:
        pass
