"""The replay of event programs: both forms agree, a recorded chat equals its reference, bad programs are refused."""

import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import numba
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from numba.core import event as numba_events
from readable_replay import ReadableReplayer
from requests_and_settings import SETTINGS, SIZES

from glmlab.allocator.caching import CachingAllocator
from glmlab.allocator.config import AllocatorError, AllocatorSettings
from glmlab.allocator.program import (
    ALLOCATE,
    EMPTY_CACHE,
    FREE,
    FREE_CARRIED,
    FREE_FIRST,
    EventProgram,
    EventProgramError,
    Replay,
)
from glmlab.allocator.replay import StepReplayer, _CompilationNote
from glmlab.core.units import GIB, MIB
from glmlab.tracing.trace import TurnTokens, load_recorded

CHAT = [(8, 418), (26, 259), (30, 497), (30, 491), (30, 501), (30, 501), (30, 501), (30, 525)]
NEW = (ALLOCATE, 0, 0, 0)
ORIGINAL = load_recorded("chatglm3-6b-original-int4")


def assert_equal(found: Replay, expected: Replay) -> None:
    for name, value in vars(expected).items():
        other = getattr(found, name)
        if isinstance(value, np.ndarray):
            assert other.tolist() == value.tolist(), name
        else:
            assert str(other) == str(value), name


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
    table = [(size, slope, 0, 0, 0) for size, slope in zip(sizes, slopes, strict=True)]
    names = [f"row {i}" for i in range(len(start) - 1)]
    program = EventProgram(events, table, names, start, owners=("a", "b", "c"))
    return program, [(draw(st.integers(0, 1)), i, draw(st.integers(0, 400)), 0) for i in range(len(names))]


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=programs(),
    chosen=st.sampled_from(SETTINGS),
    capacity=st.sampled_from([None, None, 96 * MIB, 200 * MIB]),
    seed=st.sampled_from([None, 1, 2]),
)
def test_both_forms_give_equal_results_and_equal_blocks_after_every_row(
    case: tuple[EventProgram, list[tuple[int, int, int, int]]],
    chosen: AllocatorSettings,
    capacity: int | None,
    seed: int | None,
) -> None:
    program, schedule = case
    device: dict[str, Any] = {"capacity_bytes": capacity, "outside_bytes": 2 * MIB, "address_seed": seed}
    allocator = CachingAllocator(chosen, **device)
    compiled, readable = StepReplayer(program, chosen, **device), ReadableReplayer(program, allocator)
    rows: list[Replay] = []
    while not rows or (len(rows) < len(schedule) and rows[-1].out_of_memory is None):
        rows.append(compiled.run(schedule[len(rows) : len(rows) + 1]))
        assert_equal(rows[-1], readable.run(schedule[len(rows) - 1 : len(rows)]))
        assert compiled.segments() == allocator.segments()

    whole = StepReplayer(program, chosen, **device).run(schedule)

    assert whole.reserved.tolist() == [n for row in rows for n in row.reserved.tolist()]
    assert len(whole.growth) == sum(len(row.growth) for row in rows)
    assert (whole.allocated + whole.inactive_small + whole.inactive_large).tolist() == whole.reserved.tolist()
    assert whole.allocated_by_owner.sum(axis=1).tolist() == whole.allocated.tolist()


# -- the original code's chat ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turns", [[(8, 40), (26, 1), (30, 2), (2, 3), (5, 4), (30, 20)], [(700, 12), (900, 9), (800, 5)]]
)
def test_a_conversation_equals_the_reference_replay_row_by_row(
    reference: ModuleType, shared_data: Path, turns: list[tuple[int, int]]
) -> None:
    expected = []

    def on_step(allocator: Any, turn: int, step: int, context: int, kv: Any) -> None:
        small, large = (sum(block[0] for block in pool) for pool in allocator.pools)
        expected.append([allocator.reserved, allocator.allocated, small, large])

    reference.replay(reference.Trace(shared_data / "original-trace" / "trace.npz"), turns, on_step)
    schedule = ORIGINAL.schedule([TurnTokens(*turn) for turn in turns])
    found = StepReplayer(ORIGINAL.program).run(schedule)
    columns = np.stack([found.reserved, found.allocated, found.inactive_small, found.inactive_large], axis=1)
    is_expected = ORIGINAL.is_step(schedule)
    is_expected[0] = True  # the reference reports loading, too
    assert columns[is_expected].tolist() == expected


