"""The readable allocator: each rule on its own, then properties over random runs, and both forms held equal."""

import contextlib
import itertools
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from glmlab.allocator.caching import Block, CachingAllocator
from glmlab.allocator.config import AllocatorError, AllocatorSettings, OutOfMemory
from glmlab.allocator.program import ALLOCATE, EMPTY_CACHE, FREE, EventProgram
from glmlab.allocator.replay import StepReplayer, replay_readable
from glmlab.core.units import GIB, MIB
from glmlab.tracing.trace import load_recorded

SETTINGS = [
    AllocatorSettings(),
    AllocatorSettings(max_split_size_mb=32),
    AllocatorSettings(roundup_power2_divisions=4),
    AllocatorSettings(roundup_power2_divisions={1: 8, 4: 2, 16: 0}),
    AllocatorSettings(expandable_segments=True),
    AllocatorSettings(expandable_segments=True, max_split_size_mb=24, large_segment_size_mb=24),
    AllocatorSettings(max_split_size_mb=21, max_non_split_rounding_mb=2),
]
THRESHOLDS = [
    1,
    511,
    512,
    513,
    MIB - 512,
    MIB,
    MIB + 1,
    2 * MIB,
    10 * MIB - 1,
    10 * MIB,
    19 * MIB,
    20 * MIB,
    21 * MIB,
    32 * MIB,
]
SIZES = st.one_of(
    st.integers(1, 4096),
    st.sampled_from(THRESHOLDS).flatmap(lambda n: st.integers(max(n - 600, 1), n + 600)),
    st.integers(1, 48 * MIB),
)


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
    assert allocator.malloc(29 * MIB).address == blocks[1].address
    assert allocator.malloc(29 * MIB).address == blocks[2].address
    assert allocator.malloc(29 * MIB).address == blocks[0].address


def test_freed_neighbours_melt_and_the_rest_of_a_large_block_is_split_above_one_mib() -> None:
    allocator = CachingAllocator()
    a, b, c = (allocator.malloc(6 * MIB) for _ in range(3))
    assert [block.size for block in (a, b, c)] == [6 * MIB, 6 * MIB, 6 * MIB]  # 2 MiB of the segment stay idle
    allocator.free(a)
    allocator.free(c)
    allocator.free(b)
    assert [len(segment.blocks) for segment in allocator.segments()] == [1]
    first = allocator.malloc(9 * MIB)
    second = allocator.malloc(10 * MIB)
    assert (first.size, second.size) == (9 * MIB, 11 * MIB)
    assert allocator.inactive_large_bytes == 0


def test_streams_do_not_share_blocks() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(100, stream=7))
    allocator.malloc(100)
    assert allocator.reserved_bytes == 4 * MIB


def test_empty_cache_gives_back_idle_segments_only() -> None:
    allocator = CachingAllocator()
    kept, gone = allocator.malloc(1000), allocator.malloc(30 * MIB)
    allocator.free(gone)
    assert allocator.empty_cache() == 30 * MIB
    assert allocator.reserved_bytes == 2 * MIB
    assert kept.live
    assert allocator.empty_cache() == 0


def test_a_failing_driver_makes_room_from_idle_segments_first() -> None:
    allocator = CachingAllocator(capacity_bytes=64 * MIB)
    idle = [allocator.malloc(20 * MIB) for _ in range(3)]
    for block in idle:
        allocator.free(block)
    assert allocator.malloc(40 * MIB).size == 40 * MIB
    assert allocator.reserved_bytes == 40 * MIB


def test_out_of_memory_tells_the_figures_of_pytorchs_message() -> None:
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
    ("n_bytes", "rounded"),
    [(1200, 1536), (5 * MIB - 1, 5 * MIB), (5 * MIB + 1, 6 * MIB), (9 * MIB, 10 * MIB), (2048, 2048), (2049, 2560)],
)
def test_roundup_power2_divisions(n_bytes: int, rounded: int) -> None:
    assert AllocatorSettings(roundup_power2_divisions=4).round_size(n_bytes) == rounded


