"""From recorded rows to an allocation trace: order held constant, sizes fitted and checked, frees told by age.

Every section was recorded several times, at different lengths. All its rows must have the same events in the same
order; each size must be an integer combination of ``[1, L, n, n * n, n * L]`` (as few of these as possible) that
meets every row, with at least one row more than coefficients.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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

_LAYER = re.compile(r"(\blayers\.)(\d+)\b")
_BASES = ((0,), (0, 1), (0, 2), (0, 1, 2), (0, 2, 3), (0, 2, 4), (0, 1, 2, 4), (0, 1, 2, 3, 4))
"""Columns of [1, L, n, n * n, n * L] that a size may follow, simplest first."""


@dataclass(frozen=True)
class Step:
    """What the tracer knows at the end of a step; allocations by number."""

    row: int
    turn: int
    index: int  # of the step in its turn
    kv: tuple[int, ...]
    carried: tuple[int, ...]  # what the turn would carry over, were this its last step
    held: frozenset[int]  # the previous turn's cache, where the caller keeps it
    live: tuple[int, ...]
    workspace: int


class _Event(NamedTuple):
    """An event as it stands in an EventProgram, without its size; equal in every row of a section."""

    mode: int
    age: int
    arg: int  # -1 where mode is ALLOCATE: its size is fitted later
    owner: int
    label: tuple[str, str]
    layer: int


class _Row(NamedTuple):
    """A recorded row in that form: what must not change with the lengths, the lengths, and the sizes."""

    events: tuple[_Event, ...]
    carried: tuple[int, ...]  # slots
    context: int
    turn_tokens: int
    sizes: tuple[int, ...]  # bytes of every allocation, by slot


def check_loaded(recorder: AllocationRecorder, owners: Mapping[int, str]) -> None:
    """Whatever is alive after loading must be a known tensor of the model; :class:`TraceError` otherwise."""
    for number in recorder.live():
        if number not in owners:
            lost = recorder.allocations[number]
            if lost.n_bytes > 4096:  # bitsandbytes keeps its code tables in a global
                raise TraceError(
                    f"after loading, {lost.n_bytes} B of {lost.operation} are alive that no tensor of the model holds. "
                    "Please report this."
                )


def build_trace(
    recorder: AllocationRecorder, steps: Sequence[Step], loaded: Mapping[int, str], facts: TraceFacts
) -> AllocationTrace:
    """Build the trace of a recording.

    Raises:
        TraceError: the order of events changes, a size is not affine, or something is alive that nobody holds.
    """
    step_of_row = {step.row: step for step in steps}
    _check_live(recorder, steps, loaded)
    owners = _owners(recorder, steps, loaded)
    sections: dict[str, list[_Row]] = defaultdict(list)
    for number, row in enumerate(recorder.rows):
        if row.section != "between conversations":
            sections[row.section].append(_canonical(recorder, number, step_of_row, owners))
    for name, rows in sections.items():
        _check_order(name, rows)
    coefficients = _fit_sections(sections)
    return _assemble(sections, coefficients, facts)


def _check_live(recorder: AllocationRecorder, steps: Sequence[Step], loaded: Mapping[int, str]) -> None:
    """At the end of a step only the model, the cache, the workspace and the loop's own tensors may be alive."""
    loaded_bytes = sum(recorder.allocations[number].n_bytes for number in loaded)
    for step in steps:
        known = {*step.kv, *step.held, step.workspace}
        total = rest = 0
        for number in step.live:
            allocation = recorder.allocations[number]
            total += allocation.n_bytes
            if number in known or number in loaded or allocation.row == 0:
                continue
            if allocation.module:
                raise TraceError(
                    f"{allocation.n_bytes} B of {allocation.operation} in {allocation.module} outlive their step, and "
                    "neither the cache nor the loop holds them: such a model cannot be forecast. Please report this."
                )
            rest += allocation.n_bytes
        cached = sum(recorder.allocations[number].n_bytes for number in {*step.kv, *step.held})
        small = sum(
            a.n_bytes for n, a in enumerate(recorder.allocations) if a.row == 0 and n in step.live and n not in loaded
        )
        if total != loaded_bytes + cached + rest + small:
            raise TraceError(
                f"{total} B are alive at the end of a step, but model, cache and loop hold "
                f"{loaded_bytes + cached + rest + small} B. Please report this."
            )