def test_the_chat_fits_a_card_or_says_where_it_does_not() -> None:
    schedule = ORIGINAL.schedule([TurnTokens(*turn) for turn in CHAT])
    found = StepReplayer(ORIGINAL.program, capacity_bytes=5 * GIB, outside_bytes=900 * MIB).run(schedule)
    assert found.rows == 681
    assert "Tried to allocate 214.00 MiB" in str(found.out_of_memory)
    tight = {"capacity_bytes": 5 * GIB, "outside_bytes": 1000 * MIB}
    found = StepReplayer(ORIGINAL.program, **tight).run(schedule)
    assert found.rows == 1
    assert_equal(found, ReadableReplayer(ORIGINAL.program, CachingAllocator(**tight)).run(schedule))


# -- programs made by hand ---------------------------------------------------------------------------------------------


def turns_program() -> EventProgram:
    """A prefill and a step that keep two tensors a row, an end that frees the first row's and the previous turn's."""
    cache = (ALLOCATE, 0, 1, 1)
    return EventProgram(
        events=[
            *(NEW, cache, (FREE_CARRIED, 0, 0, 0)),  # prefill
            *(NEW, cache, (FREE, 1, 1, 0)),  # step
            *((FREE_FIRST, 0, 0, 0), (EMPTY_CACHE, 0, 0, 0)),  # end
            *(NEW, cache),  # first prefill: nothing is carried yet
        ],
        sizes=[(512, 0, 0, 0, 0), (0, 1024, 0, 512, 256)],
        section_names=("prefill", "step", "end", "first"),
        section_start=[0, 3, 6, 8, 10],
        carried={"step": [1]},
        owners=("other", "cache"),
    )


def test_turns_carry_objects_over_and_sizes_follow_context_and_turn() -> None:
    program = turns_program()
    schedule = [(1, 3, 4, 4), (1, 1, 5, 5), (1, 2, 5, 5), (2, 0, 7, 2), (2, 1, 8, 3), (2, 2, 8, 3)]
    found = StepReplayer(program).run(schedule)
    cache = [
        4 * 1024 + 16 * 512 + 16 * 256,
        5 * 1024 + 25 * 512 + 25 * 256 + 256,  # rounded up to 512
        5 * 1024 + 25 * 512 + 25 * 256 + 256,
        7 * 1024 + 4 * 512 + 14 * 256,  # the turn's prefill freed what the first turn carried over
        8 * 1024 + 9 * 512 + 24 * 256,
        8 * 1024 + 9 * 512 + 24 * 256,
    ]
    assert found.allocated_by_owner[:, 1].tolist() == cache
    assert found.allocated_by_owner[:, 0].tolist() == [512, 1024, 512, 1024, 1536, 1024]
    assert_equal(found, ReadableReplayer(program, CachingAllocator()).run(schedule))


def test_inactive_memory_released_after_loading_changes_the_later_curve() -> None:
    program = EventProgram(
        events=[NEW, (FREE, 0, 0, 0), (EMPTY_CACHE, 0, 0, 0), (ALLOCATE, 0, 1, 0)],
        sizes=[(64 * MIB, 0, 0, 0, 0), (12 * MIB, 0, 0, 0, 0)],
        section_names=("load", "release", "step"),
        section_start=[0, 2, 3, 4],
    )
    kept = StepReplayer(program).run([(0, 0, 0, 0), (1, 2, 1, 1)])
    released = StepReplayer(program).run([(0, 0, 0, 0), (0, 1, 0, 0), (1, 2, 1, 1)])
    assert kept.reserved.tolist() == [64 * MIB, 64 * MIB]
    assert released.reserved.tolist() == [64 * MIB, 0, 12 * MIB]


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ([(1, 4, 1, 1)], "section from 0 to 3"),
        ([(1, 0, -1, 1)], "no negative"),
        ([(1, 1, 1, 1)], r"event 5, \(1, 1, 1, 0\), frees what is not live"),
        ([(1, 0, 1, 1)], r"event 2, \(3, 0, 0, 0\), frees what is not live"),
        ([(1, 3, 1, 1), (1, 2, 1, 1), (1, 2, 1, 1)], "row 2 of the schedule: event 6"),
        ([(1, 3, 10**9, 1)], "no tensor has that size"),
        ([(1, 0, 1)] * 4, "every row of a schedule is"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(schedule: list[tuple[int, int, int, int]], says: str) -> None:
    program = turns_program()
    for replayer in (StepReplayer(program), ReadableReplayer(program, CachingAllocator())):
        with pytest.raises(EventProgramError, match=says):
            replayer.run(schedule)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"events": [(9, 0, 0, 0)]}, "event 0 is"),
        ({"events": [(FREE, 4, 0, 0)]}, "at most 3"),
        ({"events": [(ALLOCATE, 0, 5, 0)]}, "a size below 1"),
        ({"events": [(ALLOCATE, 0, 0, 1)]}, "an owner below 1"),
        ({"events": [(ALLOCATE, 0, 0)]}, r"an event is \(mode, age, arg, owner\).*shape \(1, 3\)"),
        ({"sizes": [(1, 0)]}, "a size has five coefficients"),
        ({"section_start": [0, 9]}, "section_start must rise"),
        ({"carried": {"only": [3]}}, "allocates only 1"),
        ({"events": [(FREE, 0, 7, 0)]}, "frees slot 7"),
    ],
)
def test_a_program_that_cannot_be_replayed_is_refused(change: dict[str, Any], says: str) -> None:
    whole = {"events": [NEW], "sizes": [(1, 0, 0, 0, 0)], "section_names": ("only",), "section_start": [0, 1]}
    with pytest.raises(EventProgramError, match=says):
        StepReplayer(EventProgram(**{**whole, **change}))


