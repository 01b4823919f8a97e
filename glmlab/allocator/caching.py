"""PyTorch's CUDA caching allocator, replayed: which bytes it takes from the driver, and where it puts each tensor.

This is the readable form, one event at a time; ``glmlab.allocator.kernels`` does the same for millions of events. The
rules, in the order a request meets them (those of the native backend, ``c10/cuda/CUDACachingAllocator.cpp``):

1. A request rounds up to 512 B (or, with ``roundup_power2_divisions``, to a fraction of a power of two).
2. Up to 1 MiB it belongs to the small pool, above to the large pool; every stream has its own two pools.
3. The smallest inactive block that fits serves it, the lowest address among equals.
4. Without one, the driver is asked for a *segment*: 2 MiB for the small pool; for the large pool 20 MiB, or from 10 MiB
   on the request rounded up to 2 MiB.
5. If the driver has no memory left, inactive segments go back to it and it is asked again; then it is out of memory.
6. What is left of the block becomes an inactive block: from 512 B on in the small pool, above 1 MiB in the large pool.
   A smaller rest of the large pool stays with the tensor, unused.
7. A freed block is joined with inactive neighbours in its segment. Nothing goes back to the driver, except by rule 5,
   ``empty_cache()`` or garbage collection (not modelled: it needs a memory fraction to be set).

With ``expandable_segments`` a pool has one segment that grows: pages of 2 MiB (small pool) or 20 MiB (large pool) are
mapped at its end, or into holes that ``empty_cache()`` left.
"""

import bisect
from itertools import groupby

from glmlab.allocator.blocks import Block, BlockView, Pool, SegmentView
from glmlab.allocator.config import (
    BLOCK_BYTES,
    DEFAULT_POOL,
    EXPANDABLE_SPACE_BYTES,
    SMALL_REQUEST_BYTES,
    Addresses,
    AllocatorError,
    AllocatorSettings,
    OutOfMemory,
    round_up,
)
from glmlab.core.units import MIB


