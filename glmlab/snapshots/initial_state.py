"""What a GPU held before the history of its snapshot began, found from its end backward.

The history leaves two things open:

- The true size of an old block. A block of the large pool may keep an unsplit tail of up to 1 MiB, and a free tells the
  requested bytes only. For blocks older than the history the tail shows in two ways: the first allocation carved behind
  the block while it lives begins at its true end; and a gap of at most 1 MiB up to the next block is always a tail,
  since the large pool never leaves so little inactive. Where neither shows it, the block counts without a tail.
- The length of an expandable segment's address space. PyTorch reserves 1 1/8 of the card's memory for each
  (``ExpandableSegment`` in ``CUDACachingAllocator.cpp``), rounded up to whole pages, and CUDA lays the spaces one
  behind the other in steps of 32 MiB: 89 GiB on a card of 80 GB. So the distance of two spaces is their length.
"""

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import NamedTuple

from glmlab.allocator.config import (
    DEFAULT_POOL,
    EXPANDABLE_SPACE_BYTES,
    SMALL_REQUEST_BYTES,
    SMALL_SEGMENT_BYTES,
    AllocatorSettings,
)
from glmlab.snapshots.reader import Event, SegmentRecord


class PoolKey(NamedTuple):
    """Which pool a segment belongs to."""

    stream: int
    is_small: bool
    pool_id: tuple[int, int]


@dataclass
class InitialState:
    """What the device held before the first event; pools and address spaces also of segments that the events add."""

    segments: dict[int, tuple[int, PoolKey]] = field(default_factory=dict)  # address -> bytes; not expandable ones
    mapped: dict[PoolKey, list[tuple[int, int]]] = field(default_factory=dict)  # (begin, end) in expandable segments
    live: dict[int, int] = field(default_factory=dict)  # address -> bytes
    pools: dict[int, PoolKey] = field(default_factory=dict)  # index of a segment event -> its pool
    spaces: dict[int, PoolKey] = field(default_factory=dict)  # first address of an expandable segment's space
    space_bytes: int = EXPANDABLE_SPACE_BYTES  # length of each
    unknown_tails: int = 0  # old blocks that may have a tail that nothing shows


def state_before(
    segments: Sequence[SegmentRecord], events: Sequence[Event], settings: AllocatorSettings, note: Callable[[str], None]
) -> InitialState:
    """Undo the events one by one, from the last to the first, beginning with the final segments."""
    state = InitialState()
    for segment in segments:
        if segment.is_expandable:
            ranges = state.mapped.setdefault(_pool_of(segment), [])
            _add_range(ranges, segment.address, segment.address + segment.size)
        else:
            state.segments[segment.address] = (segment.size, _pool_of(segment))
        state.live.update(segment.live)
    pool_of_range = _range_pools(segments, events, settings)
    freed_at: dict[int, int] = {}  # live before the history, freed in it: its true size is open
    for i in range(len(events) - 1, -1, -1):
        event = events[i]
        end = event.address + event.size
        match event.action:
            case "alloc":
                if state.live.pop(event.address, None) is None:
                    note(f"event {i} allocates a block that is missing afterwards: the history has gaps")
                freed_at.pop(event.address, None)
            case "free_completed":
                state.live[event.address] = settings.round_size(event.size)
                freed_at[event.address] = i
            case "segment_alloc":
                state.pools[i] = state.segments.pop(event.address, (event.size, _guessed_pool(event)))[1]
            case "segment_free":
                state.pools[i] = _guessed_pool(event)
                state.segments[event.address] = (event.size, state.pools[i])
            case "segment_map":
                state.pools[i] = pool_of_range(event)
                _cut_range(state.mapped.setdefault(state.pools[i], []), event.address, end)
            case "segment_unmap":
                state.pools[i] = pool_of_range(event)
                _add_range(state.mapped.setdefault(state.pools[i], []), event.address, end)
    known = {(s.address, _pool_of(s)) for s in segments if s.is_expandable}
    known |= {(events[i].address, pool) for i, pool in state.pools.items() if events[i].action in _RANGE_ACTIONS}
    state.spaces, state.space_bytes = address_spaces(known)
    if not settings.expandable_segments:  # with them, every rest from 512 B on is split off
        _find_tails(state, events, freed_at, settings)
    return state


_RANGE_ACTIONS = ("segment_map", "segment_unmap")


