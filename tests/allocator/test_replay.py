"""The replay of event programs: a recorded chat equals its reference, row by row; bad programs are refused."""

import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest

from glmlab.allocator.caching import CachingAllocator
from glmlab.allocator.config import AllocatorSettings
from glmlab.allocator.program import (
    ALLOCATE,
    EMPTY_CACHE,
    FREE,
    FREE_CARRIED,
    FREE_FIRST,
    EventProgram,
    EventProgramError,
)
from glmlab.allocator.replay import StepReplayer, announcing_compilation, replay_readable, replay_steps
from glmlab.core.units import GIB, MIB

CHAT = [(8, 418), (26, 259), (30, 497), (30, 491), (30, 501), (30, 501), (30, 501), (30, 525)]


def original_program(folder: Path) -> EventProgram:
    """The recorded trace in our format; its mode numbers are ours, and it has no owners."""
    with np.load(folder / "trace.npz", allow_pickle=False) as arrays:
        return EventProgram(
            events=np.column_stack([arrays["ev"], np.zeros(len(arrays["ev"]), np.int32)]),
            sizes=arrays["size"],
            section_names=arrays["segments"].tolist(),
            section_start=arrays["seg_start"],
            carried=dict(zip(arrays["kv_segments"].tolist(), arrays["kv"].tolist(), strict=True)),
        )