def _owners(recorder: AllocationRecorder, steps: Sequence[Step], loaded: Mapping[int, str]) -> dict[int, str]:
    """Owner of every allocation that outlives its row or is the workspace; the others are activations."""
    owners = dict(loaded)
    freed_in_load = {~event for event in recorder.rows[0].events if event < 0}
    for number, allocation in enumerate(recorder.allocations):
        if allocation.row == 0 and number not in owners and number not in freed_in_load:
            owners[number] = "quantisation_state"
        elif allocation.operation == "cuBLAS workspace":
            owners[number] = "workspace"
    for step in steps:
        kv = {*step.kv, *step.held}
        for number in step.live:
            if recorder.allocations[number].row == step.row:
                owners.setdefault(number, "kv_cache" if number in kv else "kept_outputs")
    return owners


def _canonical(recorder: AllocationRecorder, number: int, steps: Mapping[int, Step], owners: Mapping[int, str]) -> _Row:
    """Row ``number`` with every free told as an EventProgram tells it.

    What a turn's first row allocated is freed by slot (FREE_FIRST) once the row is not its own: the cache of a prefill
    may live as long as the turn. What the turn before carried over is freed by position (FREE_CARRIED), everything else
    by age and slot (FREE).
    """
    row = recorder.rows[number]
    step = steps.get(number)
    first = next((i for i, other in enumerate(recorder.rows) if other.turn == row.turn), number)
    before = max((i for i in steps if i < first), default=-1)  # last step of the turn before
    carried_before = _slots(recorder, before, steps[before].carried) if before >= 0 else {}
    events, sizes = [], []
    for event in row.events:
        if event >= 0:
            allocation = recorder.allocations[event]
            layer = _LAYER.search(allocation.module)
            label = (allocation.operation, _LAYER.sub(r"\1*", allocation.module))
            owner = OWNERS.index(owners.get(event, "activations"))
            events.append(_Event(ALLOCATE, 0, -1, owner, label, int(layer.group(2)) if layer else -1))
            sizes.append(allocation.n_bytes)
            continue
        target = recorder.allocations[~event]
        age = number - target.row
        if target.row == first and age >= (1 if step is None else 2):
            mode, age, arg = FREE_FIRST, 0, target.slot
        elif ~event in carried_before:
            mode, age, arg = FREE_CARRIED, 0, carried_before[~event]
        elif age <= MAX_AGE:
            mode, arg = FREE, target.slot
        else:
            raise TraceError(
                f"{target.operation} in {target.module or 'the loop'} lives for {age} steps, longer than a trace can "
                "tell. Please report this."
            )
        events.append(_Event(mode, age, arg, 0, ("", ""), -1))
    carried = tuple(_slots(recorder, number, step.carried)) if step else ()
    slots = tuple(recorder.allocations[i].slot for i in carried)
    return _Row(tuple(events), slots, row.context, row.turn_tokens, tuple(sizes))


def _slots(recorder: AllocationRecorder, row: int, numbers: Iterable[int]) -> dict[int, int]:
    """Allocations of ``row`` among ``numbers``, with their position in what the row carries over."""
    own = [number for number in dict.fromkeys(numbers) if number >= 0 and recorder.allocations[number].row == row]
    return {number: position for position, number in enumerate(own)}


def _check_order(name: str, rows: Sequence[_Row]) -> None:
    """Refuse a section whose rows differ in more than their lengths and sizes; the text names the first difference."""
    for row in rows[1:]:
        if row.events == rows[0].events and row.carried == rows[0].carried:
            continue
        pairs = zip(rows[0].events, row.events, strict=False)
        i, (one, other) = next(
            ((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1]), (len(row.events), (None, None))
        )
        raise TraceError(
            f"the order of events of {name!r} changes with the length of the context: event {i} is {one} at "
            f"{rows[0].context} tokens and {other} at {row.context}. Such a model cannot be forecast. Please report "
            "this."
        )


def _fit_sections(sections: Mapping[str, Sequence[_Row]]) -> dict[str, Int64Array]:
    """Coefficients of every allocation, (slots, 5) a section; decode steps with the same requests share their fit."""
    requests = {name: [e for e in rows[0].events if e.mode == ALLOCATE] for name, rows in sections.items()}
    decode = [name for name in sections if name == STEADY or ".step" in name]
    labels = {name: [(e.label, e.layer) for e in events] for name, events in requests.items()}
    alike = [name for name in decode if labels[name] == labels[STEADY]]
    pooled = [row for name in alike for row in sections[name]]
    fitted = {}
    for name, rows in sections.items():
        if not requests[name]:
            fitted[name] = np.zeros((0, 5), np.int64)
        elif name == "load":
            fitted[name] = np.column_stack([rows[0].sizes, np.zeros((len(rows[0].sizes), 4), np.int64)]).astype(
                np.int64
            )
        else:
            fitted[name] = _fit(name, pooled if name in alike else rows, [e.label for e in requests[name]])
    return fitted


