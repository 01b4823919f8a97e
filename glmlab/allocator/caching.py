"""PyTorch's CUDA caching allocator, replayed: which bytes it takes from the driver, and where it puts each tensor.

This is the readable form, one event at a time; ``glmlab.allocator.kernels`` does the same for millions of events. The
rules, in the order a request meets them (those of the native backend, ``c10/cuda/CUDACachingAllocator.cpp``):

1. A request rounds up to 512 B (or, with ``roundup_power2_divisions``, to a fraction of a power of two).
2. Up to 1 MiB it belongs to the small pool, above to the large pool; every stream has its own two pools.
3. The smallest idle block that fits serves it, the lowest address among equals.
4. Without one, the driver is asked for a *segment*: 2 MiB for the small pool; for the large pool 20 MiB, or from 10 MiB
   on the request rounded up to 2 MiB.
5. If the driver has no memory left, idle segments go back to it and it is asked again; then it is out of memory.
6. What is left of the block becomes an idle block: from 512 B on in the small pool, above 1 MiB in the large pool. A
   smaller rest of the large pool stays with the tensor, unused.
7. A freed block melts with idle neighbours in its segment. Nothing goes back to the driver, except by rule 5,
   ``empty_cache()`` or garbage collection (not modelled: it needs a memory fraction to be set).

With ``expandable_segments`` a pool has one segment that grows: pages of 2 MiB (small pool) or 20 MiB (large pool) are
mapped at its end, or into holes that ``empty_cache()`` left.
"""

import bisect

from glmlab.allocator.addresses import Addresses
from glmlab.allocator.blocks import Block, BlockView, Pool, SegmentView, mapped_runs, room
from glmlab.allocator.config import (
    BLOCK_BYTES,
    DEFAULT_POOL,
    EXPANDABLE_SPACE_BYTES,
    SMALL_REQUEST_BYTES,
    AllocatorError,
    AllocatorSettings,
    OutOfMemory,
)
from glmlab.core.units import MIB

__all__ = [
    "AllocatorError",
    "AllocatorSettings",
    "Block",
    "BlockView",
    "CachingAllocator",
    "OutOfMemory",
    "Pool",
    "SegmentView",
]


