"""Blocks and pools: what PyTorch's CUDA caching allocator keeps its memory in."""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass


class Block:
    """A part of a segment: live (a tensor's), idle, or, in an expandable segment, not mapped; sizes in bytes."""

    __slots__ = ("address", "base", "is_expandable", "live", "mapped", "next", "owner", "pool", "prev", "size")

    def __init__(self, address: int, size: int, pool: "Pool", base: int, is_expandable: bool) -> None:
        self.address, self.size, self.pool, self.base, self.is_expandable = address, size, pool, base, is_expandable
        self.prev: Block | None = None
        self.next: Block | None = None
        self.live, self.mapped, self.owner = False, True, 0

    def __repr__(self) -> str:
        state = "live" if self.live else "idle" if self.mapped else "unmapped"
        return f"Block({self.address:#x}, {self.size} B, {state}, {self.pool})"

    @property
    def end(self) -> int:
        """First address behind the block."""
        return self.address + self.size


class Pool:
    """Idle blocks of one stream, small or large, ordered by size, then address."""

    def __init__(self, is_small: bool, stream: int, pool_id: tuple[int, int]) -> None:
        self.is_small, self.stream, self.pool_id = is_small, stream, pool_id
        self.free_bytes = 0
        self.unmapped: list[Block] = []  # by address
        self._order: list[tuple[int, int]] = []
        self._blocks: dict[int, Block] = {}

    def __repr__(self) -> str:
        return f"{'small' if self.is_small else 'large'} pool of stream {self.stream}"

    def __iter__(self) -> Iterator[Block]:
        return (self._blocks[address] for _, address in list(self._order))

    def add(self, block: Block) -> None:
        """Take in an idle block."""
        bisect.insort(self._order, (block.size, block.address))
        self._blocks[block.address] = block
        self.free_bytes += block.size

    def remove(self, block: Block) -> None:
        """Give up an idle block."""
        del self._order[bisect.bisect_left(self._order, (block.size, block.address))]
        del self._blocks[block.address]
        self.free_bytes -= block.size

    def at_least(self, size: int) -> Iterator[Block]:
        """Idle blocks of ``size`` and over, best fit first."""
        for i in range(bisect.bisect_left(self._order, (size,)), len(self._order)):
            yield self._blocks[self._order[i][1]]

    def below(self, size: int) -> list[Block]:
        """Idle blocks under ``size``, largest first."""
        return [
            self._blocks[address] for _, address in reversed(self._order[: bisect.bisect_left(self._order, (size,))])
        ]


@dataclass(frozen=True)
class BlockView:
    """One block of a map of the pools."""

    address: int
    size: int
    owner: int  # who asked for it, as told to malloc; 0 for an idle block
    live: bool


@dataclass(frozen=True)
class SegmentView:
    """One segment (or one mapped range of an expandable segment) with its blocks, by address."""

    address: int
    size: int
    pool: str
    stream: int
    blocks: tuple[BlockView, ...]


def room(block: Block) -> int:
    """Return the bytes a block has, with what its segment can grow behind it."""
    return block.size + (block.next.size if block.next is not None and not block.next.mapped else 0)


def mapped_runs(head: Block) -> Iterator[list[Block]]:
    """Return the blocks of a segment, mapped range by mapped range."""
    run: list[Block] = []
    block: Block | None = head
    while block is not None:
        if block.mapped:
            run.append(block)
        if run and (not block.mapped or block.next is None):
            yield run
            run = []
        block = block.next
