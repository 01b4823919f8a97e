"""The readable allocator: each rule on its own, then conservation over random runs."""

import contextlib
import itertools
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from requests_and_settings import SETTINGS, SIZES

from glmlab.allocator.blocks import Block
from glmlab.allocator.caching import CachingAllocator
from glmlab.allocator.config import AllocatorError, AllocatorSettings, OutOfMemory
from glmlab.core.units import GIB, MIB


def conserves(allocator: CachingAllocator) -> bool:
    held = allocator.inactive_small_bytes + allocator.inactive_large_bytes + allocator.allocated_bytes
    blocks = [block for segment in allocator.segments() for block in segment.blocks]
    return held == allocator.reserved_bytes == sum(b.size for b in blocks) and allocator.allocated_bytes == sum(
        b.size for b in blocks if b.live
    )


@pytest.mark.parametrize(
    ("n_bytes", "block_bytes", "reserved_mib", "pool"),
    [
        (1, 512, 2, "small"),
        (513, 1024, 2, "small"),
        (MIB, MIB, 2, "small"),
        (MIB + 1, MIB + 512, 20, "large"),
        (10 * MIB - 1, 10 * MIB, 10, "large"),  # rounding comes first
        (10 * MIB - 600, 10 * MIB - 512, 20, "large"),
        (10 * MIB, 10 * MIB, 10, "large"),
        (11 * MIB + 1, 12 * MIB, 12, "large"),  # the rest of its segment is too small to split off
        (19 * MIB + 512, 20 * MIB, 20, "large"),
    ],
)
def test_a_first_request_takes_its_block_and_its_segment(
    n_bytes: int, block_bytes: int, reserved_mib: int, pool: str
) -> None:
    allocator = CachingAllocator()
    block = allocator.malloc(n_bytes)
    assert (block.size, allocator.reserved_bytes) == (block_bytes, reserved_mib * MIB)
    assert str(block.pool).startswith(pool)
    assert conserves(allocator)


def test_the_best_fit_is_the_smallest_block_then_the_lowest_address() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.malloc(n * MIB) for n in (40, 30, 30, 50)]
    for block in blocks:
        allocator.free(block)
    found = [allocator.malloc(29 * MIB).address for _ in range(3)]
    assert found == [blocks[i].address for i in (1, 2, 0)]


def test_freed_neighbours_are_joined_and_the_rest_of_a_large_block_is_split_above_one_mib() -> None:
    allocator = CachingAllocator()
    a, b, c = (allocator.malloc(6 * MIB) for _ in range(3))
    assert [block.size for block in (a, b, c)] == [6 * MIB, 6 * MIB, 6 * MIB]  # 2 MiB of the segment stay inactive
    for block in (a, c, b):
        allocator.free(block)
    assert [len(segment.blocks) for segment in allocator.segments()] == [1]
    first, second = allocator.malloc(9 * MIB), allocator.malloc(10 * MIB)
    assert (first.size, second.size) == (9 * MIB, 11 * MIB)
    assert allocator.inactive_large_bytes == 0


def test_streams_do_not_share_blocks() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(100, stream=7))
    allocator.malloc(100)
    assert allocator.reserved_bytes == 4 * MIB


def test_empty_cache_gives_back_inactive_segments_only() -> None:
    allocator = CachingAllocator()
    kept, gone = allocator.malloc(1000), allocator.malloc(30 * MIB)
    allocator.free(gone)
    assert (allocator.empty_cache(), allocator.reserved_bytes) == (30 * MIB, 2 * MIB)
    assert kept.live
    assert allocator.empty_cache() == 0


def test_a_failing_driver_gets_inactive_segments_back_first() -> None:
    allocator = CachingAllocator(capacity_bytes=64 * MIB)
    for block in [allocator.malloc(20 * MIB) for _ in range(3)]:
        allocator.free(block)
    assert allocator.malloc(40 * MIB).size == allocator.reserved_bytes == 40 * MIB


def test_out_of_memory_has_the_figures_of_pytorchs_message() -> None:
    allocator = CachingAllocator(capacity_bytes=8 * GIB, outside_bytes=GIB)
    allocator.malloc(6 * GIB)
    allocator.malloc(1000)
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(2 * GIB)
    error = caught.value
    assert (error.tried, error.capacity, error.free) == (2 * GIB, 8 * GIB, GIB - 2 * MIB)
    assert (error.allocated, error.reserved) == (6 * GIB + 1024, 6 * GIB + 2 * MIB)
    assert str(error) == (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1022.00 MiB "
        "is free. Of the allocated memory 6.00 GiB is allocated by PyTorch, and 2.00 MiB is reserved by PyTorch but "
        "unallocated."
    )
    assert conserves(allocator)


