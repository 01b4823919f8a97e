"""What a GPU would show for a workload, step by step and by component, without a GPU.

A workload's trace says what is asked of the allocator, the replay says what the allocator takes from the driver, and
the CUDA context comes on top. Every row of the table is a forward pass; row 0 is the state after loading. In every
row

    used = weights + quantisation state + KV payload + KV copies + activations + slack (small, large) + CUDA context

exactly. All but the context are counted at the step's busiest moment: ``activations`` is what the step has in flight
then (cuBLAS's workspace included), ``kv_copies`` is what keys and values hold beyond the payload (copies that the
generation loop keeps, rounding, the unfilled part of a static cache, kept outputs), and slack is what the allocator
holds idle then.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from glmlab.allocator.blocks import SegmentView
from glmlab.allocator.program import EMPTY_CACHE, EventProgram, Int64Array, Replay
from glmlab.allocator.replay import StepReplayer
from glmlab.core.cards import find_card
from glmlab.core.curve import COMPONENTS, Curve
from glmlab.core.errors import GlmlabError
from glmlab.core.units import MIB, format_bytes
from glmlab.forecast.workload import Workload, WorkloadError
from glmlab.tracing.trace import OWNERS, WEIGHT_OWNERS, AllocationTrace, Turn, load_recorded

ASSUMED_CONTEXT_MIB = 119.0
"""CUDA context where nothing is known of the card: that of the only card whose figure we have (an RTX 4060)."""

SEEDS = (1, 2, 3)
"""Orders in which the driver may hand out addresses, beside rising; the band is what they change."""


WARM_UP_SPARES_BYTES = int(1.2 * 1024**3)
"""What transformers' caching_allocator_warmup leaves of a card (modeling_utils.py)."""


class ForecastError(GlmlabError):
    """A workload that cannot be forecast, such as one beyond the model's context limit."""


@dataclass(frozen=True)
class Capacity:
    """How far a card goes: the longest context that fits, and what ends it."""

    context_tokens: int
    limited_by: str  # "memory" or "model"
    message: str  # of the out-of-memory error, or the model's limit
    card: str
    used_mib: float  # at that context

    def __str__(self) -> str:
        return f"{self.card}: {self.context_tokens:,} tokens ({self.used_mib:,.0f} MiB), limited by {self.limited_by}"


