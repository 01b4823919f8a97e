"""Replays a real GPU's memory snapshot: does our allocator choose what PyTorch chose.

:func:`replay_snapshot` rebuilds the state before the history (:mod:`glmlab.snapshots.initial_state`), then goes on:
for every allocation our allocator names the address, for every segment taken from or given back to the driver it says
whether and how large, and both are compared with what the history tells. After a difference it goes on from PyTorch's
choice, so that one difference is counted once.
"""

import bisect
from collections.abc import Sequence
from dataclasses import replace

from glmlab.allocator.caching import Block, CachingAllocator, Pool
from glmlab.allocator.config import (
    BLOCK_BYTES,
    DEFAULT_POOL,
    SMALL_REQUEST_BYTES,
    AllocatorError,
    AllocatorSettings,
)
from glmlab.core.units import format_bytes
from glmlab.snapshots.initial_state import Owner, StartState, state_before
from glmlab.snapshots.reader import (
    DeviceHistory,
    Event,
    SegmentRecord,
    Snapshot,
    read_snapshot,
)
from glmlab.snapshots.report import DeviceReport, ReplayReport
from glmlab.snapshots.unpickle import SnapshotError

__all__ = ["DeviceReport", "ReplayReport", "Snapshot", "SnapshotError", "read_snapshot", "replay_snapshot"]

_SEGMENT_ACTIONS = {"segment_alloc", "segment_free", "segment_map", "segment_unmap"}
_OTHER_ACTIONS = {"alloc", "free_requested", "free_completed", "oom", "snapshot", "user_defined"}


def replay_snapshot(snapshot: Snapshot) -> ReplayReport:
    """Replay the history of every GPU of a snapshot and compare each choice; see the top of this module."""
    return ReplayReport(tuple(_replay_device(snapshot, device) for device in snapshot.devices))


def _replay_device(snapshot: Snapshot, history: DeviceHistory) -> DeviceReport:
    if snapshot.settings is not None:
        return _replay_with(snapshot.settings, history, snapshot.has_garbage_collection)
    grows = any(s.is_expandable for s in history.segments) or any(e.action == "segment_map" for e in history.events)
    report = _replay_with(AllocatorSettings(expandable_segments=grows), history, False)
    report.note(f"the snapshot tells no allocator settings; taken: the defaults, expandable_segments {grows}")
    if report.is_equal:
        return report
    others = [AllocatorSettings(expandable_segments=grows, max_split_size_mb=n) for n in (32, 64, 128, 256, 512, 1024)]
    others += [AllocatorSettings(expandable_segments=grows, roundup_power2_divisions=n) for n in (2, 4, 8, 16, 32, 64)]
    for settings in others:
        other = _replay_with(settings, history, False)
        if other.is_equal:
            other.note(f"the snapshot tells no allocator settings; these explain every choice: {settings}")
            return other
    return report


def _replay_with(settings: AllocatorSettings, history: DeviceHistory, has_garbage_collection: bool) -> DeviceReport:
    report = DeviceReport(history.device)
    if has_garbage_collection:
        report.note("garbage_collection_threshold is set: which idle segments it released cannot be foreseen")
    events = _completed_frees(history.events, report)
    start = state_before(history.segments, events, settings, report.note)

    def forward(start: StartState) -> _Forward:
        run = _Forward(start, events, settings, replace(report, notes=[*report.notes]), has_garbage_collection)
        run.run(history.segments)
        return run

    best = forward(start)
    while best.tail is not None:
        start = start.with_tail(*best.tail)
        again = forward(start)
        if again.report.equal_addresses <= best.report.equal_addresses:
            break
        again.report.note("some blocks older than the history have tails that only PyTorch's later choices show")
        best = again
    return best.report


def _completed_frees(events: Sequence[Event], report: DeviceReport) -> Sequence[Event]:
    """Take requested frees for completed ones where the recording skipped the completed ones."""
    actions = {event.action for event in events}
    for action in sorted(actions - _SEGMENT_ACTIONS - _OTHER_ACTIONS):
        report.note(f"events {action!r} are unknown here and left out")
    if "free_completed" in actions or "free_requested" not in actions:
        return events
    report.note("the history has no completed frees; the requested ones are taken for them")
    return [
        Event("free_completed", e.address, e.size, e.stream, e.pool_id) if e.action == "free_requested" else e
        for e in events
    ]


