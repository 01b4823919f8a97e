"""Forecasts: equal to the reference replay of the original chat, adding up, explained, bounded by a card."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from glmlab.allocator.program import ALLOCATE, EMPTY_CACHE, FREE, EventProgram
from glmlab.core.cards import ASSUMED_CONTEXT_MIB, Card, find_card
from glmlab.core.curve import COMPONENTS, WEIGHT_COLUMNS, read_curve
from glmlab.core.units import MIB
from glmlab.figures.memory import COMPONENT_LOOKS
from glmlab.forecast.forecast import Forecast
from glmlab.forecast.workload import CHOICES, ForecastError, Workload, parse_turns
from glmlab.models.placement import PRECISIONS
from glmlab.tracing import trace as trace_module
from glmlab.tracing.trace import OWNERS, WEIGHT_OWNERS, AllocationTrace, TraceError, TraceFacts

TRACE = "chatglm3-6b-original-int4"
CONVERSATION = "8:418,26:259,30:497,30:491,30:501,30:501,30:501,30:525"


def original(turns: str | None = None, **fields: Any) -> Forecast:
    """Forecast of the original code."""
    return Forecast.of(trace=TRACE, turns=turns, **fields)


@pytest.fixture(scope="module")
def chapter() -> Forecast:
    return original(CONVERSATION)


def card_of(memory_mib: int) -> Card:
    return find_card("RTX 4060")._replace(memory_mib=memory_mib)


# ------------------------------------------------------------------------------- the original code's chat


def test_equals_the_reference_replay_step_by_step(reference: ModuleType, shared_data: Path) -> None:
    turns = "8:60,26:1,30:2,2:3,1900:60,30:60"  # every section, and past the 2,048 tokens where the pool changes
    expected: list[tuple[int, int, float, float]] = []

    def on_step(allocator: Any, turn: int, step: int, context: int, _: Any) -> None:
        expected.append((turn, context, allocator.reserved / MIB, allocator.allocated / MIB))

    pairs = [tuple(turn) for turn in parse_turns(turns)]
    reference.replay(reference.Trace(str(shared_data / "original-trace" / "trace.npz")), pairs, on_step)
    table = original(turns).curve.table
    assert np.array_equal(table[["turn", "context_tokens", "reserved_mib", "allocated_mib"]], expected)


def test_figures_of_the_chapters_conversation(chapter: Forecast) -> None:
    table = chapter.curve.table
    assert table["reserved_mib"].iloc[[0, 2, 418, -1]].tolist() == [4584, 4590, 4612, 4758]
    assert table["allocated_mib"].iloc[[0, 2, 418, -1]].round(2).tolist() == [3746.34, 3757.17, 3778.07, 4069.20]
    assert int(table["context_tokens"].iloc[-1]) == 3899
    assert (chapter.rises[-1].turn, chapter.rises[-1].context_tokens) == (5, 1923)
    assert table["peak_allocated_mib"].max() == pytest.approx(4283.75, abs=0.01)
    after = table[["inactive_small_after_mib", "inactive_large_after_mib"]].iloc[-1]
    assert after.round(2).tolist() == [174.68, 514.12]


def test_breakdown_of_the_last_step(chapter: Forecast) -> None:
    last = chapter.curve.table.iloc[-1]
    assert last["weights_attention_mib"] + last["weights_mlp_mib"] == pytest.approx(2727.75, abs=0.01)
    assert last["weights_embedding_mib"] == last["weights_head_mib"] == 508
    assert last["quantisation_state_mib"] == pytest.approx(2.15, abs=0.01)
    assert last["kv_payload_mib"] == pytest.approx(106.61, abs=0.01)
    assert last["kv_payload_mib"] + last["kv_copies_mib"] == pytest.approx(110.77 + 107.14 + 96.35, abs=0.02)


def test_next_rise_of_a_longer_conversation(chapter: Forecast) -> None:
    longer = chapter.replace(turns=CONVERSATION + ",30:501" * 5)
    assert longer.trace is chapter.trace
    (late,) = [rise for rise in longer.rises if rise.context_tokens > 3899]
    assert (late.turn, late.context_tokens, late.mib, late.pool) == (13, 6101, 214, "large")
    assert "dense_h_to_4h" in str(late)


def test_columns_of_the_weights_are_the_owners_of_the_trace() -> None:
    assert tuple(f"{owner}_mib" for owner in WEIGHT_OWNERS) == WEIGHT_COLUMNS


@pytest.mark.parametrize("empty_cache", [(), ("load",), ("load", "turn")])
def test_components_add_up_to_used(empty_cache: Sequence[str]) -> None:
    table = original("8:300,600:200,30:900", empty_cache=empty_cache).curve.table
    assert (table[list(COMPONENTS)].sum(axis=1) == table["used_mib"]).all()
    assert (table[list(COMPONENTS)] >= 0).all().all()
    total = table[["allocated_mib", "inactive_small_after_mib", "inactive_large_after_mib"]].sum(axis=1)
    assert (total == table["reserved_mib"]).all()


def test_empty_cache_is_called_at_the_end_of_its_sections_even_of_empty_ones() -> None:
    program = EventProgram(
        events=[(ALLOCATE, 0, 0, 0), (ALLOCATE, 0, 0, 0), (FREE, 1, 0, 0)],
        sizes=[(512, 0, 0, 0, 0)],
        section_names=("load", "first.prefill", "first.end1", "later.end1"),
        section_start=[0, 1, 2, 2, 3],
        owners=OWNERS,
    )
    events = np.array([0, 0, -1], np.int32)
    trace = AllocationTrace(program, TraceFacts("m", "fp16", 1, 0), [("new", "")], events, events)
    changed = Workload("m", empty_cache=("load", "turn")).prepare(trace)
    modes = {name: changed.program.events_of(name)[:, 0].tolist() for name in program.section_names}
    assert modes == {
        "load": [ALLOCATE, EMPTY_CACHE],
        "first.prefill": [ALLOCATE],
        "first.end1": [EMPTY_CACHE],
        "later.end1": [FREE, EMPTY_CACHE],
    }
    assert changed.label_of_event.tolist() == [0, -1, 0, -1, -1, -1]


def test_empty_cache_after_loading_gives_inactive_segments_back(chapter: Forecast) -> None:
    emptied, kept = chapter.replace(empty_cache=("load",)).curve.table, chapter.curve.table
    assert emptied["reserved_mib"].iloc[0] == 3942
    assert emptied["inactive_large_after_mib"].iloc[0] < kept["inactive_large_after_mib"].iloc[0]
    assert emptied["reserved_mib"].iloc[-1] == 4580  # the buffers of dequantising had to be taken again
    assert emptied["kv_payload_mib"].tolist() == kept["kv_payload_mib"].tolist()


def test_the_band_of_address_orders_encloses_the_forecast(chapter: Forecast) -> None:
    table = chapter.curve_with_band().table
    assert len(table) == len(chapter.curve.table)
    assert (table["used_min_mib"] <= table["used_mib"]).all()
    assert (table["used_mib"] <= table["used_max_mib"]).all()
    assert 0 < (table["used_max_mib"] - table["used_min_mib"]).max() <= 4
    assert original("8:2").band.columns.empty


def test_a_curve_survives_its_file(chapter: Forecast, tmp_path: Path) -> None:
    again = read_curve(chapter.curve.save(tmp_path / "forecast.csv")[0])
    assert again.kind == "forecast"
    assert again.provenance == json.loads(json.dumps(chapter.curve.provenance))
    pd.testing.assert_frame_equal(again.table, chapter.curve.table)


# ------------------------------------------------------------------------------------- one door, each thing once


def test_questions_read_the_trace_once_and_replay_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"read": 0, "rows": 0}
    read, run = trace_module.read_trace, Forecast._replayer

    def counting_read(path: Any) -> AllocationTrace:
        counts["read"] += 1
        return read(path)

    def counting_replayer(self: Forecast, *args: Any) -> Any:
        counts["rows"] += 1
        return run(self, *args)

    monkeypatch.setattr(trace_module, "read_trace", counting_read)
    monkeypatch.setattr(Forecast, "_replayer", counting_replayer)
    forecast = original("8:200,30:200")
    for _ in range(2):
        _ = forecast.curve, forecast.rises, forecast.plateaus, forecast.summary()
    assert counts == {"read": 1, "rows": 1 + 1 + 3}  # the replay, a look at segments, the three of the band


def test_segments_after_a_context_length(chapter: Forecast) -> None:
    before, after = chapter.segments(tokens=2040), chapter.segments(tokens=2060)
    assert chapter.segments(tokens=2060) == after
    assert chapter.segments(tokens=2040) == before != after
    row = chapter.curve.table.set_index("context_tokens").loc[2060]
    assert sum(segment.size for segment in after) / MIB == row["reserved_mib"]
    live = sum(block.size for segment in after for block in segment.blocks if block.live)
    assert live / MIB == row["allocated_mib"]
    with pytest.raises(ForecastError, match=r"the run ends at 3,899 tokens, before 4,000\. Ask for fewer"):
        chapter.segments(tokens=4000)


def test_every_rise_is_explained(chapter: Forecast) -> None:
    reserved = chapter.curve.table["reserved_mib"]
    by_step = np.zeros(len(reserved))
    for rise in chapter.rises:
        by_step[rise.step] += rise.mib
    assert np.array_equal(np.cumsum(by_step), reserved)
    after_loading = [rise for rise in chapter.rises if rise.step > 0]
    assert {rise.pool for rise in after_loading} == {"small"}
    assert all(rise.request.requested_bytes <= MIB for rise in after_loading)


def test_the_last_plateau_is_no_truncation(chapter: Forecast) -> None:
    (plateau,) = chapter.plateaus
    assert (plateau.first_context, plateau.last_context) == (1923, 3899)
    kv = next(group for group in plateau.growing if group.bytes_per_token == 512)
    assert (kv.count, kv.leaves_small_pool_at) == (56, 2049)
    assert plateau.largest_inactive_mib[:3] == (214, 214, 214)
    loading, *_, level = chapter.explain().splitlines()
    assert loading == f"loading: +4,584 MiB in {sum(rise.step == 0 for rise in chapter.rises)} segments"
    assert level == str(plateau)
    assert "(above 1 MiB, and so in the large pool, from 2,049 tokens on)" in level


def test_a_plateau_that_ends_in_a_prefill_is_described_by_its_decode_steps() -> None:
    until_then = original("8:3000")
    forecast = until_then.replace(turns="8:3000,5:1")  # the second turn is one forward pass, which reads the prompt
    assert forecast.plateaus[-1].last_context == 3012
    slopes, expected = (
        [(group.count, group.bytes_per_token) for group in made.plateaus[-1].growing] for made in (forecast, until_then)
    )
    assert slopes == expected


def test_the_summary_names_components_as_figures_do(chapter: Forecast) -> None:
    lines = chapter.summary().splitlines()
    assert lines[0] == "ChatGLM3-6B, original code, int4"
    assert "after loading       4,703.0 MiB used,    4,584.0 reserved,    3,746.3 allocated" in lines
    assert [line.strip().rpartition("  ")[0].strip() for line in lines[4:16]] == list(COMPONENTS.values())
    assert {label for label, *_ in COMPONENT_LOOKS.values()} - set(COMPONENTS.values()) == {"weights"}  # of all kinds
    assert lines[16] == "the order of segment addresses changes this by up to 4.00 MiB"


def test_a_notebook_shows_summary_and_chart_and_escapes_both() -> None:
    html = original("8:20", card=find_card("RTX 4060")._replace(name="<b>4060</b>"))._repr_html_()
    assert html.startswith("<pre>ChatGLM3-6B, original code, int4, &lt;b&gt;4060&lt;/b&gt;\n")
    assert '<img src="data:image/png;base64,' in html
    assert "<b>" not in html
    assert original("8:20", card=card_of(1024))._repr_html_().startswith(f"<pre>{TRACE} in int4 does not fit on RTX")


# ------------------------------------------------------------------------------------- card and context


def test_context_comes_from_the_card_or_is_said_to_be_assumed() -> None:
    assert original("8:5", card="RTX 4060").curve.provenance["cuda_context_source"].startswith("RTX 4060: ")
    assumed = original("8:5", card="RTX 3060").curve.provenance
    assert assumed["cuda_context_mib"] == ASSUMED_CONTEXT_MIB
    assert "assumed, none is known for RTX 3060" in assumed["cuda_context_source"]
    given = original("8:5", cuda_context_mib=300.5).curve.table
    assert (given["used_mib"] - given["reserved_mib"] == 300.5).all()


def test_out_of_memory_ends_the_curve() -> None:
    small = card_of(4300 + 119)
    forecast = original(CONVERSATION, card=small)
    failure = forecast.curve.provenance["out_of_memory"]
    assert forecast.curve.table["used_mib"].max() <= small.memory_mib
    assert failure["fits_context_tokens"] == forecast.curve.table["context_tokens"].iloc[-1] < 3899
    assert "CUDA out of memory. Tried to allocate" in failure["message"]
    assert "out of memory at" in forecast.summary().splitlines()[-1]
    capacity = forecast.largest_context()
    assert capacity.limited_by == "memory"
    assert capacity.used_mib is not None
    assert capacity.used_mib <= small.memory_mib


def test_a_card_too_small_for_the_model_is_a_capacity_of_nothing_and_has_no_curve() -> None:
    forecast = original(card=card_of(1024))
    capacity = forecast.largest_context()
    assert (capacity.fits, capacity.context_tokens, capacity.used_mib) == (False, 0, None)
    assert str(capacity).startswith("RTX 4060: does not fit; CUDA out of memory. Tried to allocate")
    with pytest.raises(
        ForecastError, match=r"does not fit on RTX 4060: CUDA out .* Take a smaller precision, or a card"
    ):
        _ = forecast.curve


def test_the_models_limit_bounds_the_context_and_a_recorded_trace() -> None:
    capacity = original().largest_context("H100 80 GB")
    assert (capacity.context_tokens, capacity.limited_by) == (8192, "model")
    assert capacity.message == "the model is made for 8,192 tokens"
    with pytest.raises(ForecastError, match=r"8,193 tokens, but .* made for 8,192 .* The recorded code fails beyond"):
        _ = original(tokens=8193).curve
    with pytest.raises(ForecastError, match=r"no card is given\. Name one"):
        original().largest_context()


def test_a_context_beyond_the_models_limit_is_forecast_with_a_warning() -> None:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 1, "vocab_size": 100, "max_position_embeddings": 700}
    forecast = Forecast.of(config, tokens=701)
    with pytest.warns(UserWarning, match="the turns reach 701 tokens, but llama is made for 700"):
        curve = forecast.curve
    assert curve.table["context_tokens"].iloc[-1] == 701
    assert "made for 700" in curve.provenance["note"]
    assert forecast.summary().endswith(curve.provenance["note"])
    assert forecast.largest_context("RTX 4060").context_tokens == 700
    held = Forecast.of(config, cache="static", static_tokens=650).largest_context("RTX 4060")
    assert (held.context_tokens, held.limited_by, held.message) == (650, "cache", "static_tokens=650")


# -------------------------------------------------------------------------------------------- workloads


def test_a_workload_travels() -> None:
    workload = original("8:5,9:7", empty_cache=("load",), card="RTX 4060").workload
    assert pickle.loads(pickle.dumps(workload)) == workload  # noqa: S301 - made here
    assert workload.as_dict()["card"] == "RTX 4060"


@pytest.mark.parametrize("text", ["8", "8:", ":4", "8:4,", "8:4;9:1", "-8:4", "8:4.5"])
def test_broken_turns_are_named(text: str) -> None:
    with pytest.raises(ForecastError, match="is not prompt:generated"):
        parse_turns(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            ({name: "other"}, f"{name}='other' is not known. Use one of {known[bool(known[0] == '')]}")
            for name, known in CHOICES.items()
        ),
        ({"keeps": ("everything",)}, "keeps='everything' is not known"),
        ({"batch": 0}, "batch=0"),
        ({"static_tokens": -1}, "static_tokens=-1"),
        ({"cuda_context_mib": -1.0}, "cuda_context_mib=-1.0: give MiB from 0 on"),
        ({"cuda_context_mib": float("nan")}, "cuda_context_mib=nan"),
        ({"turns": [(0, 5)]}, "turn 1 is 0:5"),
        ({"turns": []}, "at least one turn"),
        ({"turns": "8:5", "tokens": 9}, "not both"),
        ({"tokens": 0}, "tokens=0"),
        ({"trace": TRACE}, "give either a model or the name of a recorded trace"),
    ],
)
def test_impossible_workloads_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ForecastError, match=message):
        Forecast.of({"model_type": "llama"}, **fields)


def test_a_recorded_trace_has_its_own_precision_and_cache() -> None:
    assert original("8:5").workload.precision == "int4"
    with pytest.raises(ForecastError, match=r"a recorded trace has its own cache, precision\. Leave that out"):
        original("8:5", precision="fp16", cache="static")
    with pytest.raises(TraceError, match=f"no recorded trace 'other'. There is: {TRACE}"):
        Forecast.of(trace="other")
    with pytest.raises(TraceError, match="turn 2 is 1:5.*at least 2"):
        _ = original("8:5,1:5").curve


def test_precisions_are_those_that_models_load_in() -> None:
    assert set(CHOICES["precision"]) == set(PRECISIONS)


def test_tokens_is_a_context_length() -> None:
    for tokens in (1, 3, 8, 1000):
        assert original(tokens=tokens).workload.context_tokens == tokens
