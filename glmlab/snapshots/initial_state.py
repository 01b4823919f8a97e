"""What a GPU held before the history of its snapshot began, found from its end backward.

What the history does not tell: a block of the large pool may keep an unsplit tail of up to 1 MiB. For blocks older than
the history the tail is found so: the first allocation carved behind the block while it lives begins at its true end;
and a gap of at most 1 MiB up to the next block is always a tail, since the large pool never leaves so little idle.
Where neither tells, the block counts as *uncertain*, without a tail until PyTorch passes over the idle block behind it.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from glmlab.allocator.config import DEFAULT_POOL, SMALL_REQUEST_BYTES, SMALL_SEGMENT_BYTES, AllocatorSettings
from glmlab.snapshots.reader import Event, LiveBlock, SegmentRecord


@dataclass(frozen=True)
class Owner:
    """Which pool a segment belongs to."""

    stream: int
    is_small: bool
    pool_id: tuple[int, int]


@dataclass
class StartState:
    """What the device held before the first event; owners also of segments that the events add."""

    segments: dict[int, tuple[int, Owner]]  # address -> bytes, owner; without expandable segments
    mapped: dict[Owner, list[tuple[int, int]]]  # mapped ranges (begin, end) of expandable segments
    live: dict[int, LiveBlock]
    owners: dict[int, Owner]  # index of a segment event -> owner
    uncertain: frozenset[int] = frozenset()  # addresses of live blocks that may have a tail nothing tells of

    def with_tail(self, address: int, n_bytes: int) -> "StartState":
        """Return the same state with one block longer."""
        block = self.live[address]
        longer = replace(block, size=block.size + n_bytes)
        return replace(self, live={**self.live, address: longer})


def state_before(
    segments: Sequence[SegmentRecord], events: Sequence[Event], settings: AllocatorSettings, note: Callable[[str], None]
) -> StartState:
    """Undo the events one by one, from the last to the first, beginning with the final segments."""
    start = StartState({}, {}, {}, {})
    for segment in segments:
        owner = Owner(segment.stream, segment.is_small, segment.pool_id)
        if segment.is_expandable:
            _add_range(start.mapped.setdefault(owner, []), segment.address, segment.address + segment.size)
        else:
            start.segments[segment.address] = (segment.size, owner)
        start.live.update((block.address, block) for block in segment.live)
    owner_of_range = _range_owners(segments, events, settings)
    freed_at: dict[int, int] = {}  # live before the history, freed in it: its true size is not told
    for i in range(len(events) - 1, -1, -1):
        event = events[i]
        end = event.address + event.size
        match event.action:
            case "alloc":
                if start.live.pop(event.address, None) is None:
                    note(f"event {i} allocates a block that is missing afterwards: the history has gaps")
                freed_at.pop(event.address, None)
            case "free_completed":
                size = settings.round_size(event.size)
                start.live[event.address] = LiveBlock(event.address, size, event.size)
                freed_at[event.address] = i
            case "segment_alloc":
                fallback = (event.size, _guess_owner(event))
                start.owners[i] = start.segments.pop(event.address, fallback)[1]
            case "segment_free":
                start.owners[i] = _guess_owner(event)
                start.segments[event.address] = (event.size, start.owners[i])
            case "segment_map":
                start.owners[i] = owner_of_range(event)
                _cut_range(start.mapped.setdefault(start.owners[i], []), event.address, end)
            case "segment_unmap":
                start.owners[i] = owner_of_range(event)
                _add_range(start.mapped.setdefault(start.owners[i], []), event.address, end)
    return replace(start, uncertain=_find_tails(start, events, freed_at, settings))


def _guess_owner(event: Event) -> Owner:
    return Owner(event.stream, event.size == SMALL_SEGMENT_BYTES, event.pool_id or DEFAULT_POOL)


def _range_owners(
    segments: Sequence[SegmentRecord], events: Sequence[Event], settings: AllocatorSettings
) -> Callable[[Event], Owner]:
    """Return a function that names the owner of a range: told, or that of the nearest known range."""
    known = [(s.address, Owner(s.stream, s.is_small, s.pool_id)) for s in segments if s.is_expandable]
    page = settings.page_bytes(is_small=False)

    def owner(event: Event) -> Owner:
        is_small = event.size == SMALL_SEGMENT_BYTES or event.size % page != 0
        if event.action == "segment_unmap" and event.size % page == 0:
            near = [(abs(address - event.address), o.is_small) for address, o in known if o.stream == event.stream]
            is_small = min(near)[1] if near else False
        like = [
            (abs(a - event.address), o.pool_id) for a, o in known if (o.stream, o.is_small) == (event.stream, is_small)
        ]
        return Owner(event.stream, is_small, event.pool_id or (min(like)[1] if like else DEFAULT_POOL))

    known += [(event.address, owner(event)) for event in events if event.action == "segment_map"]
    return owner


def _add_range(ranges: list[tuple[int, int]], begin: int, end: int) -> None:
    touching = [r for r in ranges if r[0] <= end and begin <= r[1]]
    ranges[:] = sorted(
        [r for r in ranges if r not in touching]
        + [(min([begin, *(r[0] for r in touching)]), max([end, *(r[1] for r in touching)]))]
    )


def _cut_range(ranges: list[tuple[int, int]], begin: int, end: int) -> None:
    pieces = [piece for b, e in ranges for piece in ((b, min(e, begin)), (max(b, end), e))]
    ranges[:] = sorted((b, e) for b, e in pieces if b < e)


def _find_tails(
    start: StartState, events: Sequence[Event], freed_at: dict[int, int], settings: AllocatorSettings
) -> frozenset[int]:
    """Give old blocks of the large pool their true sizes (see the top of this module); returns the uncertain ones."""
    if settings.expandable_segments:
        return frozenset()  # then every rest from 512 B on is split off
    uncertain = set()
    allocations = sorted((event.address, i) for i, event in enumerate(events) if event.action == "alloc")
    starts = sorted(start.live)
    segment_starts = sorted(start.segments)
    for address, index in freed_at.items():
        block = start.live[address]
        where = bisect.bisect_right(segment_starts, address) - 1
        if block.size <= SMALL_REQUEST_BYTES or where < 0:
            continue
        end = address + block.size
        limit = segment_end = segment_starts[where] + start.segments[segment_starts[where]][0]
        after = bisect.bisect_right(starts, address)
        if after < len(starts):
            limit = min(limit, starts[after])
        is_oversize = block.size >= settings.max_split_bytes
        first = bisect.bisect_left(allocations, (end, 0))
        last = bisect.bisect_left(allocations, (min(end + SMALL_REQUEST_BYTES + 1, segment_end), 0))
        carved = [(i, at) for at, i in allocations[first:last] if i < index]
        if is_oversize or 0 < limit - end <= SMALL_REQUEST_BYTES:
            end = limit
        elif carved:
            end = min(carved)[1]
        elif limit > end:
            uncertain.add(address)
        start.live[address] = LiveBlock(address, max(end - address, block.size), block.requested)
    return frozenset(uncertain)