class _Forward:
    """Replays the events of one device and compares the allocator's choices with them."""

    def __init__(
        self,
        start: StartState,
        events: Sequence[Event],
        settings: AllocatorSettings,
        report: DeviceReport,
        has_garbage_collection: bool,
    ) -> None:
        self.start, self.events, self.settings, self.report = start, events, settings, report
        self.has_garbage_collection = has_garbage_collection
        self.allocator = report.allocator = CachingAllocator(settings)
        self.live: dict[int, Block] = {}
        self.pending: list[int] = []  # segment events since the last allocation
        self.uncertain = set(start.uncertain)
        self.tail: tuple[int, int] | None = None  # address and bytes of a tail that would explain the first difference
        self._restore()
        owners = [owner for _, owner in start.segments.values()] + [*start.mapped, *start.owners.values()]
        self.has_private_pools = any(owner.pool_id != DEFAULT_POOL for owner in owners)

    def run(self, final: Sequence[SegmentRecord]) -> None:
        """Go through all events, then compare the state at the end."""
        for i, event in enumerate(self.events):
            try:
                self._step(i, event)
            except (AllocatorError, LookupError) as error:
                rest = sum(event.action == "alloc" for event in self.events[i:])
                self.report.allocations += rest
                self.report.differs(i, f"contradicts the events before it ({error})")
                self.report.note(
                    f"event {i} contradicts those before it: {rest} allocations from there on not compared"
                )
                return
        self._driver_events(None, 0)
        self._compare_end(final)

    def _step(self, i: int, event: Event) -> None:
        if event.action in _SEGMENT_ACTIONS:
            self.pending.append(i)
        elif event.action == "alloc":
            self._allocate(i, event)
        elif event.action == "free_completed":
            self._driver_events(None, 0)
            self._free(i, event)
        elif event.action == "oom":
            size = self.settings.round_size(event.size)
            self._driver_events(self.allocator.pool(size, event.stream), size)

    def _restore(self) -> None:
        added = [self._add_segment(owner, at, size) for at, (size, owner) in sorted(self.start.segments.items())]
        heads = [head for head in added if head is not None]
        for owner, ranges in self.start.mapped.items():
            if not ranges:
                continue
            head = self.allocator.add_expandable(self._pool(owner), self._base(owner, ranges))
            for begin, end in ranges:
                self._map(begin, end - begin)
            heads.append(head)
        order = sorted(heads, key=lambda head: head.address)
        addresses = [head.address for head in order]
        at: dict[int, Block | None] = {}  # where the search goes on, segment by segment
        for address in sorted(self.start.live):
            known = self.start.live[address]
            which = bisect.bisect_right(addresses, address) - 1
            block = at.get(which, order[which]) if which >= 0 else None
            while block is not None and block.end <= address:
                block = block.next
            placed = self.allocator.place_in(block, address, known.size) if block else None
            if placed is None:
                self.report.note(
                    f"a block at {address:#x} lies in no segment, or in another block: the history has gaps"
                )
            else:
                self.live[address] = at[which] = placed

    def _base(self, owner: Owner, ranges: list[tuple[int, int]]) -> int:
        """Where the address space of an expandable segment begins: the lowest address mapped while it lives."""
        base, n_bytes = ranges[0][0], sum(end - begin for begin, end in ranges)
        for i, event in enumerate(self.events):
            if event.action in ("segment_map", "segment_unmap") and self.start.owners[i] == owner:
                n_bytes += event.size if event.action == "segment_map" else -event.size
                base = min(base, event.address)
                if n_bytes <= 0:
                    break
        return base

    def _pool(self, owner: Owner) -> Pool:
        return self.allocator.pool(SMALL_REQUEST_BYTES + (not owner.is_small), owner.stream, owner.pool_id)

    def _allocate(self, i: int, event: Event) -> None:
        size = self.settings.round_size(event.size)
        pool = self.allocator.pool(size, event.stream, self._pool_id(event))
        choice = self._driver_events(pool, size, i)
        self.report.allocations += 1
        if choice is not None and choice.address == event.address:
            self.report.equal_addresses += 1
            self.live[event.address] = self.allocator.take(choice, size)
            return
        if self.report.first_difference is None and choice is not None:
            self.tail = self._tail_behind(choice, size)
        theirs = f"{format_bytes(event.size)} of stream {event.stream} at {event.address:#x}"
        ours = "asks the driver for a segment" if choice is None else f"takes {choice.address:#x} ({choice.size} B)"
        self.report.differs(i, f"PyTorch puts {theirs}, the replay {ours}")
        self._take_theirs(i, event, size)

    def _tail_behind(self, choice: Block, size: int) -> tuple[int, int] | None:
        """Return the tail of the block before the choice that would make the choice too small, if there can be one."""
        before, n_bytes = choice.prev, choice.size - size + BLOCK_BYTES
        if before is None or before.address not in self.uncertain or choice.size - n_bytes <= SMALL_REQUEST_BYTES:
            return None
        known = self.start.live[before.address]
        tail = before.size + n_bytes - self.settings.round_size(known.requested)
        return (before.address, n_bytes) if tail <= SMALL_REQUEST_BYTES else None

    def _take_theirs(self, i: int, event: Event, size: int) -> None:
        block = self.allocator.block_at(event.address)
        if block is not None and not block.live and block.mapped and not block.pool.is_small:
            rest = block.end - event.address - size
            size += rest if 0 < rest <= SMALL_REQUEST_BYTES and not self.settings.expandable_segments else 0
        while block is not None and block.address < event.address + size:
            if block.live:
                self.report.note(f"event {i} allocates over a live block: the history has gaps")
                self.live.pop(block.address, None)
                self.allocator.free(block)
                block = self.allocator.block_at(event.address)
            elif block.end >= event.address + size:
                break
            else:
                block = block.next
        placed = self.allocator.place(event.address, size)
        if placed is None:
            self.report.note(f"event {i} allocates outside every known segment: not comparable")
        else:
            self.live[event.address] = placed

    def _pool_id(self, event: Event) -> tuple[int, int]:
        if event.pool_id is not None:
            return event.pool_id
        if not self.has_private_pools:
            return DEFAULT_POOL
        added = [i for i in self.pending if self.events[i].action in ("segment_alloc", "segment_map")]
        if added:
            return self.start.owners[added[-1]].pool_id
        pool = self.allocator.pool_at(event.address)
        return DEFAULT_POOL if pool is None else pool.pool_id

    def _free(self, i: int, event: Event) -> None:
        block = self.live.pop(event.address, None)
        self.uncertain.discard(event.address)
        if block is None:
            self.report.note(f"event {i} frees a block that nothing allocated: the history has gaps")
        else:
            self.allocator.free(block)

    def _driver_events(self, pool: Pool | None, size: int, i: int | None = None) -> Block | None:
        """Compare and apply the pending segment events; returns the allocator's choice for the request behind them.

        ``pool`` and ``size`` are those of the request that caused the events, if one did; ``i`` is its index where it
        succeeded.
        """
        runs: list[list[int]] = []
        for index in self.pending:
            if runs and _kind(self.events[runs[-1][0]]) == _kind(self.events[index]):
                runs[-1].append(index)
            else:
                runs.append([index])
        self.pending = []
        choice = None if pool is None or runs else self.allocator.find(pool, size)
        for run in runs:
            match _kind(self.events[run[0]]):
                case "release":
                    self._released(run, pool, size)
                    choice = None if pool is None else self.allocator.find(pool, size)
                case "segment":
                    choice = self._added(run, pool, size, is_last=i is not None and run is runs[-1])
                case _:
                    choice = self._mapped(run, pool, size)
        return choice

    def _added(self, run: list[int], pool: Pool | None, size: int, is_last: bool) -> Block | None:
        """Compare the segments that the driver gave with what the allocator would have asked for."""
        block = None
        for n, index in enumerate(run):
            event = self.events[index]
            owner = self.start.owners[index]
            if pool is None or not is_last or n < len(run) - 1:
                self.report.note(f"event {index} adds a segment without an allocation behind it: not comparable")
            else:
                self.report.segments += 1
                idle = self.allocator.find(pool, size)
                asks = self.settings.segment_bytes(size)
                if idle is None and asks == event.size and not self.settings.expandable_segments:
                    self.report.equal_segments += 1
                else:
                    ours = f"asks for {asks} B" if idle is None else f"has the idle block {idle.address:#x}"
                    self.report.differs(index, f"PyTorch takes a segment of {event.size} B, the replay {ours}")
            block = self._add_segment(owner, event.address, event.size)
        return block

    def _add_segment(self, owner: Owner, address: int, size: int) -> Block | None:
        if not self.allocator.is_vacant(address, size):
            self.report.note(f"a segment at {address:#x} lies over another one: the history has gaps")
            return None
        return self.allocator.add_segment(self._pool(owner), address, size)

    def _mapped(self, run: list[int], pool: Pool | None, size: int) -> Block | None:
        """Compare the ranges mapped for one request with the allocator's plan."""
        events = [self.events[index] for index in run]
        target = self._pool(self.start.owners[run[0]])
        if pool is None:
            self.report.note(f"event {run[0]} maps memory without an allocation behind it: not comparable")
            plan = []
        else:
            plan = self._plan(pool, size)
        if self.allocator.hole_at(events[0].address) is None:  # a new address space, where the driver chose
            self.allocator.add_expandable(target, events[0].address)
            plan = self._plan(target, size) if pool is target and not plan else plan
        block = None
        for n, (index, event) in enumerate(zip(run, events, strict=True)):
            if pool is not None:
                self.report.segments += 1
                if n < len(plan) and plan[n] == (event.address, event.size):
                    self.report.equal_segments += 1
                else:
                    ours = f"maps {plan[n][1]} B at {plan[n][0]:#x}" if n < len(plan) else "maps nothing more"
                    theirs = f"maps {event.size} B at {event.address:#x}"
                    self.report.differs(index, f"PyTorch {theirs}, the replay {ours}")
            block = self._map(event.address, event.size)
        return block

    def _map(self, address: int, n_bytes: int) -> Block | None:
        try:
            return self.allocator.map(address, n_bytes)
        except AllocatorError:
            self.report.note(f"memory at {address:#x} is mapped twice: the history has gaps")
            return None

    def _plan(self, pool: Pool, size: int) -> list[tuple[int, int]]:
        expansion = None if self.allocator.find(pool, size) else self.allocator.expansion(pool, size)
        return [] if expansion is None else expansion[1]

    def _released(self, run: list[int], pool: Pool | None, size: int) -> None:
        """Compare the segments given back to the driver with what the allocator would release, and in which order."""
        events = [self.events[index] for index in run]
        theirs = [(event.address, event.size) for event in events]
        equal = 0
        if pool is not None and self.settings.max_split_size_mb is not None:
            first = self.allocator.releasable_for(pool, size)  # oversize blocks go first, and may be enough
            if first and theirs[: len(first)] == first:
                self._release(run[: len(first)])
                equal, run, theirs = len(first), run[len(first) :], theirs[len(first) :]
        expected: dict[Pool, list[tuple[int, int]]] = {}
        for address, _ in theirs:
            block = self.allocator.block_at(address)
            if block is not None and block.pool not in expected:
                same_owner = self.allocator.pools(block.pool.pool_id)
                expected.update((other, self.allocator.releasable(other)) for other in same_owner)
        wanted = [one for ranges in expected.values() for one in ranges]
        missing = set(wanted) - set(theirs)
        ordered = {one for ranges in expected.values() for one in _in_order(ranges, theirs)}
        self.report.equal_segments += equal + len(ordered)
        self.report.segments += equal + len(theirs) + len(missing)
        if missing and self.has_garbage_collection and not set(theirs) - set(wanted):
            self.report.segments -= len(missing)
        elif missing or len(ordered) < len(theirs):
            text = f"PyTorch gives back {len(theirs)} segments, the replay {len(wanted)}, {len(ordered)} of them equal"
            self.report.differs(run[0], text)
        self._release(run)

    def _release(self, run: list[int]) -> None:
        for index in run:
            event = self.events[index]
            try:
                self.allocator.release(event.address, event.size)
            except AllocatorError:
                self.report.note(f"event {index} gives back a segment that is still in use here: the history has gaps")

    def _compare_end(self, final: Sequence[SegmentRecord]) -> None:
        ours = self.allocator.segments()
        live = {(block.address, block.size) for segment in ours for block in segment.blocks if block.live}
        theirs = {(block.address, block.size) for segment in final for block in segment.live}
        segments = {(segment.address, segment.size) for segment in ours}
        self.report.equal_final_state = live == theirs and segments == {(s.address, s.size) for s in final}


def _kind(event: Event) -> str:
    return {"segment_alloc": "segment", "segment_map": "range"}.get(event.action, "release")


def _in_order(expected: Sequence[tuple[int, int]], found: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the expected ranges that come, among all expected ones found, at their place in the order."""
    theirs = [one for one in found if one in set(expected)]
    ours = [one for one in expected if one in set(found)]
    return [a for a, b in zip(ours, theirs, strict=False) if a == b]