def original_schedule(program: EventProgram, turns: list[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    rows, before = [(0, program.section("load"), 0, 0)], 0
    for turn, (prompt, generated) in enumerate(turns, 1):
        kind = "later." if before else "first."
        for i in range(generated):
            name = kind + ("prefill", "step2", "step3")[i] if i < 3 else "steady"
            rows.append((turn, program.section(name), before + prompt + i, prompt + i))
        end = kind + "end" + (str(generated) if generated < 3 else "")
        rows.append((turn, program.section(end), before + prompt + generated - 1, prompt + generated - 1))
        before += prompt + generated - 1
    return rows


def reference_rows(module: ModuleType, folder: Path, turns: list[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    rows = []

    def on_step(allocator: Any, turn: int, step: int, context: int, kv: Any) -> None:
        small, large = (sum(block[0] for block in pool) for pool in allocator.pools)
        rows.append((allocator.reserved, allocator.allocated, small, large))

    module.replay(module.Trace(folder / "trace.npz"), turns, on_step)
    return rows


@pytest.mark.parametrize(
    "turns", [[(8, 40), (26, 1), (30, 2), (2, 3), (5, 4), (30, 20)], [(700, 12), (900, 9), (800, 5)]]
)
def test_a_conversation_equals_the_reference_replay_row_by_row(
    reference: ModuleType, shared_data: Path, turns: list[tuple[int, int]]
) -> None:
    folder = shared_data / "original-trace"
    program = original_program(folder)
    schedule = original_schedule(program, turns)
    found = replay_steps(program, schedule)
    steps = [i for i, row in enumerate(schedule) if "end" not in program.section_names[row[1]]]
    ours = np.stack([found.reserved, found.allocated, found.inactive_small, found.inactive_large], axis=1)[steps]
    assert ours.tolist() == [list(row) for row in reference_rows(reference, folder, turns)]


def test_the_chapters_conversation_has_the_figures_of_the_traces_readme(shared_data: Path) -> None:
    program = original_program(shared_data / "original-trace")
    schedule = np.array(original_schedule(program, CHAT))
    found = replay_steps(program, schedule)
    reserved, allocated = found.reserved / MIB, found.allocated / MIB
    assert (reserved[0], round(allocated[0], 2)) == (4584, 3746.34)
    assert (reserved[2], round(allocated[2], 2)) == (4590, 3757.17)
    assert (reserved[-2], round(allocated[-2], 2)) == (4758, 4069.20)
    assert round(found.peak_allocated.max() / MIB, 2) == 4283.75
    last = found.growth[-1]
    assert schedule[last[0]].tolist()[::2] == [5, 1923]
    assert last[2:].tolist() == [2 * MIB, 0]


def test_the_chat_fits_a_card_or_says_where_it_does_not(shared_data: Path) -> None:
    program = original_program(shared_data / "original-trace")
    schedule = original_schedule(program, CHAT)
    found = replay_steps(program, schedule, capacity_bytes=5 * GIB, outside_bytes=900 * MIB)
    assert found.rows == 681
    assert "Tried to allocate 214.00 MiB" in str(found.out_of_memory)
    tight = {"capacity_bytes": 5 * GIB, "outside_bytes": 1000 * MIB}
    fast, readable = (
        replay_steps(program, schedule, **tight),
        replay_readable(program, schedule, CachingAllocator(**tight)),
    )
    assert (fast.rows, str(fast.out_of_memory)) == (1, str(readable.out_of_memory))


# -- programs made by hand ---------------------------------------------------------------------------------------------


def turns_program() -> EventProgram:
    """A prefill and a step that keep two tensors a row, an end that frees the first row's and the previous turn's."""
    return EventProgram(
        events=np.array(
            [
                *((ALLOCATE, 0, 0, 0), (ALLOCATE, 0, 1, 1), (FREE_CARRIED, 0, 0, 0)),  # prefill
                *((ALLOCATE, 0, 0, 0), (ALLOCATE, 0, 1, 1), (FREE, 1, 1, 0)),  # step
                *((FREE_FIRST, 0, 0, 0), (EMPTY_CACHE, 0, 0, 0)),  # end
                *((ALLOCATE, 0, 0, 0), (ALLOCATE, 0, 1, 1)),  # first prefill: nothing is carried yet
            ]
        ),
        sizes=np.array([(512, 0, 0, 0, 0), (0, 1024, 0, 512, 256)]),
        section_names=("prefill", "step", "end", "first"),
        section_start=np.array([0, 3, 6, 8, 10]),
        carried={"step": [1]},
        owners=("other", "cache"),
    )


def test_turns_carry_objects_over_and_sizes_follow_context_and_turn() -> None:
    program = turns_program()
    schedule = [(1, 3, 4, 4), (1, 1, 5, 5), (1, 2, 5, 5), (2, 0, 7, 2), (2, 1, 8, 3), (2, 2, 8, 3)]
    found = replay_steps(program, schedule)
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
    assert found.rows == len(schedule)
    readable = replay_readable(program, schedule, CachingAllocator())
    assert readable.allocated_by_owner.tolist() == found.allocated_by_owner.tolist()


def test_an_affine_program_equals_its_explicit_unrolling() -> None:
    steps = 300
    affine = EventProgram(
        events=np.array(
            [
                (ALLOCATE, 0, 0, 0),
                (ALLOCATE, 0, 1, 0),
                (ALLOCATE, 0, 0, 0),
                (ALLOCATE, 0, 2, 0),
                (FREE, 0, 0, 0),
                (FREE, 1, 1, 0),
            ]
        ),
        sizes=np.array([(0, 512 * 40, 0, 0, 0), (100, 700, 0, 0, 0), (0, 9_000, 0, 0, 0)]),
        section_names=("first", "step"),
        section_start=np.array([0, 2, 6]),
    )
    schedule = [(1, int(i > 0), 30 + i, 0) for i in range(steps)]
    found = replay_steps(affine, schedule, with_address_hash=True)
    events, sizes, start = [], [], [0]
    for _, section, context, _ in schedule:
        for mode, age, arg, owner in affine.events_of(affine.section_names[section]).tolist():
            if mode == ALLOCATE:
                sizes.append((int(affine.bytes_at(context, 0)[arg]), 0, 0, 0, 0))
                arg = len(sizes) - 1
            events.append((mode, age, arg, owner))
        start.append(len(events))
    names = [str(i) for i in range(steps)]
    explicit = EventProgram(np.array(events), np.array(sizes), names, np.array(start))
    unrolled = replay_steps(explicit, [(1, i, 0, 0) for i in range(steps)], with_address_hash=True)
    for name in ("reserved", "allocated", "peak_allocated", "inactive_small", "inactive_large", "address_hash"):
        assert getattr(found, name).tolist() == getattr(unrolled, name).tolist(), name
    assert found.growth[:, [0, 2, 3]].tolist() == unrolled.growth[:, [0, 2, 3]].tolist()
    assert found.reserved[-1] > found.reserved[0]


def test_idle_memory_released_after_loading_changes_the_later_curve() -> None:
    program = EventProgram(
        events=np.array([(ALLOCATE, 0, 0, 0), (FREE, 0, 0, 0), (EMPTY_CACHE, 0, 0, 0), (ALLOCATE, 0, 1, 0)]),
        sizes=np.array([(64 * MIB, 0, 0, 0, 0), (12 * MIB, 0, 0, 0, 0)]),
        section_names=("load", "release", "step"),
        section_start=np.array([0, 2, 3, 4]),
    )
    kept = replay_steps(program, [(0, 0, 0, 0), (1, 2, 1, 1)])
    released = replay_steps(program, [(0, 0, 0, 0), (0, 1, 0, 0), (1, 2, 1, 1)])
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
    with pytest.raises(EventProgramError, match=says):
        replay_steps(turns_program(), schedule)
    with pytest.raises(EventProgramError, match=says):
        replay_readable(turns_program(), schedule, CachingAllocator())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"events": np.array([(9, 0, 0, 0)]), "section_start": np.array([0, 1])}, "event 0 is"),
        ({"events": np.array([(FREE, 4, 0, 0)]), "section_start": np.array([0, 1])}, "at most 3"),
        ({"events": np.array([(ALLOCATE, 0, 5, 0)]), "section_start": np.array([0, 1])}, "a size below 1"),
        ({"events": np.array([(ALLOCATE, 0, 0, 1)])}, "an owner below 1"),
        ({"events": np.array([(ALLOCATE, 0, 0)])}, r"an event is \(mode, age, arg, owner\).*shape \(1, 3\)"),
        ({"section_start": np.array([0, 9])}, "section_start must rise"),
        ({"carried": {"only": [3]}}, "allocates only 1"),
    ],
)
def test_a_program_that_cannot_be_replayed_is_refused(change: dict[str, Any], says: str) -> None:
    whole: dict[str, Any] = {
        "events": np.array([(ALLOCATE, 0, 0, 0)]),
        "sizes": np.array([(1, 0, 0, 0, 0)]),
        "section_names": ("only",),
        "section_start": np.array([0, 1]),
    }
    with pytest.raises(EventProgramError, match=says):
        EventProgram(**{**whole, **change})