def test_max_split_size_keeps_large_blocks_whole() -> None:
    allocator = CachingAllocator(AllocatorSettings(max_split_size_mb=32))
    whole = allocator.malloc(40 * MIB)
    allocator.free(whole)
    assert allocator.malloc(5 * MIB).address != whole.address  # a small request may not break it
    assert allocator.malloc(33 * MIB).size == 40 * MIB  # an oversize request takes it unsplit
    assert allocator.malloc(60 * MIB).size == 60 * MIB


def test_with_max_split_size_only_the_needed_oversize_blocks_are_released() -> None:
    allocator = CachingAllocator(AllocatorSettings(max_split_size_mb=32), capacity_bytes=180 * MIB)
    for block in [allocator.malloc(n * MIB) for n in (40, 50, 80)]:
        allocator.free(block)
    allocator.malloc(120 * MIB)
    assert [segment.size // MIB for segment in allocator.segments()] == [40, 120]


@pytest.mark.parametrize(
    ("divisions", "n_bytes", "rounded"),
    [
        *[(4, 1200, 1536), (4, 2048, 2048), (4, 2049, 2560)],
        *[(4, 5 * MIB - 1, 5 * MIB), (4, 5 * MIB + 1, 6 * MIB), (4, 9 * MIB, 10 * MIB)],
        *[({4: 2, 16: 0}, 3 * MIB + 1, 3 * MIB + 512), ({4: 2, 16: 0}, 5 * MIB + 1, 6 * MIB)],
        *[({4: 2, 16: 0}, 9 * MIB + 1, 12 * MIB), ({4: 2, 16: 0}, 17 * MIB + 1, 17 * MIB + 512)],
    ],
)
def test_roundup_power2_divisions(divisions: int | dict[int, int], n_bytes: int, rounded: int) -> None:
    assert AllocatorSettings(roundup_power2_divisions=divisions).round_size(n_bytes) == rounded


def test_an_expandable_segment_grows_by_pages_and_is_unmapped_by_pages() -> None:
    allocator = CachingAllocator(AllocatorSettings(expandable_segments=True))
    a, b = allocator.malloc(15 * MIB), allocator.malloc(30 * MIB)
    assert b.address == a.end
    assert allocator.reserved_bytes == 60 * MIB
    allocator.free(b)
    assert allocator.empty_cache() == 40 * MIB  # whole pages only
    assert allocator.inactive_large_bytes == 5 * MIB
    assert allocator.malloc(6 * MIB).address == a.end
    assert allocator.reserved_bytes == 40 * MIB


@pytest.mark.parametrize(
    ("action", "says"),
    [
        (lambda: CachingAllocator().malloc(0), "positive sizes"),
        (lambda: CachingAllocator(address_seed=-1), "address_seed=-1: seeds start at 0"),
        (lambda: AllocatorSettings(max_split_size_mb=20), "must be over 20"),
        (lambda: AllocatorSettings(roundup_power2_divisions=3), "powers of two"),
        (lambda: AllocatorSettings(roundup_power2_divisions={3: 4}), "names 3 MiB; it can name powers of two from"),
        (lambda: AllocatorSettings(large_segment_size_mb=8), "large_segment_size_mb must be 10 or over, is 8"),
        (lambda: AllocatorSettings(max_non_split_rounding_mb=-1), "must not be negative, is -1"),
    ],
)
def test_what_pytorch_refuses_is_refused(action: Callable[[], object], says: str) -> None:
    with pytest.raises(AllocatorError, match=says):
        action()


def test_a_block_is_freed_once() -> None:
    allocator = CachingAllocator()
    block = allocator.malloc(100)
    allocator.free(block)
    with pytest.raises(AllocatorError, match="inactive, small pool of stream 0.* freed twice"):
        allocator.free(block)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), chosen=st.sampled_from(SETTINGS), capacity=st.sampled_from([None, 64 * MIB, 160 * MIB]))
def test_inactive_and_allocated_add_up_to_reserved_after_every_event(
    data: st.DataObject, chosen: AllocatorSettings, capacity: int | None
) -> None:
    allocator, live = CachingAllocator(chosen, capacity_bytes=capacity), []
    for action in data.draw(st.lists(st.one_of(st.none(), st.just("empty"), SIZES, SIZES), max_size=40)):
        if action == "empty":
            allocator.empty_cache()
        elif isinstance(action, int):
            with contextlib.suppress(OutOfMemory):
                live.append(allocator.malloc(action, stream=action % 2))
        elif live:
            allocator.free(live.pop(data.draw(st.integers(0, len(live) - 1))))
        assert conserves(allocator)
        assert capacity is None or allocator.reserved_bytes <= capacity
        assert not overlapping(live)
    assert allocator.peak_allocated_bytes >= allocator.allocated_bytes


def overlapping(blocks: list[Block]) -> bool:
    ordered = sorted(blocks, key=lambda block: block.address)
    return any(a.end > b.address for a, b in itertools.pairwise(ordered))
