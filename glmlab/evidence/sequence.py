"""Event by event: what the tracer says that a run allocates and frees, against a real GPU's memory history.

The history is a stripped snapshot whose events note their row (``load``, the index of a step, ``end``), as ``glmlab
evidence`` records it. Each row is aligned for itself, so that a difference in one step moves nothing in the next. An
event is its kind and its requested bytes; addresses are compared in :mod:`glmlab.snapshots.replay`.
"""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import NamedTuple

import pandas as pd

from glmlab.allocator.program import ALLOCATE, FREE, FREE_FIRST
from glmlab.evidence.plan import EvidenceError
from glmlab.snapshots.reader import Snapshot
from glmlab.tracing.trace import AllocationTrace, TurnTokens

_LAYER = re.compile(r"\b(layers\.)\d+\b")


class MemoryEvent(NamedTuple):
    """One event: "allocate" or "free", the bytes asked for, and who asked for them (``*`` for a layer's number)."""

    kind: str
    n_bytes: int
    operation: str
    module: str


@dataclass(frozen=True)
class SequenceComparison:
    """The aligned sequences of one run.

    ``table`` has one row for each side ("recorded" or "traced": who alone has the events), row of the run, kind,
    operation and module: how many events and how many bytes. It is empty where both are the same.
    """

    table: pd.DataFrame
    n_recorded: int
    n_traced: int
    n_equal: int

    @property
    def is_equal(self) -> bool:
        """Whether every event is in both, in the same order."""
        return self.n_equal == self.n_recorded == self.n_traced

    def by_operation(self) -> pd.DataFrame:
        """Differences by operation over all rows of the run: count, bytes, and in how many rows; most bytes first."""
        grouped = self.table.groupby(["side", "kind", "operation", "module"], as_index=False).agg(
            count=("count", "sum"), bytes=("bytes", "sum"), rows=("row", "nunique")
        )
        return grouped.sort_values(["bytes", "operation", "module"], ascending=[False, True, True], ignore_index=True)

    def __str__(self) -> str:
        lines = [f"{self.n_equal:,} of {self.n_recorded:,} recorded and {self.n_traced:,} traced events are equal"]
        lines += [
            f"  {row['side']} alone: {row['kind']} {row['count']:,} x, {row['bytes']:,} B in {row['rows']} rows: "
            f"{row['operation']} in {row['module'] or 'the loop'}"
            for row in self.by_operation().to_dict("records")
        ]
        return "\n".join(lines)


def compare_sequence(trace: AllocationTrace, snapshot: Snapshot) -> SequenceComparison:
    """Lay the tracer's events beside a recorded history.

    Args:
        trace: of the same workload.
        snapshot: stripped, of one GPU and one turn, its events noting their rows.

    Raises:
        EvidenceError: several GPUs, no notes, or not one turn.
    """
    recorded = recorded_rows(snapshot)
    traced = traced_rows(trace, _turn_of(snapshot))
    differences: list[tuple[object, ...]] = []
    n_equal = 0
    for row in dict.fromkeys([*traced, *recorded]):
        sides = {"recorded": recorded.get(row, []), "traced": traced.get(row, [])}
        theirs, ours = ([event[:2] for event in events] for events in sides.values())
        matcher = SequenceMatcher(None, theirs, ours, autojunk=False)
        for tag, i, i_end, j, j_end in matcher.get_opcodes():
            if tag == "equal":
                n_equal += i_end - i
                continue
            for (side, events), part in zip(sides.items(), (slice(i, i_end), slice(j, j_end)), strict=True):
                differences += [(side, row, e.kind, e.operation, e.module, 1, e.n_bytes) for e in events[part]]
    keys = ["side", "row", "kind", "operation", "module"]
    table = pd.DataFrame(differences, columns=[*keys, "count", "bytes"])
    table = table.groupby(keys, as_index=False, sort=False).sum()
    return SequenceComparison(table, sum(map(len, recorded.values())), sum(map(len, traced.values())), n_equal)


def recorded_rows(snapshot: Snapshot) -> dict[str, list[MemoryEvent]]:
    """Events of a history by row; a free has the operation and module of what it frees.

    Raises:
        EvidenceError: several GPUs, or events without notes.
    """
    if len(snapshot.devices) != 1:
        raise EvidenceError(f"the snapshot has histories of {len(snapshot.devices)} GPUs; one can be compared.")
    rows: dict[str, list[MemoryEvent]] = {}
    asked: dict[int, tuple[str, str]] = {}
    for event in snapshot.devices[0].events:
        if event.action not in ("alloc", "free_completed"):
            continue
        row, bar, module = event.note.partition("|")
        if not bar:
            raise EvidenceError(
                "the snapshot's events do not note which step they belong to. Record it with glmlab evidence."
            )
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


def _turn_of(snapshot: Snapshot) -> TurnTokens:
    turns = snapshot.provenance.get("turns")
    try:
        ((prompt, generated),) = turns  # type: ignore[misc]
        return TurnTokens(int(prompt), int(generated))
    except (TypeError, ValueError):
        raise EvidenceError(f"the snapshot says turns {turns!r}, not one pair of tokens. Record one turn.") from None
