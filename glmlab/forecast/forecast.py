"""What a GPU would show for a workload, step by step and by component, without a GPU.

A trace lists what the workload asks of the allocator, the replay says what the allocator takes from the driver, and the
CUDA context is added. Every row of the curve is a forward pass; row 0 is the state after loading. In every row

    used = weights + quantisation state + KV payload + KV copies + activations + inactive (small, large) + CUDA context

exactly. All but the context are counted at the step's busiest moment: ``activations`` is what the step has in flight
then (cuBLAS's workspace included), ``kv_copies`` is what keys and values hold beyond the payload (copies that the
generation loop keeps, rounding, the unfilled part of a static cache, kept outputs), and ``inactive`` is what the
allocator has reserved and nobody uses.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from glmlab.allocator.blocks import SegmentView
from glmlab.allocator.program import Int64Array, Replay
from glmlab.allocator.replay import StepReplayer
from glmlab.core.cards import Card, cuda_context, find_card
from glmlab.core.curve import COMPONENTS, Curve
from glmlab.core.units import MIB, format_bytes
from glmlab.forecast.capacity import Capacity, largest_context
from glmlab.forecast.explanation import Plateau, Rise, explanation_text, find_plateaus, find_rises
from glmlab.forecast.workload import (
    ForecastError,
    Turns,
    Workload,
    beyond_limit,
    parse_turns,
    resolve_model,
)
from glmlab.tracing.cached import trace
from glmlab.tracing.trace import OWNERS, WEIGHT_OWNERS, AllocationTrace, load_recorded

SEEDS = (1, 2, 3)
"""Orders in which the driver may hand out addresses, other than rising; the band is what they change."""


class Forecast:
    """Memory of a model at every context length, by component, and why it rises; computed, without a GPU.

    Make one with :meth:`of`. Trace, schedule and replay are made when first needed, and kept. In a notebook a forecast
    shows its summary and its chart.
    """

    def __init__(self, workload: Workload, trace: AllocationTrace | None = None) -> None:
        self.workload = workload
        if trace is not None:
            self.trace = trace

    @classmethod
    def of(
        cls,
        model: str | Mapping[str, Any] | None = None,
        *,
        trace: str = "",
        turns: Turns | None = None,
        tokens: int | None = None,
        card: str | Card | None = None,
        **fields: Any,
    ) -> "Forecast":
        """Forecast a model, or a recorded trace of ``data/traces``.

        Args:
            model: hub id, folder, config.json, a name of ``data/configs``, or the fields of a config.json.
            trace: instead of a model, the name of a recorded trace.
            turns: ``"30:500,30:500"`` (prompt tokens:generated tokens) or pairs.
            tokens: instead of turns, one turn that reaches this context length.
            card: a GPU of ``data/gpus.csv``, whose memory ends the run, or a :class:`Card` of your own.
            fields: further fields of :class:`Workload`: precision, attention, cache, batch, …

        Raises:
            ForecastError: a field that is not known or cannot be; neither a model nor a trace, or both.
            CheckpointError, TraceError, CardError: no such model, trace or card.

        Example:
            >>> forecast = Forecast.of(trace="chatglm3-6b-original-int4", turns="8:418")
            >>> forecast.curve.table[["step", "context_tokens", "reserved_mib"]].iloc[[0, -1]].values.tolist()
            [[0.0, 0.0, 4584.0], [418.0, 425.0, 4612.0]]
            >>> forecast.rises[-1].pool, forecast.rises[-1].request.operation
            ('small', 'aten.sort.default')
        """
        if (model is None) == (not trace):
            raise ForecastError("give either a model or the name of a recorded trace (trace=...).")
        fields |= {"turns": parse_turns(turns, tokens), "card": find_card(card) if card else None}
        if model is not None:
            name, config = resolve_model(model)
            return cls(Workload(name, config, **fields))
        recorded = load_recorded(trace)
        if own := fields.keys() - {"turns", "card", "cuda_context_mib", "empty_cache"}:
            raise ForecastError(f"a recorded trace has its own {', '.join(sorted(own))}. Leave that out.")
        return cls(Workload(trace, recorded_trace=trace, precision=recorded.facts.precision, **fields), recorded)

    def replace(
        self,
        *,
        turns: Turns | None = None,
        tokens: int | None = None,
        card: str | Card | None = None,
        **fields: Any,
    ) -> "Forecast":
        """The same model with other turns, another card or other fields; the trace is kept where it stays the same.

        Example:
            >>> forecast = Forecast.of(trace="chatglm3-6b-original-int4", turns="8:418")
            >>> float(forecast.replace(empty_cache=("load",)).curve.table["reserved_mib"].iloc[0])
            3942.0
        """
        if turns is not None or tokens is not None:
            fields["turns"] = parse_turns(turns, tokens)
        if card is not None:
            fields["card"] = find_card(card)
        workload = replace(self.workload, **fields)
        if "trace" not in vars(self):
            return Forecast(workload)
        is_same = bool(workload.recorded_trace) or workload.trace_settings() == self.workload.trace_settings()
        return Forecast(workload, self.trace if is_same else None)

    # -- what is computed once ----------------------------------------------------------------------------------------

    @cached_property
    def context(self) -> tuple[float, str]:
        """MiB of the CUDA context, and where the figure comes from."""
        given = self.workload.cuda_context_mib
        return cuda_context(self.workload.card) if given is None else (given, "given")

    @cached_property
    def trace(self) -> AllocationTrace:
        """Every allocation and free of the model, for any turns."""
        if self.workload.recorded_trace:
            return load_recorded(self.workload.recorded_trace)
        return trace(self.workload.trace_settings())

    @cached_property
    def schedule(self) -> Int64Array:
        """Rows (turn, section, context length, tokens of the turn): loading, every step, the end of every turn."""
        if self.note:
            if self.workload.recorded_trace:
                raise ForecastError(f"{self.note} The recorded code fails beyond; ask for fewer tokens.")
            warnings.warn(self.note, stacklevel=2)
        return self._prepared.schedule(self.workload.turns)

    @cached_property
    def replay(self) -> Replay:
        """What the allocator holds after every row of the schedule, as far as the card's memory lasts."""
        return self._replayer().run(self.schedule)

    @cached_property
    def steps(self) -> Int64Array:
        """Rows of the schedule that are loading or a forward pass, as far as memory lasts."""
        is_shown = self._prepared.is_step(self.schedule)
        is_shown[0] = True
        return np.flatnonzero(is_shown[: self.replay.rows])

    @property
    def reached(self) -> int:
        """Context length after the last step that fits; 0 where nothing fits."""
        return int(self.schedule[self.steps[-1], 2]) if len(self.steps) else 0

    @cached_property
    def curve(self) -> Curve:
        """Memory at every step, by component.

        Columns: step, turn, context_tokens, allocated_mib, reserved_mib, used_mib, peak_allocated_mib, those of
        :data:`~glmlab.core.curve.COMPONENTS`, and inactive_small_after_mib, inactive_large_after_mib (after the step).
        Its provenance says what the CUDA context is, what was modelled, and ``out_of_memory`` where the card was full.

        Raises:
            ForecastError: the card cannot even load the model.
            TraceError: the model cannot be traced.
        """
        if not len(self.steps):
            raise ForecastError(f"{self._no_fit} Take a smaller precision, or a card with more memory.")
        return Curve(self._table(), self._provenance(), kind="forecast", label=self.label)

    @cached_property
    def band(self) -> pd.DataFrame:
        """``used_min_mib`` and ``used_max_mib`` of every step over :data:`SEEDS`; no columns where no order matters."""
        replays = [self.replay, *(self._replayer(seed).run(self.schedule) for seed in SEEDS)]
        n_steps = min(int(np.searchsorted(self.steps, replay.rows)) for replay in replays)
        used = np.stack([replay.reserved[self.steps[:n_steps]] for replay in replays]) / MIB + self.context[0]
        if (used == used[0]).all():
            return pd.DataFrame(index=range(len(self.steps)))
        return pd.DataFrame({"used_min_mib": used.min(axis=0), "used_max_mib": used.max(axis=0)})

    @cached_property
    def rises(self) -> tuple[Rise, ...]:
        """Every segment that the allocator takes from the driver, with the request that made it."""
        return find_rises(self._prepared, self.schedule, self.replay, self.steps)

    @cached_property
    def plateaus(self) -> tuple[Plateau, ...]:
        """Long stretches without a rise, with their reason."""
        return find_plateaus(self._prepared, self.schedule, self.steps, self.rises, self._segments_after)

    # -- questions ----------------------------------------------------------------------------------------------------

    def curve_with_band(self) -> Curve:
        """:attr:`curve` with the columns of :attr:`band`, which takes three more replays."""
        return replace(self.curve, table=self.curve.table.join(self.band, how="inner"))

    def segments(self, *, tokens: int) -> list[SegmentView]:
        """The allocator's segments with their blocks after the first step that reaches a context length.

        Raises:
            ForecastError: the run ends before.
        """
        if tokens > self.reached:
            raise ForecastError(
                f"the run ends at {self.reached:,} tokens, before {tokens:,}. Ask for fewer, or give more turns."
            )
        step = np.searchsorted(self.schedule[self.steps, 2], tokens)
        return self._segments_after(int(self.steps[step]))

    def explain(self) -> str:
        """Every rise and every plateau, one a line."""
        return explanation_text(self.rises, self.plateaus)

    def largest_context(self, card: str | Card | None = None) -> Capacity:
        """The longest context that fits on a card: one turn that goes on until the card or the model ends it.

        The forecast's own turns do not matter: a short prompt is read first. A static cache takes its whole length with
        the first prefill; where ``static_tokens`` leaves that length open, the longest one that fits is searched for,
        with a trace (some seconds) for every length that is tried.

        Args:
            card: default: the forecast's own.

        Raises:
            ForecastError: no card, or a model without a context limit to search up to.

        Example:
            >>> print(Forecast.of(trace="chatglm3-6b-original-int4").largest_context("RTX 4060"))
            RTX 4060: 8,192 tokens (4,821 MiB), limited by model
        """
        return largest_context(self if card is None else self.replace(card=card))

    # -- how it is shown ----------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """Model, precision, attention, cache and card in a few words."""
        workload = self.workload
        if workload.recorded_trace:
            parts = [self.trace.facts.model, workload.precision]
        else:
            parts = [workload.name, workload.precision, workload.attention, f"{workload.cache} cache"]
        if workload.batch > 1:
            parts.append(f"batch {workload.batch}")
        return ", ".join([*parts, workload.card.name] if workload.card else parts)

    @property
    def note(self) -> str:
        """Says that the turns pass the length that the model is made for; "" where they do not."""
        return beyond_limit(self.workload.name, self.workload.context_tokens, self.trace.facts.context_limit)

    def summary(self) -> str:
        """The forecast in a few lines."""
        table, (context_mib, source) = self.curve.table, self.context
        lines = [self.label, f"CUDA context {context_mib:g} MiB ({source})"]
        for when, row in (("after loading", table.iloc[0]), (f"{self.reached:,} tokens", table.iloc[-1])):
            lines.append(
                f"{when:16} {row['used_mib']:10,.1f} MiB used, {row['reserved_mib']:10,.1f} reserved, "
                f"{row['allocated_mib']:10,.1f} allocated"
            )
        lines += [f"    {label:24} {table[column].iloc[-1]:10,.2f} MiB" for column, label in COMPONENTS.items()]
        if not self.band.columns.empty:
            spread = float((self.band["used_max_mib"] - self.band["used_min_mib"]).max())
            lines.append(f"the order of segment addresses changes this by up to {format_bytes(spread * MIB)}")
        if failure := self.curve.provenance.get("out_of_memory"):
            lines.append(f"out of memory at {failure['fails_context_tokens']:,} tokens: {failure['message']}")
        return "\n".join([*lines, self.note] if self.note else lines)

    def __repr__(self) -> str:
        return f"Forecast({self.label!r}, {len(self.workload.turns)} turns to {self.workload.context_tokens:,} tokens)"

    def _repr_html_(self) -> str:
        from glmlab.figures import component_chart

        if not len(self.steps):
            return f"<pre>{escape(self._no_fit)}</pre>"
        data, _ = component_chart(self.curve)._repr_mimebundle_()
        return f"<pre>{escape(self.summary())}</pre>\n{data['text/html']}"

    # -- inside -------------------------------------------------------------------------------------------------------

    _looked_at: tuple[int, StepReplayer] | None = None  # rows that a replayer has done, to look at its segments

    @property
    def _no_fit(self) -> str:
        workload = self.workload
        card = workload.card.name if workload.card else "this GPU"
        return f"{workload.name} in {workload.precision} does not fit on {card}: {self.replay.out_of_memory}"

    @cached_property
    def _prepared(self) -> AllocationTrace:
        return self.workload.prepare(self.trace)

    def _replayer(self, address_seed: int | None = None) -> StepReplayer:
        card = self.workload.card
        return StepReplayer(
            self._prepared.program,
            capacity_bytes=card.memory_mib * MIB if card else None,
            outside_bytes=int(self.context[0] * MIB) if card else 0,
            address_seed=address_seed,
        )

    def _segments_after(self, row: int) -> list[SegmentView]:
        """Segments after a row of the schedule; a look further on goes on where the last one was."""
        done, replayer = self._looked_at or (0, self._replayer())
        if done > row + 1:
            done, replayer = 0, self._replayer()
        replayer.run(self.schedule[done : row + 1])
        self._looked_at = (row + 1, replayer)
        return replayer.segments()

    def _table(self) -> pd.DataFrame:
        rows, replay = self.steps, self.replay
        turns, context = self.schedule[rows, 0], self.schedule[rows, 2]
        by_owner = {owner: replay.allocated_by_owner[rows, i] for i, owner in enumerate(OWNERS)}
        weights = {f"{owner}_mib": by_owner[owner] for owner in WEIGHT_OWNERS}
        payload = context * self.trace.facts.kv_bytes_per_token
        kept = by_owner["kv_cache"] + by_owner["kept_outputs"]
        state = sum(weights.values()) + by_owner["quantisation_state"] + kept
        small = replay.reserved_small[rows]
        large = replay.reserved[rows] - small
        # The busiest moment; loading counts as it ends, with nothing in flight.
        is_loading = turns == 0
        peak = np.where(is_loading, replay.allocated[rows], replay.peak_allocated[rows])
        peak_small = np.where(is_loading, small - replay.inactive_small[rows], replay.peak_allocated_small[rows])
        in_bytes = {
            "allocated_mib": replay.allocated[rows],
            "reserved_mib": replay.reserved[rows],
            "used_mib": replay.reserved[rows],
            "peak_allocated_mib": replay.peak_allocated[rows],
            **weights,
            "quantisation_state_mib": by_owner["quantisation_state"],
            "kv_payload_mib": payload,
            "kv_copies_mib": kept - payload,
            "activations_mib": peak - state,
            "inactive_small_mib": small - peak_small,
            "inactive_large_mib": large - (peak - peak_small),
            "cuda_context_mib": np.zeros(len(rows)),
            "inactive_small_after_mib": replay.inactive_small[rows],
            "inactive_large_after_mib": replay.inactive_large[rows],
        }
        table = pd.DataFrame({"step": np.arange(len(rows)), "turn": turns, "context_tokens": context})
        table = table.assign(**{name: n_bytes / MIB for name, n_bytes in in_bytes.items()})
        table[["used_mib", "cuda_context_mib"]] += self.context[0]
        return table

    def _provenance(self) -> dict[str, Any]:
        facts, card = self.trace.facts, self.workload.card
        provenance: dict[str, Any] = {
            "workload": self.workload.as_dict(),
            "model": facts.model,
            "precision": facts.precision,
            "trace": facts.description,
            "modelled": facts.effects,
            "versions": facts.versions,
            "kv_bytes_per_token": facts.kv_bytes_per_token,
            "cuda_context_mib": self.context[0],
            "cuda_context_source": self.context[1],
        }
        if card:
            provenance |= {"card": card.name, "card_memory_mib": card.memory_mib}
        if self.note:
            provenance["note"] = self.note
        if self.replay.out_of_memory is not None:
            turn, _, context, _ = self.schedule[self.replay.rows].tolist()
            provenance["out_of_memory"] = {
                "message": str(self.replay.out_of_memory),
                "fits_context_tokens": self.reached,
                "fails_context_tokens": context,
                "turn": turn,
            }
        return provenance
