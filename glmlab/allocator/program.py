"""What a run asks of the allocator, as one table of events that is a function of the context length.

An :class:`EventProgram` is a handful of *sections* (loading, prefill, second step, steady decode step, end of a turn),
each a fixed list of events. A *schedule* says which section runs when, at which context length. Allocator and replay
know nothing of models: whoever traces a model writes a program and a schedule.

The table of events: ``events``, one row ``(mode, age, arg, owner)`` an event; columns that a mode does not use are 0
    ======================  ===============================================================================
    ``ALLOCATE`` (0)        allocate ``sizes[arg]`` for ``owners[owner]``
    ``FREE`` (1)            free slot ``arg`` of the row run ``age`` rows ago (0 = this row; at most 3)
    ``FREE_FIRST`` (2)      free slot ``arg`` of the first row of this turn
    ``FREE_CARRIED`` (3)    free object ``arg`` of those that the previous turn carried over
    ``EMPTY_CACHE`` (4)     ``torch.cuda.empty_cache()``: every segment without a live block goes back to the driver
    ======================  ===============================================================================
    The k-th allocation of a section has *slot* k.

Sizes: ``sizes``, one row of five int64 coefficients
    bytes = ``sizes[arg] @ [1, L, n, n * n, n * L]`` with L = context length after the step and n = tokens of this turn
    after the step (both from the schedule). A decode step that only depends on L uses the first two columns.

Sections: ``section_names`` and ``section_start``
    section i = ``events[section_start[i] : section_start[i + 1]]``.

Carried objects: ``carried``, section name -> slots
    When a turn ends, the last of its rows whose section is named here decides what the turn carries over: its slots,
    in this order (a KV cache, kept logits). In the next turn ``FREE_CARRIED`` frees them by position. Without such a
    row the next turn finds nothing carried. A turn ends where the schedule's turn number changes.

Schedule: int64 array of shape (rows, 4): ``(turn, section, L, n)``
    Loading is turn 0, the turns of a chat 1, 2, ...; ``age`` counts rows of the schedule backwards, across turns too.

Owners: ``owners``, names of what the bytes are for ("weights", "kv", ...)
    A replay reports the allocated bytes of each owner.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from glmlab.core.errors import GlmlabError
from glmlab.core.units import GIB

ALLOCATE, FREE, FREE_FIRST, FREE_CARRIED, EMPTY_CACHE = range(5)
MAX_AGE = 3
"""How many rows back an event may point; a replay keeps that many rows of live blocks."""

MAX_REQUEST_BYTES = 256 * GIB
"""The largest size that a program may ask for."""

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


class EventProgramError(GlmlabError):
    """A table of events or a schedule that cannot be replayed; says which event and why."""


@dataclass(frozen=True)
class EventProgram:
    """Events, sizes and sections of a run; the top of this module describes the format.

    Raises:
        EventProgramError: sections, events, sizes or carried slots do not fit together.

    Example:
        >>> program = EventProgram(
        ...     events=[(ALLOCATE, 0, 0, 0), (ALLOCATE, 0, 1, 0), (FREE, 0, 0, 0)],
        ...     sizes=[(4096, 0, 0, 0, 0), (0, 512, 0, 0, 0)],
        ...     section_names=("load", "step"),
        ...     section_start=[0, 0, 3],
        ... )
        >>> program.slots("step")
        2
        >>> program.bytes_at(context=10, turn_tokens=3).tolist()
        [4096, 5120]
    """

    events: Int32Array  # (events, 4): mode, age, arg, owner
    sizes: Int64Array  # (sizes, 5): coefficients over [1, L, n, n * n, n * L]
    section_names: Sequence[str]
    section_start: Int64Array  # (sections + 1,)
    carried: Mapping[str, Sequence[int]] = field(default_factory=dict)
    owners: Sequence[str] = ("all",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "events", _table(self.events, np.int32, 4, "an event is (mode, age, arg, owner)"))
        object.__setattr__(self, "sizes", _table(self.sizes, np.int64, 5, "a size has five coefficients"))
        object.__setattr__(self, "section_start", np.ascontiguousarray(self.section_start, np.int64))
        object.__setattr__(self, "section_names", tuple(self.section_names))
        object.__setattr__(self, "owners", tuple(self.owners))
        object.__setattr__(self, "carried", {name: tuple(slots) for name, slots in self.carried.items()})
        self._check_sections()
        self._check_events()

    def section(self, name: str) -> int:
        """Return the number of a section; :class:`EventProgramError` for a name that is not there."""
        if name not in self.section_names:
            raise EventProgramError(f"no section {name!r} in this program; it has: {', '.join(self.section_names)}")
        return list(self.section_names).index(name)

    def events_of(self, name: str) -> Int32Array:
        """Return the events of one section, shape (events, 4)."""
        i = self.section(name)
        return self.events[self.section_start[i] : self.section_start[i + 1]]

    def slots(self, name: str) -> int:
        """Return how many objects a section allocates."""
        return int(np.count_nonzero(self.events_of(name)[:, 0] == ALLOCATE))

    def bytes_at(self, context: int, turn_tokens: int) -> Int64Array:
        """Bytes of every row of ``sizes`` at one step, shape (sizes,)."""
        L, n = context, turn_tokens  # noqa: N806 - the names of the format
        sizes: Int64Array = self.sizes @ np.array([1, L, n, n * n, n * L], np.int64)
        return sizes

    def checked_schedule(self, schedule: npt.ArrayLike) -> Int64Array:
        """Return a schedule as an array (rows, 4).

        Raises:
            EventProgramError: another shape, a row of no section, or a size that no tensor has (see
                :data:`MAX_REQUEST_BYTES`).
        """
        rows = np.ascontiguousarray(schedule, np.int64)
        rows = rows.reshape(0, 4) if rows.size == 0 else rows
        is_table = rows.ndim == 2 and rows.shape[1] == 4
        if not is_table or np.any((rows < 0)[:, 1:]) or np.any(rows[:, 1] >= len(self.section_names)):
            raise EventProgramError(
                "every row of a schedule is (turn, section, L, n) with no negative L or n and a section from 0 to "
                f"{len(self.section_names) - 1}"
            )
        for section in np.unique(rows[:, 1]):
            self._check_sizes(self.section_names[section], rows[rows[:, 1] == section, 2:])
        return rows

    def _check_sizes(self, section: str, lengths: Int64Array) -> None:
        """Refuse sizes below 0 or over the largest request; in floats, because integers would wrap around."""
        context, tokens = lengths.astype(np.float64).T
        terms = np.stack([np.ones_like(context), context, tokens, tokens * tokens, tokens * context])
        events = self.events_of(section)
        used = np.unique(events[events[:, 0] == ALLOCATE][:, 2])
        n_bytes = self.sizes[used].astype(np.float64) @ terms  # (sizes used, rows)
        if n_bytes.size and (n_bytes.min() < 0 or n_bytes.max() > MAX_REQUEST_BYTES):
            i, j = np.unravel_index(np.argmin(n_bytes) if n_bytes.min() < 0 else np.argmax(n_bytes), n_bytes.shape)
            raise EventProgramError(
                f"size {used[i]} of section {section!r} is {n_bytes[i, j]:.0f} B at context length {context[j]:.0f}: "
                "no tensor has that size"
            )

    def _check_sections(self) -> None:
        start, expected = self.section_start, len(self.section_names) + 1
        if len(start) != expected or start[0] != 0 or start[-1] != len(self.events) or np.any(np.diff(start) < 0):
            raise EventProgramError(
                f"section_start must rise from 0 to {len(self.events)} (the number of events) in {expected} entries, "
                f"one more than section_names; it is {start.tolist()}"
            )
        for name, slots in self.carried.items():
            if any(not 0 <= slot < self.slots(name) for slot in slots):
                raise EventProgramError(
                    f"section {name!r} carries slots {slots}, but it allocates only {self.slots(name)} objects"
                )

    def _check_events(self) -> None:
        modes, ages, args, owners = self.events.T
        wrong = (
            (modes > EMPTY_CACHE)
            | np.any(self.events < 0, axis=1)
            | (owners >= len(self.owners))
            | ((modes == FREE) & (ages > MAX_AGE))
            | ((modes == ALLOCATE) & (args >= len(self.sizes)))
        )
        if wrong.any():
            i = int(np.argmax(wrong))
            raise EventProgramError(
                f"event {i} is {tuple(self.events[i].tolist())}: the mode must be 0 to {EMPTY_CACHE}, the age of a "
                f"free at most {MAX_AGE}, a size below {len(self.sizes)} and an owner below {len(self.owners)}"
            )


def _table(rows: npt.ArrayLike, dtype: npt.DTypeLike, columns: int, says: str) -> npt.NDArray[Any]:
    table = np.ascontiguousarray(rows, dtype)
    if table.size and (table.ndim != 2 or table.shape[1] != columns):
        raise EventProgramError(f"{says}; this table has the shape {table.shape}")
    return table.reshape(-1, columns)


@dataclass(frozen=True)
class Replay:
    """What the allocator held after (and at the worst moment of) every row of a schedule; all sizes in bytes.

    ``allocated + inactive_small + inactive_large == reserved`` in every row. With a capacity the replay ends before
    the row that did not fit: ``rows`` is then shorter than the schedule and ``out_of_memory`` is what PyTorch would
    raise.
    """

    reserved: Int64Array  # (rows,) after the row
    reserved_small: Int64Array  # (rows,) the small pool's part of it
    allocated: Int64Array  # (rows,) after the row
    peak_allocated: Int64Array  # (rows,) highest within the row
    peak_allocated_small: Int64Array  # (rows,) the small pool's part of peak_allocated, at that moment
    inactive_small: Int64Array  # (rows,) in the small pool after the row
    inactive_large: Int64Array  # (rows,) in the large pool after the row
    allocated_by_owner: Int64Array  # (rows, owners) after the row
    growth: Int64Array  # (segments, 4): row, event (index into program.events), segment bytes, pool (0 small, 1 large)
    out_of_memory: GlmlabError | None = None

    @property
    def rows(self) -> int:
        """How many rows of the schedule were completed."""
        return len(self.reserved)
