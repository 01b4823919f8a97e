"""Blocks and pools: what PyTorch's CUDA caching allocator keeps its memory in."""

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


class Block:
    """A part of a segment: live (a tensor's), inactive or, in an expandable segment, not mapped; sizes in bytes."""

    __slots__ = ("address", "base", "is_expandable", "live", "mapped", "next", "owner", "pool", "prev", "size")

    def __init__(self, address: int, size: int, pool: "Pool", base: int, is_expandable: bool) -> None:
        self.address, self.size, self.pool, self.base, self.is_expandable = address, size, pool, base, is_expandable
        self.prev: Block | None = None
        self.next: Block | None = None
        self.live, self.mapped, self.owner = False, True, 0

    def __repr__(self) -> str:
        state = "live" if self.live else "inactive" if self.mapped else "unmapped"
        return f"Block({self.address:#x}, {self.size} B, {state}, {self.pool})"

    @property
    def end(self) -> int:
        """First address behind the block."""
        return self.address + self.size

    @property
    def is_inactive(self) -> bool:
        """Whether the block can serve a request."""
        return self.mapped and not self.live

    @property
    def is_segment(self) -> bool:
        """Whether the block is all of its segment."""
        return self.prev is None and self.next is None

    @property
    def growable_bytes(self) -> int:
        """Bytes of the block with those that its segment can map behind it."""
        return self.size + (self.next.size if self.next is not None and not self.next.mapped else 0)

    def chain(self) -> Iterator["Block"]:
        """Return this block and those behind it in its segment."""
        block: Block | None = self
        while block is not None:
            yield block
            block = block.next

    def split(self, size: int) -> "Block":
        """Cut the block behind ``size`` bytes; returns the new block behind the cut."""
        rest = Block(self.address + size, self.size - size, self.pool, self.base, self.is_expandable)
        rest.mapped, rest.prev, rest.next = self.mapped, self, self.next
        if rest.next is not None:
            rest.next.prev = rest
        self.size, self.next = size, rest
        return rest

    def absorb_next(self) -> None:
        """Join the block with the one behind it."""
        gone = self.next
        assert gone is not None
        self.size += gone.size
        self.next = gone.next
        if self.next is not None:
            self.next.prev = self


def _by_size(block: Block) -> tuple[int, int]:
    return block.size, block.address


def _by_address(block: Block) -> int:
    return block.address


class Pool:
    """Inactive blocks of one stream, small or large, by size, then address; and unmapped ones, by address."""

    def __init__(self, is_small: bool, stream: int, pool_id: tuple[int, int]) -> None:
        self.is_small, self.stream, self.pool_id = is_small, stream, pool_id
        self.inactive_bytes = 0
        self.inactive: list[Block] = []
        self.unmapped: list[Block] = []

    def __repr__(self) -> str:
        return f"{'small' if self.is_small else 'large'} pool of stream {self.stream}"

    def add(self, block: Block) -> None:
        """Take in a block that is not live."""
        if block.mapped:
            bisect.insort(self.inactive, block, key=_by_size)
            self.inactive_bytes += block.size
        else:
            bisect.insort(self.unmapped, block, key=_by_address)

    def remove(self, block: Block) -> None:
        """Give up a block, which must not have changed since it was added."""
        if block.mapped:
            del self.inactive[bisect.bisect_left(self.inactive, _by_size(block), key=_by_size)]
            self.inactive_bytes -= block.size
        else:
            self.unmapped.remove(block)

    def at_least(self, size: int) -> Iterator[Block]:
        """Return inactive blocks of ``size`` and over, best fit first."""
        for i in range(bisect.bisect_left(self.inactive, (size, 0), key=_by_size), len(self.inactive)):
            yield self.inactive[i]


@dataclass(frozen=True)
class BlockView:
    """One block of a map of the pools."""

    address: int
    size: int
    owner: int  # who asked for it, as told to malloc; 0 for an inactive block
    live: bool


@dataclass(frozen=True)
class SegmentView:
    """One segment (or one mapped range of an expandable segment) with its blocks, by address."""

    address: int
    size: int
    pool: str
    stream: int
    blocks: tuple[BlockView, ...]

    @classmethod
    def of(cls, is_small: bool, stream: int, blocks: Iterable[BlockView]) -> "SegmentView":
        """Return the view of blocks that lie one behind the other."""
        blocks = tuple(blocks)
        size = sum(block.size for block in blocks)
        return cls(blocks[0].address, size, "small" if is_small else "large", stream, blocks)
