"""Event by event: what the tracer says that a run allocates and frees, against a real GPU's memory history.

The history is a stripped snapshot whose events note their row (``load``, the index of a step, ``end``), as ``glmlab
evidence`` records it. Each row is aligned for itself, so that a difference in one step moves nothing in the next. An
event is its kind and its requested bytes; addresses are compared in :mod:`glmlab.snapshots.replay`.
"""

import re
from difflib import SequenceMatcher
from typing import NamedTuple

import pandas as pd

from glmlab.allocator.program import ALLOCATE, FREE, FREE_FIRST
from glmlab.snapshots.reader import Snapshot
from glmlab.tracing.trace import AllocationTrace, TurnTokens

_LAYER = re.compile(r"\b(layers\.)\d+\b")


class MemoryEvent(NamedTuple):
    """One event: "allocate" or "free", the bytes asked for, and who asked for them (``*`` for a layer's number)."""

    kind: str
    n_bytes: int
    operation: str
    module: str


def differences(trace: AllocationTrace, snapshot: Snapshot) -> pd.DataFrame:
    """Events that only one side has: side ("recorded" or "traced"), row, kind, operation, module, count and bytes."""
    (turn,) = snapshot.provenance["turns"]
    recorded, traced = recorded_rows(snapshot), traced_rows(trace, TurnTokens(*turn))
    lines: list[tuple[object, ...]] = []
    for row in dict.fromkeys([*traced, *recorded]):
        sides = {"recorded": recorded.get(row, []), "traced": traced.get(row, [])}
        theirs, ours = ([event[:2] for event in events] for events in sides.values())
        for tag, i, i_end, j, j_end in SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
            if tag == "equal":
                continue
            for (side, events), part in zip(sides.items(), (slice(i, i_end), slice(j, j_end)), strict=True):
                lines += [(side, row, e.kind, e.operation, e.module, 1, e.n_bytes) for e in events[part]]
    keys = ["side", "row", "kind", "operation", "module"]
    return pd.DataFrame(lines, columns=[*keys, "count", "bytes"]).groupby(keys, as_index=False, sort=False).sum()


def recorded_rows(snapshot: Snapshot) -> dict[str, list[MemoryEvent]]:
    """Events of one GPU's history by row; a free has the operation and module of what it frees."""
    (device,) = snapshot.devices
    rows: dict[str, list[MemoryEvent]] = {}
    asked: dict[int, tuple[str, str]] = {}
    for event in device.events:
        if event.action not in ("alloc", "free_completed"):
            continue
        row, bar, module = event.note.partition("|")
        assert bar, "an event does not note its row"
        if event.action == "alloc":
            kind, who = "allocate", (event.operation, _LAYER.sub(r"\1*", module))
            asked[event.address] = who
        else:
            kind, who = "free", asked.pop(event.address, ("allocated before the history", ""))
        rows.setdefault(row, []).append(MemoryEvent(kind, event.size, *who))
    return rows


def traced_rows(trace: AllocationTrace, turn: TurnTokens) -> dict[str, list[MemoryEvent]]:
    """Events of loading and one turn by row, as :func:`recorded_rows` names them."""
    names = ["load", *map(str, range(turn.generated)), "end"]
    program = trace.program
    made: list[list[MemoryEvent]] = []  # allocations by slot, of every row so far
    rows = {}
    for name, (_, section, context, tokens) in zip(names, trace.schedule([turn]).tolist(), strict=True):
        made.append([])
        first = made[min(1, len(made) - 1)]
        begin, end = program.section_start[section : section + 2].tolist()
        sizes = program.bytes_at(context, tokens).tolist()
        events = []
        for number, (mode, age, arg, _owner) in enumerate(program.events[begin:end].tolist(), begin):
            if mode == ALLOCATE:
                operation, module = trace.labels[trace.label_of_event[number]]
                event = MemoryEvent("allocate", sizes[arg], operation, _LAYER.sub(r"\1*", module))
                made[-1].append(event)
            else:
                event = {FREE: made[-1 - age], FREE_FIRST: first}[mode][arg]._replace(kind="free")
            events.append(event)
        rows[name] = events
    return rows