def _fit(name: str, rows: Sequence[_Row], labels: Sequence[tuple[str, str]]) -> Int64Array:
    """Exact integer coefficients over [1, L, n, n * n, n * L], (slots, 5)."""
    lengths = np.array([(row.context, row.turn_tokens) for row in rows], np.int64)
    L, n = lengths.T  # noqa: N806 - the names of the format
    columns = np.column_stack([np.ones_like(L), L, n, n * n, n * L])
    sizes = np.array([row.sizes for row in rows], np.int64)  # (rows, slots)
    fitted = np.zeros((sizes.shape[1], 5), np.int64)
    open_slots = np.ones(sizes.shape[1], bool)
    for basis in _BASES:
        part = columns[:, basis]
        scale = np.abs(part).max(axis=0)
        if not _determines(part / scale):
            continue
        solution, *_ = np.linalg.lstsq(part / scale, sizes.astype(float), rcond=None)
        rounded = np.rint(solution.T / scale).astype(np.int64)  # (slots, basis)
        fits = open_slots & (part @ rounded.T == sizes).all(axis=0)
        fitted[np.ix_(fits, basis)] = rounded[fits]
        open_slots &= ~fits
        if not open_slots.any():
            return fitted
    slot = int(np.argmax(open_slots))
    points = ", ".join(f"{size} B at {row.context}" for size, row in zip(sizes[:, slot].tolist(), rows, strict=True))
    operation, module = labels[slot]
    raise TraceError(
        f"{name}: {operation} in {module or 'the loop'} is not affine in the context length ({points} tokens). Such a "
        "model cannot be forecast. Please report this."
    )


def _determines(part: npt.NDArray[np.float64]) -> bool:
    """Whether rows of lengths (rows, coefficients) give the coefficients, with at least one row left to check them."""
    n_coefficients = part.shape[1]
    if n_coefficients == 1:  # the constant: two rows, be they of one length
        return len(part) > 1
    n_lengths = len({tuple(row) for row in part.tolist()})
    return bool(n_lengths > n_coefficients and np.linalg.matrix_rank(part) == n_coefficients)


def _assemble(
    sections: Mapping[str, Sequence[_Row]], coefficients: Mapping[str, Int64Array], facts: TraceFacts
) -> AllocationTrace:
    """Put sections one behind the other; equal sizes and equal labels share a row."""
    size_rows: dict[tuple[int, ...], int] = {}
    labels: dict[tuple[str, str], int] = {}
    events: list[tuple[int, int, int, int]] = []
    label_of_event: list[int] = []
    layer_of_event: list[int] = []
    start, carried = [0], {}
    for name, rows in sections.items():
        own = iter(coefficients[name].tolist())
        for event in rows[0].events:
            if event.mode == ALLOCATE:
                # the warm-up block keeps a row of its own: a small card caps it
                key = (*next(own), -1 if event.label[0] == WARM_UP else 0)
                events.append((ALLOCATE, 0, size_rows.setdefault(key, len(size_rows)), event.owner))
                label_of_event.append(labels.setdefault(event.label, len(labels)))
            else:
                events.append((event.mode, event.age, event.arg, 0))
                label_of_event.append(-1)
            layer_of_event.append(event.layer)
        start.append(len(events))
        if rows[0].carried:
            carried[name] = rows[0].carried
    warm_up = [row for key, row in size_rows.items() if key[-1] == -1]
    program = EventProgram(
        events=np.array(events, np.int32),
        sizes=np.array([key[:5] for key in size_rows], np.int64),
        section_names=tuple(sections),
        section_start=np.array(start, np.int64),
        carried=carried,
        owners=OWNERS,
    )
    return AllocationTrace(
        program,
        replace(facts, warmup_size=warm_up[0] if warm_up else -1),
        tuple(labels),
        _int32(label_of_event),
        _int32(layer_of_event),
    )


def _int32(values: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)
