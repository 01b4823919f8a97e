"""Event by event: what the tracer says that a run allocates and frees, against a real GPU's memory history.

The history is a stripped snapshot whose events note their row (``load``, the index of a step, ``end``), as ``glmlab
evidence`` records it. Each row is aligned for itself, so that a difference in one step moves nothing in the next. An
event is its kind and its requested bytes; addresses are the allocator's matter (:mod:`glmlab.snapshots.replay`).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import NamedTuple

import pandas as pd

from glmlab.allocator.program import ALLOCATE, FREE, FREE_CARRIED, FREE_FIRST, MAX_AGE
from glmlab.core.errors import GlmlabError
from glmlab.snapshots.reader import Snapshot
from glmlab.tracing.trace import AllocationTrace, Turn

_LAYER = re.compile(r"\b(layers\.)\d+\b")
_COLUMNS = ["side", "row", "kind", "operation", "module", "count", "bytes"]


class SequenceError(GlmlabError):
    """A history that cannot be compared with a trace: says what it lacks."""


class Step(NamedTuple):
    """One event: "allocate" or "free", the bytes asked for, and who asked for them (``*`` for a layer's number)."""

    kind: str
    n_bytes: int
    operation: str
    module: str


@dataclass(frozen=True)
class SequenceComparison:
    """The aligned sequences of one run.

    ``table`` has one row for each side ("recorded" or "traced": who alone has the events), row of the run, kind,
    operation and module: how many events and how many bytes. It is empty where both tell the same.
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


def compare_sequence(trace: AllocationTrace, snapshot: Snapshot, turn: Turn | None = None) -> SequenceComparison:
    """Lay the tracer's events beside a recorded history.

    Args:
        trace: of the same workload.
        snapshot: stripped, of one GPU, its events noting their rows.
        turn: the turn that ran after loading; by default what the snapshot's provenance says.

    Raises:
        SequenceError: several GPUs, no notes, or no turn.
    """
    recorded = recorded_rows(snapshot)
    traced = traced_rows(trace, turn or _turn_of(snapshot))
    differences: list[tuple[str, str, Step]] = []
    n_equal = 0
    for row in dict.fromkeys([*traced, *recorded]):
        ours, theirs = traced.get(row, []), recorded.get(row, [])
        matcher = SequenceMatcher(None, [s[:2] for s in theirs], [s[:2] for s in ours], autojunk=False)
        for tag, i, i_end, j, j_end in matcher.get_opcodes():
            if tag == "equal":
                n_equal += i_end - i
            else:
                differences += [("recorded", row, step) for step in theirs[i:i_end]]
                differences += [("traced", row, step) for step in ours[j:j_end]]
    table = pd.DataFrame(
        [(side, row, s.kind, s.operation, s.module, 1, s.n_bytes) for side, row, s in differences], columns=_COLUMNS
    )
    keys = _COLUMNS[:5]
    table = table.groupby(keys, as_index=False, sort=False)[["count", "bytes"]].sum()
    return SequenceComparison(table, sum(map(len, recorded.values())), sum(map(len, traced.values())), n_equal)


def recorded_rows(snapshot: Snapshot) -> dict[str, list[Step]]:
    """Events of a history by row; a free has the operation and module of what it frees.

    Raises:
        SequenceError: several GPUs, or events without notes.
    """
    if len(snapshot.devices) != 1:
        raise SequenceError(f"the snapshot has histories of {len(snapshot.devices)} GPUs; one can be compared.")
    rows: dict[str, list[Step]] = {}
    asked: dict[int, tuple[str, str]] = {}
    for event in snapshot.devices[0].events:
        if event.action not in ("alloc", "free_completed"):
            continue
        row, bar, module = event.note.partition("|")
        if not bar:
            raise SequenceError(
                "the snapshot's events do not note which step they belong to. Record it with glmlab evidence."
            )
        if event.action == "alloc":
            asked[event.address] = (event.operation, _LAYER.sub(r"\1*", module))
            step = Step("allocate", event.size, *asked[event.address])
        else:
            step = Step("free", event.size, *asked.pop(event.address, ("allocated before the history", "")))
        rows.setdefault(row, []).append(step)
    return rows


def traced_rows(trace: AllocationTrace, turn: Turn) -> dict[str, list[Step]]:
    """Events of loading and one turn by row, as :func:`recorded_rows` names them."""
    names = ["load", *map(str, range(turn.generated)), "end"]
    schedule = trace.schedule([turn]).tolist()
    history: list[list[Step]] = []  # allocations by slot, of every row so far
    carried: list[Step] = []
    rows = {}
    for name, (_, section, context, tokens) in zip(names, schedule, strict=True):
        slots: list[Step] = []
        history.append(slots)
        first = history[1] if len(history) > 1 else slots
        lookups = {FREE_FIRST: first, FREE_CARRIED: carried}
        rows[name] = list(_row(trace, section, context, tokens, slots, history, lookups))
    return rows


def _row(
    trace: AllocationTrace,
    section: int,
    context: int,
    tokens: int,
    slots: list[Step],
    history: Sequence[list[Step]],
    lookups: dict[int, list[Step]],
) -> Iterator[Step]:
    """Events of one row; fills ``slots``."""
    program = trace.program
    begin = int(program.section_start[section])
    sizes = program.bytes_at(context, tokens).tolist()
    recent = history[-1 - MAX_AGE :][::-1]
    for event, (mode, age, arg, _) in enumerate(program.events_of(program.section_names[section]).tolist(), begin):
        if mode == ALLOCATE:
            operation, module = trace.labels[trace.label_of_event[event]]
            step = Step("allocate", int(sizes[arg]), operation, _LAYER.sub(r"\1*", module))
            slots.append(step)
            yield step
        elif mode in (FREE, FREE_FIRST, FREE_CARRIED):
            row = recent[age] if mode == FREE else lookups[mode]
            yield row[arg]._replace(kind="free")


def _turn_of(snapshot: Snapshot) -> Turn:
    told = snapshot.provenance.get("turns")
    try:
        ((prompt, generated),) = told  # type: ignore[misc]
        return Turn(int(prompt), int(generated))
    except (TypeError, ValueError):
        raise SequenceError(f"the snapshot says turns {told!r}, not one pair of tokens. Give the turn.") from None