@dataclass(frozen=True)
class Run:
    """A replayed workload: what the figures of a forecast are made of."""

    workload: Workload
    trace: AllocationTrace  # with the workload's empty_cache() events and the card's cap on the warm-up block
    schedule: Int64Array
    replay: Replay
    context_mib: float
    context_source: str
    capacity_bytes: int | None

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Rows of the schedule that are loading or a forward pass, as far as memory lasted."""
        is_shown = self.trace.is_step(self.schedule)
        is_shown[0] = True
        return np.flatnonzero(is_shown[: self.replay.rows])

    def segments_after(self, row: int) -> list[SegmentView]:
        """Segments with their blocks after a row of the schedule (see ``CachingAllocator.segments``)."""
        replayer = _replayer(self.trace.program, self.capacity_bytes, self.context_mib)
        replayer.run(self.schedule[: row + 1])
        return replayer.segments()

    def segments_at(self, context_tokens: int) -> list[Any]:
        """Segments with their blocks after the first step that reaches a context length.

        Raises:
            ForecastError: the run ends before.
        """
        reached = self.schedule[self.rows, 2]
        if context_tokens > reached[-1]:
            raise ForecastError(
                f"the run ends at {reached[-1]:,} tokens, before {context_tokens:,}. Ask for fewer, or give more turns."
            )
        return self.segments_after(int(self.rows[np.searchsorted(reached, context_tokens)]))


def forecast(workload: Workload, *, seeds: Sequence[int] = SEEDS) -> Curve:
    """Memory at every step of a workload, by component.

    Args:
        workload: what runs; with a card, memory ends where the card's does.
        seeds: orders of segment addresses to try for the band.

    Returns:
        A Curve of kind "forecast". Columns: step, turn, context_tokens, allocated_mib, reserved_mib, used_mib,
        peak_allocated_mib, :data:`COMPONENTS`, and inactive_small_after_mib,
        inactive_large_after_mib (inactive after the step). Where the
        order of addresses matters, used_min_mib and used_max_mib. Its provenance says what the CUDA context is, what
        was modelled, and ``out_of_memory`` where the card was full.

    Raises:
        ForecastError: the turns pass the model's context limit, or the card cannot even load the model.
        TraceError: the model cannot be traced.

    Example:
        >>> curve = forecast(Workload.recorded("chatglm3-6b-original-int4", turns="8:418"))
        >>> curve.table[["step", "context_tokens", "reserved_mib"]].iloc[[0, -1]].values.tolist()
        [[0.0, 0.0, 4584.0], [418.0, 425.0, 4612.0]]
    """
    run = run_workload(workload)
    if not len(run.rows):
        raise _no_fit(run)
    table = _table(run)
    band = [run_workload(workload, address_seed=seed).replay.reserved for seed in seeds]
    rows = run.rows
    n_rows = min([len(rows), *(int(np.searchsorted(rows, len(reserved))) for reserved in band)])
    if any(np.any(reserved[rows[:n_rows]] != run.replay.reserved[rows[:n_rows]]) for reserved in band):
        of_seeds = (
            np.stack([reserved[rows[:n_rows]] for reserved in (run.replay.reserved, *band)]) / MIB + run.context_mib
        )
        table = table.iloc[:n_rows].assign(used_min_mib=of_seeds.min(axis=0), used_max_mib=of_seeds.max(axis=0))
    return Curve(table, _provenance(run), kind="forecast", label=_label(run))


def run_workload(workload: Workload, *, address_seed: int | None = None) -> Run:
    """Trace and replay a workload; :func:`forecast` tells what it raises."""
    trace = _trace_of(workload)
    limit = trace.facts.context_limit
    if limit and workload.context_tokens > limit:
        raise ForecastError(
            f"the turns reach {workload.context_tokens:,} tokens, but {trace.facts.model} is made for {limit:,} (its "
            "config's max_position_embeddings). Ask for fewer tokens, or take a model with a longer context."
        )
    context_mib, context_source = cuda_context(workload)
    capacity_bytes = find_card(workload.card).memory_mib * MIB if workload.card else None
    trace = _with_settings(trace, workload, capacity_bytes)
    schedule = trace.schedule(workload.turns)
    replay = _replayer(trace.program, capacity_bytes, context_mib, address_seed).run(schedule)
    return Run(workload, trace, schedule, replay, context_mib, context_source, capacity_bytes)


def cuda_context(workload: Workload) -> tuple[float, str]:
    """MiB of the CUDA context, and where the figure comes from."""
    if workload.cuda_context_mib is not None:
        return workload.cuda_context_mib, "given"
    if workload.card:
        card = find_card(workload.card)
        if card.cuda_context_mib is not None:
            return card.cuda_context_mib, f"{card.name}: {card.source}"
    of_card = f"none is known for {find_card(workload.card).name}" if workload.card else "no card is given"
    return ASSUMED_CONTEXT_MIB, f"assumed, {of_card}: an RTX 4060's figure; name a card for its own"


def largest_context(workload: Workload, card: str) -> Capacity:
    """The longest context that fits on a card: one turn that goes on until the card or the model ends it.

    The workload's own turns do not matter. A short prompt is read first; a long one needs more at once. A static cache
    takes its whole length with the first prefill: where ``static_tokens`` leaves that length open, the longest one that
    fits is searched for, with a trace (some seconds) for every length that is tried.

    Raises:
        ForecastError: not even the model fits.

    Example:
        >>> largest_context(Workload.recorded("chatglm3-6b-original-int4"), "RTX 4060").limited_by
        'model'
    """
    on_card = replace(workload, card=find_card(card).name)
    open_length = workload.cache == "static" and not workload.static_tokens
    shortest = on_card.with_tokens(_shortest_static_cache()) if open_length else on_card
    limit = _trace_of(shortest).facts.context_limit
    if not limit:
        raise ForecastError(
            f"{workload.name} states no context limit to search up to. Give turns and read the forecast."
        )
    if workload.static_tokens:
        limit = min(limit, workload.static_tokens)
    run = run_workload(on_card.with_tokens(limit))
    if open_length and run.replay.out_of_memory:
        return _longest_static_cache(run_workload(shortest), run, limit)
    return _capacity(run, limit)


def _shortest_static_cache() -> int:
    from glmlab.tracing.tracer import LONGEST

    return LONGEST


def _longest_static_cache(fits: Run, too_long: Run, limit: int) -> Capacity:
    """Halve the interval between a static cache that fits and one that does not, until they are one token apart."""
    fails = limit
    if fits.replay.out_of_memory:
        raise _no_fit(fits)
    while fails - fits.workload.context_tokens > 1:
        run = run_workload(fits.workload.with_tokens((fails + fits.workload.context_tokens) // 2))
        if run.replay.out_of_memory:
            too_long, fails = run, run.workload.context_tokens
        else:
            fits = run
    return replace(_capacity(fits, limit), limited_by="memory", message=str(too_long.replay.out_of_memory))


def _capacity(run: Run, limit: int) -> Capacity:
    """How far a single turn came."""
    rows = run.rows
    failure = run.replay.out_of_memory
    if len(rows) < 2:
        raise _no_fit(run)
    used_mib = float(run.replay.reserved[rows[-1]] / MIB + run.context_mib)
    tokens = int(run.schedule[rows[-1], 2])
    message = str(failure) if failure else f"the model is made for {limit:,} tokens"
    return Capacity(tokens, "memory" if failure else "model", message, run.workload.card, used_mib)


def _no_fit(run: Run) -> ForecastError:
    workload = run.workload
    return ForecastError(
        f"{workload.name} in {workload.precision} does not fit on {find_card(workload.card).name}: "
        f"{run.replay.out_of_memory} Take a smaller precision, or a card with more memory."
    )


def _trace_of(workload: Workload) -> AllocationTrace:
    if workload.recorded_trace:
        return load_recorded(workload.recorded_trace)
    from glmlab.tracing.tracer import trace  # a recorded trace needs no torch

    return trace(workload.trace_settings())


def _with_settings(trace: AllocationTrace, workload: Workload, capacity_bytes: int | None) -> AllocationTrace:
    """The trace with the card's cap on the loader's warm-up block, and with the workload's empty_cache() calls."""
    program = trace.program
    sizes = program.sizes.copy()
    if trace.facts.warmup_size >= 0 and capacity_bytes is not None:
        row = sizes[trace.facts.warmup_size]
        row[0] = max(min(int(row[0]), capacity_bytes - WARM_UP_SPARES_BYTES), 0) // 2 * 2
    empties = np.array([_empties_cache(workload, name) for name in program.section_names])
    ends = program.section_start[1:][empties]  # the new events go before these
    shifted = program.section_start + np.concatenate([[0], np.cumsum(empties)])
    return AllocationTrace(
        replace(
            program,
            sizes=sizes,
            events=np.insert(program.events, ends, (EMPTY_CACHE, 0, 0, 0), axis=0),
            section_start=shifted,
        ),
        trace.facts,
        trace.labels,
        np.insert(trace.label_of_event, ends, -1),
        np.insert(trace.layer_of_event, ends, -1),
    )