def address_spaces(ranges: Iterable[tuple[int, PoolKey]]) -> tuple[dict[int, PoolKey], int]:
    """Return where the address spaces of expandable segments begin, with their pools, and the length of a space.

    ``ranges`` are first addresses of mapped ranges. The length is the shortest distance between two spaces, which is
    1 1/8 of the card's memory where two of them lie side by side.

    Example:
        >>> large, small = PoolKey(0, False, (0, 0)), PoolKey(0, True, (0, 0))
        >>> spaces, n_bytes = address_spaces([(1000, large), (1020, large), (1089, small), (1178, large)])
        >>> list(spaces), n_bytes
        ([1000, 1089, 1178], 89)
    """
    ordered = sorted(ranges)
    firsts = [next(run)[0] for _, run in groupby(ordered, key=lambda one: one[1])]
    n_bytes = min((after - before for before, after in pairwise(firsts)), default=EXPANDABLE_SPACE_BYTES)
    spaces: dict[int, PoolKey] = {}
    ends: dict[PoolKey, int] = {}
    for address, pool in ordered:
        if pool not in ends or address >= ends[pool]:
            spaces[address], ends[pool] = pool, address + n_bytes
    return spaces, n_bytes


def _pool_of(segment: SegmentRecord) -> PoolKey:
    return PoolKey(segment.stream, segment.is_small, segment.pool_id)


def _guessed_pool(event: Event) -> PoolKey:
    return PoolKey(event.stream, event.size == SMALL_SEGMENT_BYTES, event.pool_id or DEFAULT_POOL)


def _range_pools(
    segments: Sequence[SegmentRecord], events: Sequence[Event], settings: AllocatorSettings
) -> Callable[[Event], PoolKey]:
    """Return a function that names the pool of a mapped range: as recorded, or that of the nearest known range."""
    known = [(s.address, _pool_of(s)) for s in segments if s.is_expandable]
    page = settings.page_bytes(is_small=False)

    def nearest(event: Event, is_small: bool | None = None) -> PoolKey | None:
        like = [(a, p) for a, p in known if p.stream == event.stream and is_small in (None, p.is_small)]
        return min(like, key=lambda one: abs(one[0] - event.address), default=(0, None))[1]

    def pool(event: Event) -> PoolKey:
        is_small = event.size == SMALL_SEGMENT_BYTES or event.size % page != 0
        if event.action == "segment_unmap" and event.size % page == 0:
            is_small = bool((near := nearest(event)) and near.is_small)
        like = nearest(event, is_small)
        return PoolKey(event.stream, is_small, event.pool_id or (like.pool_id if like else DEFAULT_POOL))

    known += [(event.address, pool(event)) for event in events if event.action == "segment_map"]
    return pool


def _add_range(ranges: list[tuple[int, int]], begin: int, end: int) -> None:
    touching = [r for r in ranges if r[0] <= end and begin <= r[1]]
    joined = (min([begin, *(r[0] for r in touching)]), max([end, *(r[1] for r in touching)]))
    ranges[:] = sorted([joined, *(r for r in ranges if r not in touching)])


def _cut_range(ranges: list[tuple[int, int]], begin: int, end: int) -> None:
    pieces = [piece for b, e in ranges for piece in ((b, min(e, begin)), (max(b, end), e))]
    ranges[:] = sorted((b, e) for b, e in pieces if b < e)


def _find_tails(
    state: InitialState, events: Sequence[Event], freed_at: dict[int, int], settings: AllocatorSettings
) -> None:
    """Give old blocks of the large pool their true sizes, see the top of this module."""
    allocations = sorted((event.address, i) for i, event in enumerate(events) if event.action == "alloc")
    starts, segment_starts = sorted(state.live), sorted(state.segments)
    for address, index in freed_at.items():
        size = state.live[address]
        where = bisect.bisect_right(segment_starts, address) - 1
        if size <= SMALL_REQUEST_BYTES or where < 0:
            continue
        end = address + size
        segment_end = segment_starts[where] + state.segments[segment_starts[where]][0]
        after = bisect.bisect_right(starts, address)
        limit = min([segment_end, *starts[after : after + 1]])
        first = bisect.bisect_left(allocations, (end, 0))
        last = bisect.bisect_left(allocations, (min(end + SMALL_REQUEST_BYTES + 1, segment_end), 0))
        carved = [(i, at) for at, i in allocations[first:last] if i < index]
        if size >= settings.max_split_bytes or 0 < limit - end <= SMALL_REQUEST_BYTES:
            end = limit
        elif carved:
            end = min(carved)[1]
        else:
            state.unknown_tails += limit > end
        state.live[address] = max(end - address, size)