def test_a_negative_address_seed_is_refused() -> None:
    with pytest.raises(AllocatorError, match="address_seed=-1: seeds start at 0"):
        StepReplayer(turns_program(), address_seed=-1)


def test_the_kernel_grows_with_what_it_holds() -> None:
    replayer = StepReplayer(EventProgram([NEW] * 3000, [(2 * MIB, 0, 0, 0, 0)], ("only",), [0, 3000]))
    found = replayer.run([(0, 0, 0, 0)] * 3)
    assert found.allocated.tolist() == [n * 3000 * 2 * MIB for n in (1, 2, 3)]
    assert len(found.growth) == 900
    assert sum(block.live for segment in replayer.segments() for block in segment.blocks) == 9000


def test_released_pages_of_many_blocks_need_many_records() -> None:
    """Every block has a size of its own, so none is reused; empty_cache() then cuts every inactive one in three."""
    program = EventProgram(
        events=[NEW, NEW, NEW, NEW, (FREE, 1, 1, 0), (EMPTY_CACHE, 0, 0, 0)],
        sizes=[(41 * MIB, 512, 0, 0, 0)],
        section_names=("first", "step", "empty_cache"),
        section_start=[0, 2, 5, 6],
    )
    schedule = [(0, 0, 0, 0), *((0, 1, i, 0) for i in range(1, 900)), (0, 2, 0, 0)]
    chosen = AllocatorSettings(expandable_segments=True)
    found = StepReplayer(program, chosen).run(schedule)
    assert_equal(found, ReadableReplayer(program, CachingAllocator(chosen)).run(schedule))
    assert found.inactive_large[-1] < found.inactive_large[-2]


@pytest.mark.parametrize("chosen", [AllocatorSettings(), AllocatorSettings(expandable_segments=True)], ids=str)
def test_more_addresses_than_any_gpu_has_are_refused(chosen: AllocatorSettings) -> None:
    program = EventProgram([NEW], [(200 * GIB, 0, 0, 0, 0)], ("only",), [0, 1])
    rows = 2 if chosen.expandable_segments else 5
    assert StepReplayer(program, chosen).run([(0, 0, 0, 0)] * rows).reserved[-1] >= rows * 200 * GIB
    with pytest.raises(EventProgramError, match=rf"row {rows} .* which no GPU has. Give a capacity"):
        StepReplayer(program, chosen).run([(0, 0, 0, 0)] * (rows + 1))


def test_a_second_process_does_not_compile_and_says_nothing() -> None:
    StepReplayer(turns_program()).run([(1, 3, 4, 4)])
    code = (
        "from glmlab.allocator import kernels, program, replay\n"
        "stats = kernels.run_schedule.stats\n"
        "asked = program.EventProgram([(0, 0, 0, 0)], [(512, 0, 0, 0, 0)], ['only'], [0, 1])\n"
        "replay.StepReplayer(asked).run([(1, 0, 4, 4)])\n"
        "print(sum(stats.cache_misses.values()), sum(stats.cache_hits.values()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == ["0", "1"]
    assert done.stderr == ""


def test_a_compilation_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    add, multiply = numba.njit(lambda x: x + 1), numba.njit(lambda x: x * 3)
    with caplog.at_level(logging.WARNING), numba_events.install_listener("numba:compile", _CompilationNote()):
        assert (add(1), multiply(2)) == (2, 6)
    assert caplog.text.count("compiling the replay kernel") == 1
