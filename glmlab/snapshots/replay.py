"""Replays a real GPU's memory snapshot: does our allocator choose what PyTorch chose.

:func:`replay_snapshot` rebuilds the state before the history (:mod:`glmlab.snapshots.initial_state`). Then our
allocator names the address of every allocation, and says for every segment taken from or given back to the driver
whether and how large; both are compared with the history. After a difference the replay continues from PyTorch's
choice, so that one difference counts once.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

from glmlab.allocator.blocks import Block, Pool
from glmlab.allocator.caching import CachingAllocator
from glmlab.allocator.config import DEFAULT_POOL, SMALL_REQUEST_BYTES, AllocatorError, AllocatorSettings
from glmlab.core.units import format_bytes
from glmlab.snapshots.initial_state import InitialState, PoolKey, state_before
from glmlab.snapshots.reader import DeviceHistory, Event, Snapshot

_KINDS = {"segment_alloc": "segment", "segment_map": "range", "segment_free": "release", "segment_unmap": "release"}
_OTHER_ACTIONS = {"alloc", "free_requested", "free_completed", "oom", "snapshot", "user_defined"}


@dataclass
class DeviceReport:
    """What was compared on one GPU; ``notes`` says what could not be compared, and why."""

    device: int
    allocations: int = 0
    equal_addresses: int = 0
    segments: int = 0
    equal_segments: int = 0
    first_difference: str | None = None
    equal_final_state: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        """Whether every address and every segment event is the allocator's choice."""
        return self.allocations == self.equal_addresses and self.segments == self.equal_segments

    def note(self, text: str) -> None:
        """Add a note, each one once."""
        if text not in self.notes:
            self.notes.append(text)

    def differs(self, index: int, text: str) -> None:
        """Keep the first difference only."""
        self.first_difference = self.first_difference or f"device {self.device}, event {index}: {text}"

    def __str__(self) -> str:
        lines = [
            f"device {self.device}: {self.equal_addresses} of {self.allocations} addresses and {self.equal_segments} "
            f"of {self.segments} segment events equal; final state {'equal' if self.equal_final_state else 'differs'}"
        ]
        if self.first_difference:
            lines.append(f"  first difference: {self.first_difference}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class ReplayReport:
    """The comparison, device by device and in sum."""

    devices: tuple[DeviceReport, ...]

    @property
    def is_equal(self) -> bool:
        """Whether every address and every segment event is the allocator's choice."""
        return all(device.is_equal for device in self.devices)

    def as_dict(self) -> dict[str, Any]:
        """Return what ``glmlab replay --json`` prints."""
        names = ("allocations", "equal_addresses", "segments", "equal_segments")
        return {
            **{name: sum(getattr(device, name) for device in self.devices) for name in names},
            "first_difference": next((d.first_difference for d in self.devices if d.first_difference), None),
            "devices": [asdict(device) for device in self.devices],
        }

    def __str__(self) -> str:
        return "\n".join(map(str, self.devices))


def replay_snapshot(snapshot: Snapshot) -> ReplayReport:
    """Replay the history of every GPU of a snapshot and compare each choice; see the top of this module."""
    return ReplayReport(tuple(_HistoryReplay(snapshot, history).run() for history in snapshot.devices))


class _HistoryReplay:
    """Replays the events of one device and compares the allocator's choices with them."""

    def __init__(self, snapshot: Snapshot, history: DeviceHistory) -> None:
        self.history, self.has_garbage_collection = history, snapshot.has_garbage_collection
        self.report = DeviceReport(history.device)
        self.settings = snapshot.settings or self._guessed_settings()
        if self.has_garbage_collection:
            self.report.note(
                "garbage_collection_threshold is set: which inactive segments it released cannot be foreseen"
            )
        self.events = self._completed_frees()
        self.start: InitialState = state_before(history.segments, self.events, self.settings, self.report.note)
        pools = [*self.start.mapped, *self.start.pools.values(), *(pool for _, pool in self.start.segments.values())]
        self.has_private_pools = any(pool.pool_id != DEFAULT_POOL for pool in pools)
        self.allocator = CachingAllocator(self.settings)
        self.live: dict[int, Block] = {}
        self.pending: list[int] = []  # segment events since the last allocation

    def run(self) -> DeviceReport:
        """Go through all events, then compare the state at the end."""
        self._restore()
        for i, event in enumerate(self.events):
            if event.action in _KINDS:
                self.pending.append(i)
            elif event.action == "alloc":
                self._allocate(i, event)
            elif event.action == "free_completed":
                self._driver_events()
                self._free(i, event)
            elif event.action == "oom":
                size = self.settings.round_size(event.size)
                self._driver_events(self.allocator.pool(size, event.stream), size)
        self._driver_events()
        self._compare_end()
        if self.start.unknown_tails and not self.report.is_equal:
            self.report.note(
                f"{self.start.unknown_tails} blocks older than the history may be up to 1 MiB longer than it shows, "
                "which can explain a difference behind them"
            )
        return self.report

    def _guessed_settings(self) -> AllocatorSettings:
        events, segments = self.history.events, self.history.segments
        grows = any(s.is_expandable for s in segments) or any(e.action == "segment_map" for e in events)
        self.report.note(
            f"the snapshot has no allocator settings; the replay takes the defaults, expandable_segments {grows}"
        )
        return AllocatorSettings(expandable_segments=grows)

    def _completed_frees(self) -> Sequence[Event]:
        """Take requested frees for completed ones where the recording skipped the completed ones."""
        events = self.history.events
        actions = {event.action for event in events}
        for action in sorted(actions - _KINDS.keys() - _OTHER_ACTIONS):
            self.report.note(f"events {action!r} are unknown here and left out")
        if "free_completed" in actions or "free_requested" not in actions:
            return events
        self.report.note("the history has no completed frees; the requested ones are taken for them")
        return [replace(e, action="free_completed") if e.action == "free_requested" else e for e in events]

    # -- the state before the history ---------------------------------------------------------------------------------

    def _restore(self) -> None:
        for address, (size, pool) in sorted(self.start.segments.items()):
            self._attempt(self.allocator.add_segment, self._pool(pool), address, size)
        for begin, end in (one for ranges in self.start.mapped.values() for one in ranges):
            if self.allocator.block_at(begin) is None:
                self._add_space(begin)
            self._attempt(self.allocator.map, begin, end - begin)
        block: Block | None = None  # what is left behind the last one placed
        for address, size in sorted(self.start.live.items()):
            if block is None or not block.address <= address < block.end:
                block = self.allocator.block_at(address)
            placed = None if block is None else self.allocator.place(address, size, block)
            if placed is None:
                self.report.note(
                    f"a block at {address:#x} lies in no segment, or in another block: the history has gaps"
                )
            else:
                self.live[address], block = placed, placed.next

    def _pool(self, key: PoolKey) -> Pool:
        return self.allocator.pool(SMALL_REQUEST_BYTES + (not key.is_small), key.stream, key.pool_id)

    # -- allocations and frees ----------------------------------------------------------------------------------------

    def _allocate(self, i: int, event: Event) -> None:
        size = self.settings.round_size(event.size)
        pool = self.allocator.pool(size, event.stream, self._pool_id(event))
        choice = self._driver_events(pool, size, is_allocation=True)
        self.report.allocations += 1
        if choice is not None and choice.address == event.address:
            self.report.equal_addresses += 1
            self.live[event.address] = self.allocator.take(choice, size)
            return
        theirs = f"{format_bytes(event.size)} of stream {event.stream} at {event.address:#x}"
        ours = "asks the driver for a segment" if choice is None else f"takes {choice.address:#x} ({choice.size} B)"
        self.report.differs(i, f"PyTorch puts {theirs}, the replay {ours}")
        self._take_theirs(i, event.address, size)

    def _take_theirs(self, i: int, address: int, size: int) -> None:
        """Make the block that PyTorch chose live."""
        block = self.allocator.block_at(address)
        if block is not None and block.is_inactive and not block.pool.is_small:
            rest = block.end - address - size
            size += rest if 0 < rest <= SMALL_REQUEST_BYTES and not self.settings.expandable_segments else 0
        for other in [] if block is None else [b for b in block.chain() if b.live and b.address < address + size]:
            self.report.note(f"event {i} allocates over a live block: the history has gaps")
            self.live.pop(other.address, None)
            self.allocator.free(other)
        placed = self.allocator.place(address, size)
        if placed is None:
            self.report.note(f"event {i} allocates outside every known segment: not comparable")
        else:
            self.live[address] = placed

    def _pool_id(self, event: Event) -> tuple[int, int]:
        if event.pool_id is not None or not self.has_private_pools:
            return event.pool_id or DEFAULT_POOL
        added = [i for i in self.pending if _KINDS[self.events[i].action] != "release"]
        if added:
            return self.start.pools[added[-1]].pool_id
        block = self.allocator.block_at(event.address)
        return DEFAULT_POOL if block is None else block.pool.pool_id

    def _free(self, i: int, event: Event) -> None:
        block = self.live.pop(event.address, None)
        if block is None:
            self.report.note(f"event {i} frees a block that nothing allocated: the history has gaps")
        else:
            self.allocator.free(block)

    # -- segments taken from the driver and given back ----------------------------------------------------------------

    def _driver_events(self, pool: Pool | None = None, size: int = 0, is_allocation: bool = False) -> Block | None:
        """Compare and apply the pending segment events; returns the allocator's choice for the request behind them.

        ``pool`` and ``size`` are those of the request that caused the events, if one did.
        """
        runs = groupby(self.pending, key=lambda i: _KINDS[self.events[i].action])
        groups, self.pending = [(kind, list(run)) for kind, run in runs], []
        choice = None if pool is None or groups else self.allocator.find(pool, size)
        for n, (kind, indices) in enumerate(groups, 1):
            if kind == "release":
                self._released(indices, pool, size)
                choice = None if pool is None else self.allocator.find(pool, size)
            elif kind == "segment":
                choice = self._added(indices, pool if is_allocation and n == len(groups) else None, size)
            else:
                choice = self._mapped(indices, pool, size)
        return choice

    def _added(self, indices: list[int], pool: Pool | None, size: int) -> Block | None:
        """Compare the segment that the driver gave with what the allocator would have asked for."""
        block = None
        for index in indices:
            event = self.events[index]
            if pool is None or index != indices[-1]:
                self.report.note(f"event {index} adds a segment without an allocation behind it: not comparable")
            else:
                found, asks = self.allocator.find(pool, size), self.settings.segment_bytes(size)
                is_equal = found is None and asks == event.size and not self.settings.expandable_segments
                ours = f"asks for {asks} B" if found is None else f"has the inactive block {found.address:#x}"
                self._count(index, is_equal, f"PyTorch takes a segment of {event.size} B, the replay {ours}")
            target = self._pool(self.start.pools[index])
            block = self._attempt(self.allocator.add_segment, target, event.address, event.size)
        return block

    def _mapped(self, indices: list[int], pool: Pool | None, size: int) -> Block | None:
        """Compare the ranges mapped for one request with the allocator's plan."""
        first, plan = self.events[indices[0]].address, self._plan(pool, size)
        if pool is None:
            self.report.note(f"event {indices[0]} maps memory without an allocation behind it: not comparable")
        if self.allocator.block_at(first) is None:  # a new address space, where the driver chose
            self._add_space(first)
            plan = plan or self._plan(pool, size)
        block = None
        for n, index in enumerate(indices):
            event = self.events[index]
            if pool is not None:
                ours = f"maps {plan[n][1]} B at {plan[n][0]:#x}" if n < len(plan) else "maps nothing more"
                theirs = f"maps {event.size} B at {event.address:#x}"
                self._count(index, ours == theirs, f"PyTorch {theirs}, the replay {ours}")
            block = self._attempt(self.allocator.map, event.address, event.size)
        return block

    def _plan(self, pool: Pool | None, size: int) -> list[tuple[int, int]]:
        if pool is None or self.allocator.find(pool, size) is not None:
            return []
        expansion = self.allocator.expansion(pool, size)
        return [] if expansion is None else expansion[1]

    def _released(self, indices: list[int], pool: Pool | None, size: int) -> None:
        """Compare the ranges given back to the driver with those that the allocator gives back, and their order."""
        theirs = list(dict.fromkeys((self.events[i].address, self.events[i].size) for i in indices))
        ours = self._releases(theirs, pool, size)
        both = set(ours) & set(theirs)
        if self.has_garbage_collection:  # how many it releases cannot be foreseen
            ours = [one for one in ours if one in both]
        in_order = zip((one for one in ours if one in both), (one for one in theirs if one in both), strict=True)
        n_equal, n_all = sum(a == b for a, b in in_order), len(set(ours) | set(theirs))
        self.report.segments += n_all
        self.report.equal_segments += n_equal
        if n_equal < n_all:
            counts = f"PyTorch gives back {len(theirs)} segments, the replay {len(ours)}, {n_equal} of them equal"
            self.report.differs(indices[0], counts)
        for address, n_bytes in theirs:
            self._attempt(self.allocator.release, address, n_bytes)

    def _releases(self, theirs: list[tuple[int, int]], pool: Pool | None, size: int) -> list[tuple[int, int]]:
        """Return what the allocator gives back: oversize blocks, which may be enough, then all that is inactive."""
        first = []
        if pool is not None and self.settings.max_split_size_mb is not None:
            first = self.allocator.releasable_for(pool, size)
        if first and first == theirs:
            return first
        blocks = [self.allocator.block_at(address) for address, _ in theirs]
        pool_ids = dict.fromkeys(block.pool.pool_id for block in blocks if block is not None)
        pools = [other for pool_id in pool_ids for other in self.allocator.pools(pool_id)]
        everything = [one for other in pools for one in self.allocator.releasable(other)]
        if theirs[: len(first)] != first:
            return everything
        return first + [one for one in everything if one not in first]

    def _add_space(self, address: int) -> None:
        """Add the address space that contains an address."""
        base = max(base for base in self.start.spaces if base <= address)
        pool = self._pool(self.start.spaces[base])
        self._attempt(self.allocator.add_expandable, pool, base, self.start.space_bytes)

    def _count(self, index: int, is_equal: bool, difference: str) -> None:
        self.report.segments += 1
        self.report.equal_segments += is_equal
        if not is_equal:
            self.report.differs(index, difference)

    def _attempt(self, step: Callable[..., Block | None], *arguments: Any) -> Block | None:
        """Run a step of the allocator; note where what the history says cannot be."""
        try:
            return step(*arguments)
        except AllocatorError as error:
            self.report.note(f"{error}: the history has gaps")
            return None

    def _compare_end(self) -> None:
        ours, final = self.allocator.segments(), self.history.segments
        live = {(block.address, block.size) for segment in ours for block in segment.blocks if block.live}
        segments = {(segment.address, segment.size) for segment in ours}
        self.report.equal_final_state = live == {block for segment in final for block in segment.live} and (
            segments == {(segment.address, segment.size) for segment in final}
        )