def _empties_cache(workload: Workload, section: str) -> bool:
    """Whether the workload calls empty_cache() at the end of a section."""
    moment = "load" if section == "load" else "turn" if ".end" in section else ""
    return moment in workload.empty_cache


def _replayer(
    program: EventProgram, capacity_bytes: int | None, context_mib: float, address_seed: int | None = None
) -> StepReplayer:
    return StepReplayer(
        program,
        capacity_bytes=capacity_bytes,
        outside_bytes=int(context_mib * MIB) if capacity_bytes is not None else 0,
        address_seed=address_seed,
    )


def _table(run: Run) -> pd.DataFrame:
    rows, replay, facts = run.rows, run.replay, run.trace.facts
    turns = run.schedule[rows, 0]
    context = run.schedule[rows, 2]
    by_owner = {owner: replay.allocated_by_owner[rows, i] for i, owner in enumerate(OWNERS)}
    payload = context * facts.kv_bytes_per_token
    kept = by_owner["kv_cache"] + by_owner["kept_outputs"]
    state = sum(by_owner[owner] for owner in WEIGHT_OWNERS) + by_owner["quantisation_state"] + kept
    peak, peak_small = replay.peak_allocated[rows], replay.peak_allocated_small[rows]
    small = replay.reserved_small[rows]
    # loading ends with nothing in flight; its peak is over
    peak = np.where(turns == 0, replay.allocated[rows], peak)
    peak_small = np.where(turns == 0, small - replay.inactive_small[rows], peak_small)
    large = replay.reserved[rows] - small
    components = {
        **{f"{owner}_mib": by_owner[owner] for owner in WEIGHT_OWNERS},
        "quantisation_state_mib": by_owner["quantisation_state"],
        "kv_payload_mib": payload,
        "kv_copies_mib": kept - payload,
        "activations_mib": peak - state,
        "inactive_small_mib": small - peak_small,
        "inactive_large_mib": large - (peak - peak_small),
    }
    columns: dict[str, Any] = {
        "step": np.arange(len(rows)),
        "turn": turns,
        "context_tokens": context,
        "allocated_mib": replay.allocated[rows] / MIB,
        "reserved_mib": replay.reserved[rows] / MIB,
        "used_mib": replay.reserved[rows] / MIB + run.context_mib,
        "peak_allocated_mib": replay.peak_allocated[rows] / MIB,
        **{name: n_bytes / MIB for name, n_bytes in components.items()},
        "cuda_context_mib": np.full(len(rows), run.context_mib),
        "inactive_small_after_mib": replay.inactive_small[rows] / MIB,
        "inactive_large_after_mib": replay.inactive_large[rows] / MIB,
    }
    return pd.DataFrame(columns)