def test_a_free_of_a_slot_that_no_section_has_is_refused() -> None:
    program = EventProgram(np.array([(FREE, 0, 7, 0)]), np.zeros((1, 5)), ("only",), np.array([0, 1]))
    with pytest.raises(EventProgramError, match="frees slot 7"):
        replay_steps(program, [(0, 0, 0, 0)])


def test_the_kernel_grows_with_what_it_holds() -> None:
    program = EventProgram(
        events=np.array([(ALLOCATE, 0, 0, 0)] * 3000),
        sizes=np.array([(2 * MIB, 0, 0, 0, 0)]),
        section_names=("only",),
        section_start=np.array([0, 3000]),
    )
    replayer = StepReplayer(program)
    found = replayer.run([(0, 0, 0, 0)] * 3)
    assert found.allocated.tolist() == [n * 3000 * 2 * MIB for n in (1, 2, 3)]
    assert len(found.growth) == 900
    assert sum(block.live for segment in replayer.segments() for block in segment.blocks) == 9000


def test_released_pages_of_many_blocks_need_many_records() -> None:
    """Every block has a size of its own, so none is reused; empty_cache() then cuts every idle one in three."""
    program = EventProgram(
        events=np.array(
            [
                (ALLOCATE, 0, 0, 0),
                (ALLOCATE, 0, 0, 0),
                *[(ALLOCATE, 0, 0, 0)] * 2,
                (FREE, 1, 1, 0),
                (EMPTY_CACHE, 0, 0, 0),
            ]
        ),
        sizes=np.array([(41 * MIB, 512, 0, 0, 0)]),
        section_names=("first", "step", "empty_cache"),
        section_start=np.array([0, 2, 5, 6]),
    )
    schedule = [(0, 0, 0, 0), *((0, 1, i, 0) for i in range(1, 900)), (0, 2, 0, 0)]
    settings = AllocatorSettings(expandable_segments=True)
    found = replay_steps(program, schedule, settings)
    expected = replay_readable(program, schedule, CachingAllocator(settings))
    assert found.reserved.tolist() == expected.reserved.tolist()
    assert found.inactive_large[-1] == expected.inactive_large[-1] < found.inactive_large[-2]


def test_more_addresses_than_any_gpu_has_are_refused() -> None:
    program = EventProgram([(ALLOCATE, 0, 0, 0)], [(200 * GIB, 0, 0, 0, 0)], ("only",), [0, 1])
    assert replay_steps(program, [(0, 0, 0, 0)] * 5).reserved[-1] == 1000 * GIB
    with pytest.raises(EventProgramError, match=r"row 5 .* more than 1024.00 GiB, which no GPU has"):
        replay_steps(program, [(0, 0, 0, 0)] * 6)


def test_a_second_process_does_not_compile_and_says_nothing() -> None:
    replay_steps(turns_program(), [(1, 3, 4, 4)])
    code = (
        "import test_replay as t, glmlab.allocator.replay as r, glmlab.allocator.kernels as k\n"
        "r.replay_steps(t.turns_program(), [(1, 3, 4, 4)])\n"
        "print(sum(k.replay_rows.stats.cache_misses.values()), sum(k.replay_rows.stats.cache_hits.values()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent, check=True, timeout=300
    )
    assert done.stdout.split() == ["0", "1"]
    assert done.stderr == ""


def test_a_compilation_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    add, multiply = numba.njit(lambda x: x + 1), numba.njit(lambda x: x * 3)
    with caplog.at_level(logging.WARNING), announcing_compilation():
        assert (add(1), multiply(2)) == (2, 6)
    assert caplog.text.count("compiling the replay kernel") == 1