class CachingAllocator:
    """The allocator of one device, event by event.

    After each, ``allocated + inactive_small + inactive_large == reserved``.

    ``capacity_bytes`` is the device's memory (None: no limit), ``outside_bytes`` what the CUDA context and other
    programs hold of it, ``address_seed`` an order of the driver's addresses (see
    :class:`~glmlab.allocator.config.Addresses`).

    Example:
        >>> allocator = CachingAllocator()
        >>> weights, state = allocator.malloc(30 * 2**20), allocator.malloc(100)
        >>> allocator.reserved_bytes // 2**20, allocator.allocated_bytes - 30 * 2**20, str(state.pool)
        (32, 512, 'small pool of stream 0')
        >>> allocator.free(weights)
        >>> allocator.empty_cache()
        31457280
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        *,
        capacity_bytes: int | None = None,
        outside_bytes: int = 0,
        address_seed: int | None = None,
    ) -> None:
        self.settings = settings or AllocatorSettings()
        self.capacity_bytes, self.outside_bytes = capacity_bytes, outside_bytes
        self.reserved_bytes = self.allocated_bytes = self.allocated_small_bytes = 0
        self.peak_allocated_bytes = self.peak_allocated_small_bytes = 0  # the small pools' part at that moment
        self.segments_taken: list[tuple[int, bool]] = []  # bytes and whether small, of every segment or mapped range
        self._pools: dict[tuple[tuple[int, int], bool, int], Pool] = {}
        self._heads: list[Block] = []  # first block of every segment, by address
        self._spaces: dict[Pool, int] = {}  # where a pool's expandable segment lies
        self._addresses = Addresses(address_seed)

    # -- what a program asks ------------------------------------------------------------------------------------------

    def malloc(self, n_bytes: int, stream: int = 0, *, owner: int = 0) -> Block:
        """Give ``n_bytes`` a live block, which may be larger (rules 1 and 6).

        Raises:
            AllocatorError: not a positive size.
            OutOfMemory: the capacity does not allow it, even after inactive memory went back to the driver (rule 5).
        """
        if n_bytes <= 0:
            raise AllocatorError(f"cannot allocate {n_bytes} bytes: PyTorch asks its allocator for positive sizes only")
        size = self.settings.round_size(n_bytes)
        pool = self.pool(size, stream)
        block = self.find(pool, size) or self._ask_driver(pool, size)
        if block is None and self._release_for(pool, size):
            block = self._ask_driver(pool, size)
        if block is None:
            self.empty_cache()
            block = self._ask_driver(pool, size)
        if block is None:
            raise OutOfMemory(
                tried=self.settings.segment_bytes(size),
                capacity=self.capacity_bytes or 0,
                outside=self.outside_bytes,
                allocated=self.allocated_bytes,
                reserved=self.reserved_bytes,
            )
        block = self.take(block, size)
        block.owner = owner
        return block

    def free(self, block: Block) -> None:
        """Make a live block inactive (rule 7); :class:`AllocatorError` where it is not live."""
        if not block.live:
            raise AllocatorError(f"{block} is not live: freed twice?")
        block.live = False
        self.allocated_bytes -= block.size
        self.allocated_small_bytes -= block.size if block.pool.is_small else 0
        self._coalesce(block)

    def empty_cache(self) -> int:
        """Give every segment without a live block back to the driver; returns the bytes given back."""
        before = self.reserved_bytes
        for pool in self.pools(DEFAULT_POOL):
            for address, size in self.releasable(pool):
                self.release(address, size)
        return before - self.reserved_bytes

    def reset_peak(self) -> None:
        """Begin a new peak at the bytes allocated now."""
        self.peak_allocated_bytes, self.peak_allocated_small_bytes = self.allocated_bytes, self.allocated_small_bytes

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def reserved_small_bytes(self) -> int:
        """Bytes of the small pools' segments."""
        return self.allocated_small_bytes + self.inactive_small_bytes

    @property
    def inactive_small_bytes(self) -> int:
        """Inactive bytes of the small pools."""
        return sum(pool.inactive_bytes for pool in self._pools.values() if pool.is_small)

    @property
    def inactive_large_bytes(self) -> int:
        """Inactive bytes of the large pools."""
        return sum(pool.inactive_bytes for pool in self._pools.values() if not pool.is_small)

    def segments(self) -> list[SegmentView]:
        """Return every segment with its blocks, ordered by address."""
        views: list[SegmentView] = []
        for head in self._heads:
            for is_mapped, blocks in groupby(head.chain(), key=lambda block: block.mapped):
                if is_mapped:
                    shown = (BlockView(b.address, b.size, b.owner if b.live else 0, b.live) for b in blocks)
                    views.append(SegmentView.of(head.pool.is_small, head.pool.stream, shown))
        return views

    # -- its single steps, also for the replay of a snapshot ----------------------------------------------------------

    def pool(self, size: int, stream: int = 0, pool_id: tuple[int, int] = DEFAULT_POOL) -> Pool:
        """Return the pool that serves a rounded request."""
        key = (pool_id, size <= SMALL_REQUEST_BYTES, stream)
        if key not in self._pools:
            self._pools[key] = Pool(key[1], stream, pool_id)
        return self._pools[key]

    def pools(self, pool_id: tuple[int, int]) -> list[Pool]:
        """Return the pools of one owner, large ones first, as ``empty_cache()`` goes through them."""
        found = (pool for pool in self._pools.values() if pool.pool_id == pool_id)
        return sorted(found, key=lambda p: (p.is_small == (pool_id == DEFAULT_POOL), p.stream))

    def find(self, pool: Pool, size: int) -> Block | None:
        """Return the inactive block that serves a rounded request (rule 3), or None; changes nothing."""
        fits = (b for b in pool.at_least(size) if self.settings.expandable_segments or not b.is_expandable)
        block = next(fits, None)
        if block is None:
            return None
        if block.is_expandable:
            # The last block of a growing segment counts with what it can grow by, so others come first.
            for other in fits:
                if not block.is_expandable or other.growable_bytes >= block.growable_bytes:
                    break
                block = other
        limit = self.settings.max_split_bytes
        if size < limit <= block.size:
            return None
        if size >= limit and block.size >= size + self.settings.max_non_split_rounding_mb * MIB:
            return None
        return block

    def take(self, block: Block, size: int) -> Block:
        """Make the front of an inactive block live and leave the rest inactive (rule 6)."""
        block.pool.remove(block)
        rest = block.size - size
        if block.pool.is_small or self.settings.expandable_segments:
            is_split = rest >= BLOCK_BYTES
        else:
            is_split = size < self.settings.max_split_bytes and rest > SMALL_REQUEST_BYTES
        if is_split:
            block.pool.add(block.split(size))
        return self._make_live(block)

    def place(self, address: int, size: int, block: Block | None = None) -> Block | None:
        """Make an inactive range live wherever it lies; None where it is not all of it one inactive block.

        ``block`` is the one that contains the address, which saves the search.
        """
        block = block or self.block_at(address)
        if block is None or not block.is_inactive or address < block.address or block.end < address + size:
            return None
        return self._make_live(self._cut_out(block, address, size))

    def add_segment(self, pool: Pool, address: int, size: int) -> Block:
        """Add a segment that the driver gave; returns its one inactive block.

        :class:`AllocatorError` where another segment lies.
        """
        block = self._add_head(Block(address, size, pool, address, False))
        self._count_taken(pool, size)
        pool.add(block)
        return block

    def add_expandable(self, pool: Pool, address: int, space_bytes: int = EXPANDABLE_SPACE_BYTES) -> Block:
        """Add the address space of an expandable segment, nothing of it mapped.

        :class:`AllocatorError` where another segment lies.
        """
        block = self._add_head(Block(address, space_bytes, pool, address, True))
        block.mapped = False
        pool.add(block)
        return block

    def expansion(self, pool: Pool, size: int) -> tuple[Block, list[tuple[int, int]]] | None:
        """Return where a request goes in an expandable segment: its first block, and ranges (address, bytes) to map.

        None where no address space has the room.
        """
        page = self.settings.page_bytes(pool.is_small)
        for hole in pool.unmapped:
            start = hole.prev if hole.prev is not None and not hole.prev.live else hole
            have, ranges = 0, []
            for block in start.chain():
                if block.live or have >= size:
                    break
                n_bytes = block.size if block.mapped else round_up(min(size - have, block.size), page)
                if not block.mapped:
                    ranges.append((block.address, n_bytes))
                have += n_bytes
            if have >= size:
                return start, ranges
        return None

    def map(self, address: int, n_bytes: int) -> Block:
        """Back unmapped address space with memory; returns the inactive block it becomes part of.

        :class:`AllocatorError` where not all of the range is one unmapped block.
        """
        hole = self.block_at(address)
        if hole is None or hole.mapped or hole.end < address + n_bytes:
            raise AllocatorError(f"{n_bytes} B at {address:#x} are not unmapped address space")
        hole = self._cut_out(hole, address, n_bytes)
        hole.mapped = True
        self._count_taken(hole.pool, n_bytes)
        return self._coalesce(hole)

    def releasable(self, pool: Pool) -> list[tuple[int, int]]:
        """Return the ranges (address, bytes) of a pool that ``empty_cache()`` gives back, in its order."""
        whole, pages, page = [], [], self.settings.page_bytes(pool.is_small)
        for block in pool.inactive:
            if block.is_expandable:
                begin = block.base + round_up(block.address - block.base, page)
                if n_bytes := (block.end - begin) // page * page if begin < block.end else 0:
                    pages.append((begin, n_bytes))
            elif block.is_segment:
                whole.append((block.address, block.size))
        return whole + pages

    def releasable_for(self, pool: Pool, size: int) -> list[tuple[int, int]]:
        """Return the oversize blocks (address, bytes) that are released first when the driver has no memory left."""
        limit = self.settings.max_split_bytes
        oversize = [(block.address, block.size) for block in pool.at_least(limit) if not block.is_expandable]
        wanted = max(size, limit)
        if enough := next(((address, n) for address, n in oversize if n >= wanted), None):
            return [enough]
        ranges: list[tuple[int, int]] = []
        while oversize and sum(n for _, n in ranges) < wanted:
            ranges.append(oversize.pop())
        return ranges

    def release(self, address: int, n_bytes: int) -> None:
        """Give an inactive segment, or inactive pages of an expandable one, back to the driver.

        :class:`AllocatorError` where the range is neither.
        """
        block = self.block_at(address)
        is_part = block is not None and block.is_inactive and address + n_bytes <= block.end
        if block is None or not is_part or not (block.is_expandable or (block.is_segment and block.size == n_bytes)):
            raise AllocatorError(f"{n_bytes} B at {address:#x} are not inactive and cannot go back to the driver")
        self.reserved_bytes -= n_bytes
        block = self._cut_out(block, address, n_bytes)
        if block.is_expandable:
            block.mapped = False
            block = self._coalesce(block)
        if block.is_segment:
            if block.is_expandable:  # the whole address space goes back
                block.pool.remove(block)
            self._heads.remove(block)

    def block_at(self, address: int) -> Block | None:
        """Return the block that contains an address, or None."""
        i = bisect.bisect_right(self._heads, address, key=lambda head: head.address) - 1
        return next((b for b in self._heads[i].chain() if b.end > address), None) if i >= 0 else None

    # -- inside -------------------------------------------------------------------------------------------------------

    def _add_head(self, block: Block) -> Block:
        i = bisect.bisect_left(self._heads, block.address, key=lambda head: head.address)
        is_before_next = i == len(self._heads) or block.end <= self._heads[i].address
        if not is_before_next or self.block_at(block.address) is not None:
            raise AllocatorError(f"a segment at {block.address:#x} lies over another one")
        self._heads.insert(i, block)
        return block

    def _ask_driver(self, pool: Pool, size: int) -> Block | None:
        if self.settings.expandable_segments:
            return self._expand(pool, size)
        n_bytes = self.settings.segment_bytes(size)
        if not self._fits(n_bytes):
            return None
        return self.add_segment(pool, self._addresses.take(n_bytes), n_bytes)

    def _expand(self, pool: Pool, size: int) -> Block | None:
        if not pool.unmapped:
            if pool not in self._spaces:
                self._spaces[pool] = self._addresses.take(EXPANDABLE_SPACE_BYTES)
            self.add_expandable(pool, self._spaces[pool])
        plan = self.expansion(pool, size)
        if plan is None:
            return None
        block, ranges = plan
        for address, n_bytes in ranges:
            if not self._fits(n_bytes):
                return None
            block = self.map(address, n_bytes)
        return block

    def _fits(self, n_bytes: int) -> bool:
        limit = self.capacity_bytes
        return limit is None or self.reserved_bytes + n_bytes <= max(limit - self.outside_bytes, 0)

    def _release_for(self, pool: Pool, size: int) -> bool:
        """Release oversize blocks of this pool only, as many as the request needs (only with ``max_split_size_mb``)."""
        if self.settings.max_split_size_mb is None:
            return False
        ranges = self.releasable_for(pool, size)
        for address, n_bytes in ranges:
            self.release(address, n_bytes)
        return sum(n_bytes for _, n_bytes in ranges) >= max(size, self.settings.max_split_bytes)

    def _count_taken(self, pool: Pool, n_bytes: int) -> None:
        self.reserved_bytes += n_bytes
        self.segments_taken.append((n_bytes, pool.is_small))

    def _make_live(self, block: Block) -> Block:
        block.live = True
        self.allocated_bytes += block.size
        self.allocated_small_bytes += block.size if block.pool.is_small else 0
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.reset_peak()
        return block

    def _cut_out(self, block: Block, address: int, size: int) -> Block:
        """Take a part of a listed block out; what lies before and behind it stays listed."""
        block.pool.remove(block)
        if address > block.address:
            front, block = block, block.split(address - block.address)
            block.pool.add(front)
        if size < block.size:
            block.pool.add(block.split(size))
        return block

    def _coalesce(self, block: Block) -> Block:
        """Join a block that is neither live nor listed with its like neighbours, and list it; returns the whole."""
        before, after = block.prev, block.next
        if before is not None and not before.live and before.mapped == block.mapped:
            before.pool.remove(before)
            before.absorb_next()
            block = before
        if after is not None and not after.live and after.mapped == block.mapped:
            after.pool.remove(after)
            block.absorb_next()
        block.pool.add(block)
        return block