def _provenance(run: Run) -> dict[str, Any]:
    facts, failure = run.trace.facts, run.replay.out_of_memory
    provenance: dict[str, Any] = {
        "workload": workload_fields(run.workload),
        "model": facts.model,
        "precision": facts.precision,
        "trace": facts.description,
        "modelled": facts.effects,
        "versions": facts.versions,
        "kv_bytes_per_token": facts.kv_bytes_per_token,
        "cuda_context_mib": run.context_mib,
        "cuda_context_source": run.context_source,
    }
    if run.workload.card:
        provenance["card"] = find_card(run.workload.card).name
        provenance["card_memory_mib"] = find_card(run.workload.card).memory_mib
    if failure is not None:
        rows = run.rows
        provenance["out_of_memory"] = {
            "message": str(failure),
            "fits_context_tokens": int(run.schedule[rows[-1], 2]),
            "fails_context_tokens": int(run.schedule[run.replay.rows, 2]),
            "turn": int(run.schedule[run.replay.rows, 0]),
        }
    return provenance


def workload_fields(workload: Workload) -> dict[str, Any]:
    """The fields of a workload as JSON can hold them; :func:`workload_from_fields` reads them."""
    return {**asdict(workload), "turns": [list(turn) for turn in workload.turns]}


def workload_from_fields(fields: Mapping[str, Any]) -> Workload:
    """The workload of :func:`workload_fields`; :class:`WorkloadError` for anything else."""
    try:
        values = dict(fields)
        values["turns"] = tuple(Turn(*turn) for turn in values["turns"])
        for name in ("keeps", "without_effects", "empty_cache"):
            values[name] = tuple(values[name])
        return Workload(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise WorkloadError(f"this is no forecast of this version ({error}). Compute it again.") from error


def _label(run: Run) -> str:
    workload, facts = run.workload, run.trace.facts
    parts = [facts.model, facts.precision]
    if not workload.recorded_trace:
        parts += [workload.attention, f"{workload.cache} cache"]
        if workload.batch > 1:
            parts.append(f"batch {workload.batch}")
    if workload.card:
        parts.append(find_card(workload.card).name)
    return ", ".join(parts)


def summary(curve: Curve) -> list[str]:
    """A forecast in a few lines, for a terminal."""
    table, notes = curve.table, curve.provenance
    first, last = table.iloc[0], table.iloc[-1]
    lines = [
        curve.label,
        f"CUDA context {notes['cuda_context_mib']:g} MiB ({notes['cuda_context_source']})",
        f"after loading    {first['used_mib']:10,.1f} MiB used, {first['reserved_mib']:10,.1f} reserved, "
        f"{first['allocated_mib']:10,.1f} allocated",
        f"{int(last['context_tokens']):,} tokens".ljust(16)
        + f" {last['used_mib']:10,.1f} MiB used, {last['reserved_mib']:10,.1f} reserved, "
        f"{last['allocated_mib']:10,.1f} allocated",
    ]
    lines += [f"    {label:24} {last[column]:10,.2f} MiB" for column, label in COMPONENTS.items()]
    if "used_min_mib" in table:
        spread = float((table["used_max_mib"] - table["used_min_mib"]).max())
        lines.append(f"the order of segment addresses changes this by up to {format_bytes(spread * MIB)}")
    if "out_of_memory" in notes:
        failure = notes["out_of_memory"]
        lines.append(f"out of memory at {failure['fails_context_tokens']:,} tokens: {failure['message']}")
    return lines
