"""Replays an event program through the caching allocator: one call for a whole conversation of decode steps.

:func:`replay_steps` is the compiled form, :func:`replay_readable` the same with the readable allocator, event by event
(a hundred times slower, to check and to look inside). Formats: :mod:`glmlab.allocator.program`.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.core import event as numba_events

from glmlab.allocator import kernels as k
from glmlab.allocator.addresses import checked_seed
from glmlab.allocator.caching import Block, BlockView, CachingAllocator, SegmentView
from glmlab.allocator.config import BLOCK_BYTES, FIRST_ADDRESS, AllocatorSettings, OutOfMemory
from glmlab.allocator.program import (
    ALLOCATE,
    EMPTY_CACHE,
    FREE,
    FREE_CARRIED,
    FREE_FIRST,
    EventProgram,
    EventProgramError,
    Int64Array,
    Replay,
)
from glmlab.core.units import GIB, MIB, format_bytes

MAX_ADDRESS_BYTES = 1024 * GIB
"""With this limit, and that of a request, sizes and addresses of the compiled form fit 32 bits of 512 B."""

_HASH_PRIME, _MASK = 1099511628211, (1 << 64) - 1
_log = logging.getLogger(__name__)


def replay_steps(
    program: EventProgram,
    schedule: npt.ArrayLike,
    settings: AllocatorSettings | None = None,
    *,
    capacity_bytes: int | None = None,
    outside_bytes: int = 0,
    address_seed: int | None = None,
    with_address_hash: bool = False,
) -> Replay:
    """Replay every row of a schedule, compiled.

    Args:
        program: events, sizes and sections.
        schedule: (rows, 4) whole numbers (turn, section, L, n), see :mod:`glmlab.allocator.program`.
        settings: of the allocator; PyTorch's defaults without.
        capacity_bytes: of the device; None: no limit.
        outside_bytes: what the CUDA context and other programs hold of it.
        address_seed: an order in which the driver gives addresses, see :class:`CachingAllocator`; rising without.
        with_address_hash: fill ``address_hash`` of the result, which takes time.

    Returns:
        One entry a row; running out of memory is no exception but part of the result.

    Raises:
        EventProgramError: a schedule that does not fit the program, a free of what is not live, a request over 256 GiB,
            or more than 1 TiB asked of the driver.

    Example:
        >>> program = EventProgram(
        ...     events=np.array([(ALLOCATE, 0, 0, 0), (ALLOCATE, 0, 0, 0), (FREE, 1, 0, 0)]),
        ...     sizes=np.array([(0, 1024, 0, 0, 0)]),
        ...     section_names=("prefill", "step"),
        ...     section_start=np.array([0, 1, 3]),
        ... )
        >>> replay = replay_steps(program, [(1, 0, 100, 100), (1, 1, 101, 101), (1, 1, 102, 102)])
        >>> replay.allocated.tolist(), replay.peak_allocated.tolist()
        ([102400, 103424, 104448], [102400, 205824, 207872])
    """
    replayer = StepReplayer(
        program,
        settings,
        capacity_bytes=capacity_bytes,
        outside_bytes=outside_bytes,
        address_seed=address_seed,
        with_address_hash=with_address_hash,
    )
    return replayer.run(schedule)


class StepReplayer:
    """The compiled allocator with its program; ``run`` goes on where the last one ended.

    Arguments as those of :func:`replay_steps`. ``segments()`` shows the blocks after the last row, as
    :meth:`CachingAllocator.segments` does: run a schedule up to the row of interest, look, run on.
    """

    def __init__(
        self,
        program: EventProgram,
        settings: AllocatorSettings | None = None,
        *,
        capacity_bytes: int | None = None,
        outside_bytes: int = 0,
        address_seed: int | None = None,
        with_address_hash: bool = False,
    ) -> None:
        self.program, self.settings = program, settings or AllocatorSettings()
        self.capacity_bytes, self.outside_bytes = capacity_bytes, outside_bytes
        self._wants_hash = with_address_hash
        self._divisions = np.array(self.settings.power2_divisions, np.int64)
        self._allocate_state(capacity_bytes, outside_bytes, address_seed)
        self._encode(program)
        self._rows_done = 0

    def run(self, schedule: npt.ArrayLike) -> Replay:
        """Replay further rows; see :func:`replay_steps`. Row numbers in ``growth`` count from this call's first row."""
        rows = self.program.checked_schedule(schedule)
        # The lanes of the ring go by row number, so a second run pads its schedule in front with the rows done so far.
        before = self._rows_done
        padded = np.concatenate([np.zeros((before % k.LANES, 4), np.int64), rows])
        skip = before % k.LANES
        out = np.zeros((len(padded), 8), np.int64)
        out_owners = np.zeros((len(padded), len(self.program.owners)), np.int64)
        self._counters[k.GROWTHS // 8] = 0
        row, status = skip, k.NEEDS_ROOM
        while status == k.NEEDS_ROOM:
            row, status = _replay_rows(
                self._memory(),
                self._growth.ctypes.data,
                self._codes.ctypes.data,
                self._ring.ctypes.data,
                self._units.ctypes.data,
                self.program.section_start,
                self._slots,
                self._uses,
                self._uses_start,
                self.program.sizes,
                self._divisions,
                self._first,
                self._carried,
                self._next_carried,
                self._carried_slots,
                self._carried_start,
                self._lane_slots,
                self._owners,
                padded,
                row,
                self._wants_hash,
                out,
                out_owners,
            )
            if status == k.NEEDS_ROOM:
                self._make_room()
        self._rows_done += row - skip
        if status == k.BAD_FREE:
            event = self._counter(k.EVENT)
            raise EventProgramError(
                f"row {row - skip} of the schedule: event {event}, {tuple(self.program.events[event].tolist())}, "
                "frees what is not live"
            )
        if max(self._counter(k.TOP), -self._counter(k.LOWEST)) * BLOCK_BYTES > MAX_ADDRESS_BYTES:
            raise EventProgramError(
                f"row {row - skip - 1} of the schedule: the driver has been asked for more than "
                f"{format_bytes(MAX_ADDRESS_BYTES)}, which no GPU has. Give a capacity, or a smaller workload."
            )
        return self._result(out[skip:row], out_owners[skip:row], skip, status == k.OUT_OF_MEMORY)

    def segments(self) -> list[SegmentView]:
        """Return every segment with its blocks, ordered by address."""
        record = self._records.reshape(-1, k.RECORD_BYTES // 4).tolist()
        is_used = np.ones(len(record), np.bool_)
        is_used[self._spare[self._counter(k.RECORDS_USED) :] // k.RECORD_BYTES] = False
        heads = [block for block in np.flatnonzero(is_used).tolist() if record[block][k.PREV // 4] < 0]
        views: list[SegmentView] = []
        for head in heads:
            run: list[BlockView] = []
            block, pool = head * k.RECORD_BYTES, "small"
            while block >= 0:
                address, size, _, after, state, *_ = record[block // k.RECORD_BYTES]
                pool = "large" if state & k.LARGE else "small"
                if not state & k.UNMAPPED:
                    is_live = not state & k.IDLE
                    owner = state >> k.OWNER_SHIFT if is_live else 0
                    run.append(BlockView(FIRST_ADDRESS + address * BLOCK_BYTES, size * BLOCK_BYTES, owner, is_live))
                if run and (state & k.UNMAPPED or after < 0):
                    end = run[-1].address + run[-1].size
                    views.append(SegmentView(run[0].address, end - run[0].address, pool, 0, tuple(run)))
                    run = []
                block = after
        return sorted(views, key=lambda view: view.address)

    # -- memory of the kernel -----------------------------------------------------------------------------------------

    def _allocate_state(self, capacity_bytes: int | None, outside_bytes: int, address_seed: int | None) -> None:
        n_records = 1 << 11
        self._records = np.zeros(n_records * k.RECORD_BYTES // 4, np.int32)
        self._spare = np.arange(0, n_records * k.RECORD_BYTES, k.RECORD_BYTES, dtype=np.int32)
        self._lists = np.full(k.LIST_COUNT, k.NONE, np.int32)
        self._bitmaps = np.zeros(k.WORD_COUNT, np.int64)
        self._growth = np.zeros((1 << 12, 4), np.int64)
        self._counters = np.zeros(k.COUNTERS, np.int64)
        settings = self.settings
        limit = settings.max_split_size_mb
        capacity = k.NO_LIMIT if capacity_bytes is None else max(capacity_bytes - outside_bytes, 0) // BLOCK_BYTES
        for offset, value in {
            k.RECORD_CAPACITY: n_records,
            k.GROWTH_CAPACITY: len(self._growth),
            k.SPACE_SMALL: k.NONE,
            k.SPACE_LARGE: k.NONE,
            k.TURN: -1,
            k.CAPACITY: capacity,
            k.SEED: k.NO_SEED if (seed := checked_seed(address_seed)) is None else seed,
            k.EXPANDABLE: int(settings.expandable_segments),
            k.MAX_SPLIT: k.NO_LIMIT if limit is None else limit * MIB // BLOCK_BYTES,
            k.NON_SPLIT_ROUNDING: settings.max_non_split_rounding_mb * MIB // BLOCK_BYTES,
            k.LARGE_SEGMENT: settings.large_segment_size_mb * MIB // BLOCK_BYTES,
        }.items():
            self._counters[offset // 8] = value

    def _encode(self, program: EventProgram) -> None:
        names = program.section_names
        self._slots = np.array([program.slots(name) for name in names], np.int64)
        lane_size = int(self._slots.max(initial=1)) + 1
        if lane_size > k.CODE_SLOT_MASK or len(program.owners) > 1 << k.OWNER_BITS:
            raise EventProgramError(
                f"a section allocates {lane_size - 1} objects for {len(program.owners)} owners; the replay holds "
                f"{k.CODE_SLOT_MASK - 1} and {1 << k.OWNER_BITS}"
            )
        modes, ages, args, owners = program.events.T.astype(np.int64)
        base = {FREE: ages << k.CODE_AGE_SHIFT, FREE_FIRST: k.CODE_FIRST, FREE_CARRIED: k.CODE_CARRIED}
        codes = np.full(len(modes), k.CODE_EMPTY_CACHE, np.int64)
        for mode, value in base.items():
            codes = np.where(modes == mode, value + args, codes)
        codes = np.where(modes == ALLOCATE, -1 - ((args << k.OWNER_BITS) + owners), codes)
        frees_slot = (modes == FREE) | (modes == FREE_FIRST)
        if np.any(args[frees_slot] >= lane_size) or np.any(args[modes == FREE_CARRIED] > k.CODE_SLOT_MASK):
            raise EventProgramError(f"an event frees slot {args.max()}, but no section allocates that many objects")
        self._codes = codes.astype(np.int32)
        self._ring = np.full(k.LANES * lane_size, k.NONE, np.int32)
        self._lane_slots = np.zeros(k.LANES, np.int64)
        self._first = np.full(lane_size, k.NONE, np.int64)
        self._units = np.zeros(len(program.sizes) + 1, np.int64)
        used = [np.unique(events[events[:, 0] == ALLOCATE][:, 2]) for events in map(program.events_of, names)]
        self._uses, self._uses_start = _ragged(used)
        lists = [np.array(program.carried.get(name, ()), np.int64) for name in names]
        self._carried_slots, self._carried_start = _ragged(lists)
        most = max((len(slots) for slots in lists), default=0)
        self._carried, self._next_carried = np.full(most, k.NONE, np.int64), np.full(most, k.NONE, np.int64)
        self._owners = np.zeros(len(program.owners), np.int64)

    def _memory(self) -> tuple[int, ...]:
        arrays = (self._records, self._lists, self._bitmaps, self._spare, self._counters)
        return tuple(int(array.ctypes.data) for array in arrays)

    def _counter(self, offset: int) -> int:
        return int(self._counters[offset // 8])

    def _make_room(self) -> None:
        """Double what may be full: the records and the list of growths."""
        old = len(self._spare)
        self._records = np.concatenate([self._records, np.zeros_like(self._records)])
        more = np.arange(old * k.RECORD_BYTES, 2 * old * k.RECORD_BYTES, k.RECORD_BYTES, dtype=np.int32)
        self._spare = np.concatenate([self._spare, more])
        self._growth = np.concatenate([self._growth, np.zeros_like(self._growth)])
        self._counters[k.RECORD_CAPACITY // 8] = 2 * old
        self._counters[k.GROWTH_CAPACITY // 8] = len(self._growth)

    def _result(self, out: Int64Array, owners: Int64Array, skip: int, is_out_of_memory: bool) -> Replay:
        growth = self._growth[: self._counter(k.GROWTHS)].copy()
        growth[:, 0] -= skip
        growth[:, 2] *= BLOCK_BYTES
        error = self._out_of_memory() if is_out_of_memory else None
        return _replay(out[:, :7] * BLOCK_BYTES, owners * BLOCK_BYTES, out[:, 7].astype(np.uint64), growth, error)

    def _out_of_memory(self) -> OutOfMemory:
        reserved = self._counter(k.RESERVED) * BLOCK_BYTES
        capacity = self.capacity_bytes or 0
        return OutOfMemory(
            tried=self.settings.segment_bytes(self._counter(k.FAILED_SIZE) * BLOCK_BYTES),
            capacity=capacity,
            free=max(capacity - self.outside_bytes - reserved, 0),
            allocated=self._counter(k.ALLOCATED) * BLOCK_BYTES,
            reserved=reserved,
        )


def _replay(
    table: Int64Array,
    owners: Int64Array,
    digests: npt.NDArray[np.uint64],
    growth: Int64Array,
    out_of_memory: OutOfMemory | None,
) -> Replay:
    columns = (column.copy() for column in table.T)
    reserved, allocated, peak, peak_small, inactive_small, inactive_large, reserved_small = columns
    return Replay(
        reserved=reserved,
        reserved_small=reserved_small,
        allocated=allocated,
        peak_allocated=peak,
        peak_allocated_small=peak_small,
        inactive_small=inactive_small,
        inactive_large=inactive_large,
        allocated_by_owner=owners.copy(),
        address_hash=digests,
        growth=growth,
        out_of_memory=out_of_memory,
    )


def _ragged(lists: Sequence[Int64Array]) -> tuple[Int64Array, Int64Array]:
    """Return lists one behind the other, and where each begins."""
    start = np.concatenate([[0], np.cumsum([len(values) for values in lists])]).astype(np.int64)
    return np.concatenate([*lists, np.zeros(1, np.int64)]).astype(np.int64), start


def _replay_rows(*arguments: Any) -> tuple[int, int]:
    with announcing_compilation():
        row, status = k.replay_rows(*arguments)
    return int(row), int(status)


class _Announcer(numba_events.Listener):  # type: ignore[misc]
    """Logs the first compilation it hears of."""

    is_silent = True

    def on_start(self, event: Any) -> None:
        if self.is_silent:
            self.is_silent = False
            _log.warning("compiling the replay kernel, once on this machine: about 15 seconds")

    def on_end(self, event: Any) -> None:
        pass


@contextmanager
def announcing_compilation() -> Iterator[None]:
    """Log, once, that a kernel is compiled while the context lasts; what comes from numba's disk cache is silent."""
    with numba_events.install_listener("numba:compile", _Announcer()):
        yield


def replay_readable(program: EventProgram, schedule: npt.ArrayLike, allocator: CachingAllocator) -> Replay:
    """Replay a schedule event by event through a readable allocator, which keeps the state at the end.

    Returns what :func:`replay_steps` returns (the hash always), and raises what it raises.

    Example:
        >>> program = EventProgram(np.array([(ALLOCATE, 0, 0, 0)]), np.array([(700, 0, 0, 0, 0)]), ("load",), [0, 1])
        >>> allocator = CachingAllocator()
        >>> replay_readable(program, [(0, 0, 0, 0)], allocator).allocated.tolist(), len(allocator.segments())
        ([1024], 1)
    """
    rows = program.checked_schedule(schedule)
    run = _ReadableRun(program, allocator)
    for row in rows.tolist():
        try:
            run.step(*row)
        except OutOfMemory as error:
            return run.result(error)
    return run.result(None)


class _ReadableRun:
    """State and results of a readable replay; see the format in glmlab.allocator.program."""

    def __init__(self, program: EventProgram, allocator: CachingAllocator) -> None:
        self.program, self.allocator = program, allocator
        self.turn: int | None = None
        self.history: list[list[Block]] = []  # slots of the last rows, newest first
        self.first: list[Block] = []
        self.carried: list[Block] = []
        self.next_carried: list[Block] = []
        self.owned = [0] * len(program.owners)
        self.rows: list[list[int]] = []
        self.growth: list[tuple[int, int, int, int]] = []

    def step(self, turn: int, section: int, context: int, tokens: int) -> None:
        """Replay one row; :class:`OutOfMemory` leaves it half done and unrecorded."""
        name = self.program.section_names[section]
        sizes = self.program.bytes_at(context, tokens).tolist()
        slots: list[Block] = []
        if turn != self.turn:
            self.turn, self.first = turn, slots
            self.carried, self.next_carried = self.next_carried, []
        self.history = [slots, *self.history[: k.LANES - 1]]
        allocator, digest = self.allocator, 0
        allocator.reset_peak()
        begin = int(self.program.section_start[section])
        for event, (mode, age, arg, owner) in enumerate(self.program.events_of(name).tolist(), begin):
            if mode == ALLOCATE:
                allocator.segments_taken.clear()
                block = allocator.malloc(max(sizes[arg], 1), owner=owner)
                self.growth += [(len(self.rows), event, n, int(not small)) for n, small in allocator.segments_taken]
                slots.append(block)
                self.owned[owner] += block.size
                digest = ((digest ^ (block.address - FIRST_ADDRESS) // BLOCK_BYTES) * _HASH_PRIME + 1) & _MASK
            elif mode == EMPTY_CACHE:
                allocator.empty_cache()
            else:
                self._free({FREE: self._row(age), FREE_FIRST: self.first, FREE_CARRIED: self.carried}[mode], arg, event)
        if name in self.program.carried:
            self.next_carried = [slots[slot] for slot in self.program.carried[name]]
        self.rows.append(
            [
                allocator.reserved_bytes,
                allocator.allocated_bytes,
                allocator.peak_allocated_bytes,
                allocator.peak_allocated_small_bytes,
                allocator.inactive_small_bytes,
                allocator.inactive_large_bytes,
                allocator.allocated_small_bytes + allocator.inactive_small_bytes,
                *self.owned,
                digest,
            ]
        )

    def result(self, out_of_memory: OutOfMemory | None) -> Replay:
        """Return the rows done."""
        table = np.array([row[:-1] for row in self.rows], np.int64).reshape(len(self.rows), 7 + len(self.owned))
        digests = np.array([row[-1] for row in self.rows], np.uint64)
        growth = np.array(self.growth, np.int64).reshape(-1, 4)
        return _replay(table[:, :7], table[:, 7:], digests, growth, out_of_memory)

    def _row(self, age: int) -> list[Block]:
        return self.history[age] if age < len(self.history) else []

    def _free(self, slots: list[Block], slot: int, event: int) -> None:
        if slot >= len(slots) or not slots[slot].live:
            raise EventProgramError(
                f"row {len(self.rows)} of the schedule: event {event}, {tuple(self.program.events[event].tolist())}, "
                "frees what is not live"
            )
        self.owned[slots[slot].owner] -= slots[slot].size
        self.allocator.free(slots[slot])