def test_divisions_hold_from_the_named_power_of_two_on() -> None:
    divided = AllocatorSettings(roundup_power2_divisions={4: 2, 16: 0})
    assert [divided.round_size(n * MIB + 1) // MIB for n in (3, 5, 9, 17)] == [3, 6, 12, 17]


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
        (lambda: AllocatorSettings(max_split_size_mb=20), "must be over 20"),
        (lambda: AllocatorSettings(roundup_power2_divisions=3), "powers of two"),
        (
            lambda: AllocatorSettings(roundup_power2_divisions={3: 4}),
            "names 3 MiB; it can name powers of two from",
        ),
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
    with pytest.raises(AllocatorError, match="freed twice"):
        allocator.free(block)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), chosen=st.sampled_from(SETTINGS), capacity=st.sampled_from([None, 64 * MIB, 160 * MIB]))
def test_free_and_allocated_add_up_to_reserved_after_every_event(
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


# -- both forms ------------------------------------------------------------------------------------------------------


@st.composite
def programs(draw: st.DrawFn) -> tuple[EventProgram, list[tuple[int, int, int, int]]]:
    """A program of a few rows, each a section of its own, with frees of what the last four rows allocated."""
    sizes = draw(st.lists(SIZES, min_size=1, max_size=8))
    slopes = draw(st.lists(st.sampled_from([0, 0, 1, 512, 40_000]), min_size=len(sizes), max_size=len(sizes)))
    events: list[tuple[int, int, int, int]] = []
    start = [0]
    rows: list[list[int]] = []
    for _ in range(draw(st.integers(1, 8))):
        rows = [[], *rows[:3]]
        slots = 0
        for _ in range(draw(st.integers(0, 14))):
            kind = draw(st.integers(0, 9))
            ages = [age for age, row in enumerate(rows) if row]
            if kind == 0:
                events.append((EMPTY_CACHE, 0, 0, 0))
            elif kind < 5 and ages:
                age = draw(st.sampled_from(ages))
                events.append((FREE, age, rows[age].pop(draw(st.integers(0, len(rows[age]) - 1))), 0))
            else:
                events.append((ALLOCATE, 0, draw(st.integers(0, len(sizes) - 1)), draw(st.integers(0, 2))))
                rows[0].append(slots)
                slots += 1
        start.append(len(events))
    table = np.zeros((len(sizes), 5), np.int64)
    table[:, 0], table[:, 1] = sizes, slopes
    names = [f"row {i}" for i in range(len(start) - 1)]
    program = EventProgram(events, table, names, np.array(start), owners=("a", "b", "c"))
    return program, [(draw(st.integers(0, 1)), i, draw(st.integers(0, 400)), 0) for i in range(len(names))]


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=programs(),
    chosen=st.sampled_from(SETTINGS),
    capacity=st.sampled_from([None, None, 96 * MIB, 200 * MIB]),
    seed=st.sampled_from([None, 1, 2]),
    cut=st.integers(0, 8),
)
def test_both_forms_give_equal_results(
    case: tuple[EventProgram, list[tuple[int, int, int, int]]],
    chosen: AllocatorSettings,
    capacity: int | None,
    seed: int | None,
    cut: int,
) -> None:
    program, schedule = case
    readable = CachingAllocator(chosen, capacity_bytes=capacity, outside_bytes=2 * MIB, address_seed=seed)
    expected = replay_readable(program, schedule, readable)
    options = {"capacity_bytes": capacity, "outside_bytes": 2 * MIB, "address_seed": seed, "with_address_hash": True}
    replayer = StepReplayer(program, chosen, **options)
    found = replayer.run(schedule)
    assert_equal_replays(found, expected)
    assert replayer.segments() == readable.segments()
    whole = found.allocated + found.inactive_small + found.inactive_large
    assert whole.tolist() == found.reserved.tolist()
    assert found.allocated_by_owner.sum(axis=1).tolist() == found.allocated.tolist()
    if found.out_of_memory is None:  # in two runs, one going on where the other ended
        resumed = StepReplayer(program, chosen, **options)
        resumed.run(schedule[:cut])
        resumed.run(schedule[cut:])
        assert resumed.segments() == readable.segments()


def assert_equal_replays(found: object, expected: object) -> None:
    for name, value in vars(expected).items():
        other = getattr(found, name)
        if isinstance(value, np.ndarray):
            assert other.tolist() == value.tolist(), name
        else:
            assert str(other) == str(value), name


def test_a_negative_address_seed_is_refused_in_both_forms() -> None:
    with pytest.raises(AllocatorError, match="address_seed=-1: seeds start at 0"):
        CachingAllocator(address_seed=-1)
    program = load_recorded("chatglm3-6b-original-int4").program
    with pytest.raises(AllocatorError, match="address_seed=-1: seeds start at 0"):
        StepReplayer(program, address_seed=-1)