class CachingAllocator:
    """The allocator of one device, event by event.

    After each, ``allocated + inactive_small + inactive_large == reserved``.

    ``capacity_bytes`` is the device's memory (None: no limit), ``outside_bytes`` what the CUDA context and other
    programs hold of it. Segments lie at rising addresses; with an ``address_seed`` each lies, by chance, above or below
    all others, which shows what depends on the driver's choice of addresses.

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
        self._heads: dict[int, Block] = {}  # first block of every segment, by address
        self._head_order: list[int] = []
        self._spaces: dict[Pool, int] = {}  # where a pool's expandable segment lies
        self._addresses = Addresses(address_seed)

    # -- what a program asks ------------------------------------------------------------------------------------------

    def malloc(self, n_bytes: int, stream: int = 0, *, owner: int = 0) -> Block:
        """Give ``n_bytes`` a live block, which may be larger (rules 1 and 6).

        Raises:
            AllocatorError: not a positive size.
            OutOfMemory: the capacity does not allow it, even after idle memory went back to the driver (rule 5).
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
                free=self.free_capacity_bytes,
                allocated=self.allocated_bytes,
                reserved=self.reserved_bytes,
            )
        block = self.take(block, size)
        block.owner = owner
        return block

    def free(self, block: Block) -> None:
        """Make a live block idle and melt it with idle neighbours; :class:`AllocatorError` where it is not live."""
        if not block.live:
            raise AllocatorError(f"{block} is not live: freed twice?")
        block.live = False
        self.allocated_bytes -= block.size
        self.allocated_small_bytes -= block.size if block.pool.is_small else 0
        block.pool.add(self._melt(block))

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
    def inactive_small_bytes(self) -> int:
        """Idle bytes of the small pools."""
        return sum(pool.free_bytes for pool in self._pools.values() if pool.is_small)

    @property
    def inactive_large_bytes(self) -> int:
        """Idle bytes of the large pools."""
        return sum(pool.free_bytes for pool in self._pools.values() if not pool.is_small)

    @property
    def free_capacity_bytes(self) -> int:
        """Bytes the driver can still give; meaningless without a capacity."""
        return max((self.capacity_bytes or 0) - self.outside_bytes - self.reserved_bytes, 0)

    def segments(self) -> list[SegmentView]:
        """Return every segment with its blocks, ordered by address."""
        views: list[SegmentView] = []
        for head in (self._heads[address] for address in self._head_order):
            for run in mapped_runs(head):
                blocks = tuple(BlockView(b.address, b.size, b.owner if b.live else 0, b.live) for b in run)
                name = "small" if head.pool.is_small else "large"
                size = run[-1].end - run[0].address
                views.append(SegmentView(run[0].address, size, name, head.pool.stream, blocks))
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
        """Return the idle block that serves a rounded request (rule 3), or None; changes nothing."""
        fits = pool.at_least(size)
        block = next(fits, None)
        while block is not None and block.is_expandable and not self.settings.expandable_segments:
            block = next(fits, None)
        if block is None:
            return None
        if block.is_expandable:
            # The last block of a growing segment counts with the room it can grow into, so others come first.
            for other in fits:
                if not block.is_expandable or room(other) >= room(block):
                    break
                block = other
        limit = self.settings.max_split_bytes
        if size < limit <= block.size:
            return None
        if size >= limit and block.size >= size + self.settings.max_non_split_rounding_mb * MIB:
            return None
        return block

    def take(self, block: Block, size: int) -> Block:
        """Make the front of an idle block live and leave the rest idle (rule 6)."""
        block.pool.remove(block)
        rest = block.size - size
        if block.pool.is_small or self.settings.expandable_segments:
            is_split = rest >= BLOCK_BYTES
        else:
            is_split = size < self.settings.max_split_bytes and rest > SMALL_REQUEST_BYTES
        if is_split:
            block.pool.add(self._split(block, size))
        block.live = True
        self.allocated_bytes += block.size
        self.allocated_small_bytes += block.size if block.pool.is_small else 0
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.reset_peak()
        return block

    def add_segment(self, pool: Pool, address: int, size: int) -> Block:
        """Add a segment that the driver gave; returns its one idle block."""
        block = self._add_head(Block(address, size, pool, address, False))
        self._grow(pool, size)
        pool.add(block)
        return block

    def add_expandable(self, pool: Pool, address: int, space_bytes: int = EXPANDABLE_SPACE_BYTES) -> Block:
        """Add the address space of an expandable segment; nothing is mapped yet."""
        block = self._add_head(Block(address, space_bytes, pool, address, True))
        block.mapped = False
        bisect.insort(pool.unmapped, block, key=lambda b: b.address)
        return block

    def expansion(self, pool: Pool, size: int) -> tuple[Block, list[tuple[int, int]]] | None:
        """Return where a request goes in an expandable segment: its first block, and ranges (address, bytes) to map.

        None where no address space has the room.
        """
        page = self.settings.page_bytes(pool.is_small)
        for hole in pool.unmapped:
            start = hole.prev if hole.prev is not None and not hole.prev.live else hole
            block: Block | None = start
            have, ranges = 0, []
            while block is not None and not block.live and have < size:
                if block.mapped:
                    have += block.size
                else:
                    n_bytes = -(-min(size - have, block.size) // page) * page
                    ranges.append((block.address, n_bytes))
                    have += n_bytes
                block = block.next
            if have >= size:
                return start, ranges
        return None

    def map(self, address: int, n_bytes: int) -> Block:
        """Back unmapped address space with memory; returns the idle block it becomes part of.

        :class:`AllocatorError` where not all of the range is one unmapped block.
        """
        hole = self.block_at(address)
        if hole is None or hole.mapped or hole.end < address + n_bytes:
            raise AllocatorError(f"{n_bytes} B at {address:#x} are not unmapped address space")
        if hole.address < address:
            hole = self._split(hole, address - hole.address)
        else:
            hole.pool.unmapped.remove(hole)
        if n_bytes < hole.size:
            bisect.insort(hole.pool.unmapped, self._split(hole, n_bytes), key=lambda b: b.address)
        hole.mapped = True
        self._grow(hole.pool, n_bytes)
        block = self._melt(hole)
        block.pool.add(block)
        return block

    def place(self, address: int, size: int) -> Block | None:
        """Make an idle range live wherever it lies; None where it is not idle (restores what is known)."""
        block = self.block_at(address)
        return None if block is None else self.place_in(block, address, size)

    def place_in(self, block: Block, address: int, size: int) -> Block | None:
        """Make a range of an idle block live; None where the block is not idle or not as large."""
        if block.live or not block.mapped or not block.address <= address or block.end < address + size:
            return None
        block.pool.remove(block)
        if address > block.address:
            front, block = block, self._split(block, address - block.address)
            front.pool.add(front)
        if size < block.size:
            block.pool.add(self._split(block, size))
        block.pool.add(block)
        return self.take(block, size)

    def releasable(self, pool: Pool) -> list[tuple[int, int]]:
        """Return the ranges (address, bytes) of a pool that ``empty_cache()`` gives back, in its order."""
        whole = [(b.address, b.size) for b in pool if not b.is_expandable and b.prev is None and b.next is None]
        page, pages = self.settings.page_bytes(pool.is_small), []
        for block in (b for b in pool if b.is_expandable):
            begin = block.base + -(-(block.address - block.base) // page) * page
            end = block.base + (block.end - block.base) // page * page
            if begin < end:
                pages.append((begin, end - begin))
        return whole + pages

    def release(self, address: int, n_bytes: int) -> None:
        """Give an idle segment, or idle pages of an expandable one, back to the driver.

        :class:`AllocatorError` where not all of the range is one idle block.
        """
        block = self.block_at(address)
        if block is None or block.live or not block.mapped or block.end < address + n_bytes:
            raise AllocatorError(f"{n_bytes} B at {address:#x} are not idle and cannot go back to the driver")
        pool = block.pool
        pool.remove(block)
        self.reserved_bytes -= n_bytes
        if not block.is_expandable:
            self._drop_head(block)
            return
        if address > block.address:
            front, block = block, self._split(block, address - block.address)
            pool.add(front)
        if n_bytes < block.size:
            pool.add(self._split(block, n_bytes))
        block.mapped = False
        hole = self._melt(block)
        if hole.prev is None and hole.next is None:
            self._drop_head(hole)  # the whole address space goes back
        else:
            bisect.insort(pool.unmapped, hole, key=lambda b: b.address)

    def block_at(self, address: int) -> Block | None:
        """Return the block that contains an address, or None."""
        block = self._head_at(address)
        while block is not None and block.end <= address:
            block = block.next
        return block

    def hole_at(self, address: int) -> Block | None:
        """Return the unmapped block that contains an address, or None."""
        block = self.block_at(address)
        return None if block is None or block.mapped else block

    def is_vacant(self, address: int, size: int) -> bool:
        """Whether no segment lies in a range."""
        after = bisect.bisect_left(self._head_order, address)
        is_before_next = after == len(self._head_order) or self._head_order[after] >= address + size
        return is_before_next and self.block_at(address) is None

    def pool_at(self, address: int) -> Pool | None:
        """Return the pool that owns the segment next below an address, or None."""
        head = self._head_at(address)
        return None if head is None else head.pool

    # -- inside -------------------------------------------------------------------------------------------------------

    def _head_at(self, address: int) -> Block | None:
        i = bisect.bisect_right(self._head_order, address) - 1
        return self._heads[self._head_order[i]] if i >= 0 else None

    def _add_head(self, block: Block) -> Block:
        self._heads[block.address] = block
        bisect.insort(self._head_order, block.address)
        return block

    def _drop_head(self, block: Block) -> None:
        del self._heads[block.address]
        del self._head_order[bisect.bisect_left(self._head_order, block.address)]

    def _ask_driver(self, pool: Pool, size: int) -> Block | None:
        if self.settings.expandable_segments:
            return self._expand(pool, size)
        n_bytes = self.settings.segment_bytes(size)
        if not self._fits(n_bytes):
            return None
        return self.add_segment(pool, self._addresses.take(n_bytes), n_bytes)

    def _expand(self, pool: Pool, size: int) -> Block | None:
        page = self.settings.page_bytes(pool.is_small)
        plan = self.expansion(pool, size)
        if plan is None:
            if pool not in self._spaces:
                self._spaces[pool] = self._addresses.take(EXPANDABLE_SPACE_BYTES)
            block = self.add_expandable(pool, self._spaces[pool])
            plan = block, [(block.address, -(-size // page) * page)]
        block, ranges = plan
        for address, n_bytes in ranges:
            if not self._fits(n_bytes):
                return None
            block = self.map(address, n_bytes)
        return block

    def _grow(self, pool: Pool, n_bytes: int) -> None:
        self.reserved_bytes += n_bytes
        self.segments_taken.append((n_bytes, pool.is_small))

    def _fits(self, n_bytes: int) -> bool:
        return self.capacity_bytes is None or n_bytes <= self.free_capacity_bytes

    def _release_for(self, pool: Pool, size: int) -> bool:
        """Release oversize blocks of this pool only, as many as the request needs (only with ``max_split_size_mb``)."""
        if self.settings.max_split_size_mb is None:
            return False
        ranges = self.releasable_for(pool, size)
        for address, n_bytes in ranges:
            self.release(address, n_bytes)
        return sum(n_bytes for _, n_bytes in ranges) >= max(size, self.settings.max_split_bytes)

    def releasable_for(self, pool: Pool, size: int) -> list[tuple[int, int]]:
        """Return the oversize blocks (address, bytes) that are released first when the driver has no memory left."""
        wanted = max(size, self.settings.max_split_bytes)
        block = next(pool.at_least(wanted), None)
        if block is not None and not block.is_expandable:
            return [(block.address, block.size)]
        ranges: list[tuple[int, int]] = []
        for block in pool.below(1 << 62):
            if block.size < self.settings.max_split_bytes or sum(n for _, n in ranges) >= wanted:
                break
            if not block.is_expandable:
                ranges.append((block.address, block.size))
        return ranges

    def _split(self, block: Block, size: int) -> Block:
        """Cut a block behind ``size`` bytes; returns the new block behind the cut."""
        rest = Block(block.address + size, block.size - size, block.pool, block.base, block.is_expandable)
        rest.mapped, rest.prev, rest.next = block.mapped, block, block.next
        if rest.next is not None:
            rest.next.prev = rest
        block.size, block.next = size, rest
        return rest

    def _melt(self, block: Block) -> Block:
        """Join a block that is neither live nor in a list with its like neighbours; returns the joined block."""
        if block.prev is not None and not block.prev.live and block.prev.mapped == block.mapped:
            block = block.prev
            self._leave_list(block)
            self._absorb_next(block)
        if block.next is not None and not block.next.live and block.next.mapped == block.mapped:
            self._leave_list(block.next)
            self._absorb_next(block)
        return block

    def _leave_list(self, block: Block) -> None:
        if block.mapped:
            block.pool.remove(block)
        else:
            block.pool.unmapped.remove(block)

    def _absorb_next(self, block: Block) -> None:
        gone = block.next
        assert gone is not None
        block.size += gone.size
        block.next = gone.next
        if block.next is not None:
            block.next.prev = block
