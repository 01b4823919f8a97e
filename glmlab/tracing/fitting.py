"""From recorded rows to an allocation trace: events in a constant order, sizes as exact functions of the lengths.

Every section was recorded several times, at different lengths. All its rows must have the same events in the same
order; each size must be an integer combination of ``[1, L, n, n * n, n * L]`` (as few of these as possible) that
meets every row, with at least one row more than coefficients.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from glmlab.allocator.program import (
    ALLOCATE,
    FREE,
    FREE_CARRIED,
    FREE_FIRST,
    MAX_AGE,
    EventProgram,
    Int64Array,
)
from glmlab.tracing.recorder import AllocationRecorder
from glmlab.tracing.trace import OWNERS, STEADY, WARM_UP, AllocationTrace, TraceError, TraceFacts

BETWEEN = "between conversations"
"""Section of the rows that belong to no conversation: what is freed there is no part of a trace."""

_LAYER = re.compile(r"(\blayers\.)(\d+)\b")
_BASES = ((0,), (0, 1), (0, 2), (0, 1, 2), (0, 2, 3), (0, 2, 4), (0, 1, 2, 4), (0, 1, 2, 3, 4))
"""Columns of [1, L, n, n * n, n * L] that a size may follow, simplest first."""

Label = tuple[str, str]  # operation, module path with * for the number of the layer


class _Event(NamedTuple):
    """An event as it stands in an EventProgram, without its size; equal in every row of a section."""

    mode: int
    age: int = 0
    arg: int = -1  # -1 where mode is ALLOCATE: its size is fitted later
    owner: int = 0
    label: Label = ("", "")
    layer: int = -1


class _Row(NamedTuple):
    """A recorded row in that form: what must not change with the lengths, the lengths, and the sizes."""

    events: tuple[_Event, ...]
    carried: tuple[int, ...]  # slots
    context: int
    turn_tokens: int
    sizes: tuple[int, ...]  # bytes of every allocation, by slot


def build_trace(recorder: AllocationRecorder, facts: TraceFacts) -> AllocationTrace:
    """Build the trace of a recording.

    Raises:
        TraceError: the order of events changes, or a size is not affine.
    """
    sections: dict[str, list[_Row]] = defaultdict(list)
    turn = first = 0  # the turn of the rows that come, and its first row
    carried: dict[int, int] = {}  # what the last step would carry over: allocation -> position
    inherited: dict[int, int] = {}  # what this turn was carried over
    for number, row in enumerate(recorder.rows):
        if row.turn != turn:
            turn, first, inherited = row.turn, number, carried
        if row.is_step:
            own = [i for i in dict.fromkeys(row.carried) if i >= 0 and recorder.allocations[i].row == number]
            carried = {allocation: position for position, allocation in enumerate(own)}
        if row.section != BETWEEN:
            slots = tuple(recorder.allocations[i].slot for i in carried) if row.is_step else ()
            sections[row.section].append(_canonical(recorder, number, first, inherited, slots))
    for name, rows in sections.items():
        _check_order(name, rows)
    return _assemble(sections, _fit_sections(sections), facts)


def _canonical(
    recorder: AllocationRecorder, number: int, first: int, inherited: Mapping[int, int], carried: tuple[int, ...]
) -> _Row:
    """Row ``number`` with every free as an EventProgram has it.

    What the turn's first row allocated is freed by slot (FREE_FIRST) once the row is not its own: the cache of a
    prefill may live as long as the turn. What the turn before carried over is freed by position (FREE_CARRIED),
    everything else by age and slot (FREE).
    """
    row = recorder.rows[number]
    events, sizes = [], []
    for event in row.events:
        if event >= 0:
            allocation = recorder.allocations[event]
            module, layer = _layer_of(allocation.module)
            owner = OWNERS.index(recorder.owners.get(event, "activations"))
            events.append(_Event(ALLOCATE, owner=owner, label=(allocation.operation, module), layer=layer))
            sizes.append(allocation.n_bytes)
            continue
        freed = recorder.allocations[~event]
        age = number - freed.row
        if freed.row == first and age >= (2 if row.is_step else 1):
            events.append(_Event(FREE_FIRST, arg=freed.slot))
        elif ~event in inherited:
            events.append(_Event(FREE_CARRIED, arg=inherited[~event]))
        elif age <= MAX_AGE:
            events.append(_Event(FREE, age, freed.slot))
        else:
            raise TraceError(
                f"{freed.operation} in {freed.module or 'the loop'} lives for {age} steps, longer than a trace can "
                "tell. Please report this."
            )
    return _Row(tuple(events), carried, row.context, row.turn_tokens, tuple(sizes))


@functools.cache
def _layer_of(path: str) -> tuple[str, int]:
    """A module path with * for the number of its layer, and that number (-1: none)."""
    layer = _LAYER.search(path)
    return _LAYER.sub(r"\1*", path), int(layer.group(2)) if layer else -1


def _check_order(name: str, rows: Sequence[_Row]) -> None:
    """Refuse a section whose rows differ in more than their lengths and sizes; the text names the first difference."""
    for row in rows[1:]:
        if row.events == rows[0].events and row.carried == rows[0].carried:
            continue
        pairs = zip_longest(rows[0].events, row.events)
        differ = ((i, one, other) for i, (one, other) in enumerate(pairs) if one != other)
        i, one, other = next(differ, (len(row.events), rows[0].carried, row.carried))
        raise TraceError(
            f"the order of events of {name!r} changes with the length of the context: event {i} is {one} at "
            f"{rows[0].context} tokens and {other} at {row.context}. Such a model cannot be forecast. Please report "
            "this."
        )


def _fit_sections(sections: Mapping[str, Sequence[_Row]]) -> dict[str, Int64Array]:
    """Coefficients of every allocation, (slots, 5) a section; decode steps with the same requests share their fit."""
    requests = {
        name: [(event.label, event.layer) for event in rows[0].events if event.mode == ALLOCATE]
        for name, rows in sections.items()
    }
    alike = [name for name in sections if ".step" in name or name == STEADY if requests[name] == requests[STEADY]]
    pooled = [row for name in alike for row in sections[name]]
    return {
        name: _fit(name, pooled if name in alike else rows, [label for label, _ in requests[name]])
        for name, rows in sections.items()
    }


def _fit(name: str, rows: Sequence[_Row], labels: Sequence[Label]) -> Int64Array:
    """Exact integer coefficients over [1, L, n, n * n, n * L], (slots, 5)."""
    sizes = np.array([row.sizes for row in rows], np.int64)  # (rows, slots)
    fitted = np.zeros((sizes.shape[1], 5), np.int64)
    if name == "load":  # runs once
        fitted[:, 0] = sizes[0]
        return fitted
    L, n = np.array([(row.context, row.turn_tokens) for row in rows], np.int64).T  # noqa: N806 - the format's names
    columns = np.column_stack([np.ones_like(L), L, n, n * n, n * L])
    open_slots = np.ones(sizes.shape[1], bool)
    for basis in _BASES:
        part = columns[:, basis]
        scale = np.abs(part).max(axis=0)
        if not open_slots.any():
            break
        if not _determines(part / scale):
            continue
        solution, *_ = np.linalg.lstsq(part / scale, sizes[:, open_slots].astype(float), rcond=None)
        rounded = np.rint(solution.T / scale).astype(np.int64)  # (open slots, basis)
        fits = (part @ rounded.T == sizes[:, open_slots]).all(axis=0)
        found = np.flatnonzero(open_slots)[fits]
        fitted[np.ix_(found, basis)] = rounded[fits]
        open_slots[found] = False
    if open_slots.any():
        slot = int(np.argmax(open_slots))
        points = ", ".join(
            f"{size} B at {row.context}" for size, row in zip(sizes[:, slot].tolist(), rows, strict=True)
        )
        operation, module = labels[slot]
        raise TraceError(
            f"{name}: {operation} in {module or 'the loop'} is not affine in the context length ({points} tokens). "
            "Such a model cannot be forecast. Please report this."
        )
    return fitted


def _determines(part: npt.NDArray[np.float64]) -> bool:
    """Whether rows of lengths (rows, coefficients) give the coefficients, with at least one row left to check them."""
    n_coefficients = part.shape[1]
    if n_coefficients == 1:  # the constant: two rows, be they of one length
        return len(part) > 1
    n_lengths = len(np.unique(part, axis=0))
    return bool(n_lengths > n_coefficients and np.linalg.matrix_rank(part) == n_coefficients)


def _assemble(
    sections: Mapping[str, Sequence[_Row]], coefficients: Mapping[str, Int64Array], facts: TraceFacts
) -> AllocationTrace:
    """Put sections one behind the other; equal sizes and equal labels share a row."""
    size_rows: dict[tuple[object, ...], int] = {}
    labels: dict[Label, int] = {}
    events: list[tuple[int, int, int, int]] = []
    label_of_event: list[int] = []
    start = [0]
    warm_up = -1
    for name, rows in sections.items():
        own = iter(coefficients[name].tolist())
        for event in rows[0].events:
            if event.mode == ALLOCATE:
                is_warm_up = event.label[0] == WARM_UP  # it keeps a row of its own: a small card caps it
                size = size_rows.setdefault((*next(own), is_warm_up), len(size_rows))
                warm_up = size if is_warm_up else warm_up
                event = event._replace(arg=size)
                label_of_event.append(labels.setdefault(event.label, len(labels)))
            else:
                label_of_event.append(-1)
            events.append((event.mode, event.age, event.arg, event.owner))
        start.append(len(events))
    layers = [event.layer for rows in sections.values() for event in rows[0].events]
    program = EventProgram(
        events=np.array(events, np.int32),
        sizes=np.array([size[:5] for size in size_rows], np.int64),
        section_names=tuple(sections),
        section_start=np.array(start, np.int64),
        carried={name: rows[0].carried for name, rows in sections.items() if rows[0].carried},
        owners=OWNERS,
    )
    return AllocationTrace(
        program,
        replace(facts, warmup_size=warm_up),
        tuple(labels),
        np.array(label_of_event, np.int32),
        np.array(layers, np.int32),
    )
