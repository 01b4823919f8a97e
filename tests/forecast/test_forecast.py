"""Forecasts: equal to the reference replay of the original chat, adding up, explained, bounded by a card."""

import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from glmlab.allocator.program import ALLOCATE, EMPTY_CACHE, FREE, EventProgram
from glmlab.core.cards import CardError, cards, find_card
from glmlab.core.curve import COMPONENTS, WEIGHT_COLUMNS, Curve, CurveError, read_curve
from glmlab.core.units import MIB
from glmlab.forecast.comparison import ComparisonError, compare, compare_recording, read_log, workload_of
from glmlab.forecast.explanation import explain
from glmlab.forecast.forecast import (
    ASSUMED_CONTEXT_MIB,
    ForecastError,
    _with_settings,
    forecast,
    largest_context,
    run_workload,
    summary,
    workload_fields,
    workload_from_fields,
)
from glmlab.forecast.workload import Workload, WorkloadError, parse_turns
from glmlab.tracing.trace import (
    MOST_BYTES,
    OWNERS,
    WEIGHT_OWNERS,
    AllocationTrace,
    TraceError,
    TraceFacts,
    Turn,
    load_recorded,
    read_trace,
    recorded_traces,
)

TRACE = "chatglm3-6b-original-int4"
CONVERSATION = "8:418,26:259,30:497,30:491,30:501,30:501,30:501,30:525"


@pytest.fixture(scope="module")
def chapter() -> Curve:
    return forecast(Workload.recorded(TRACE, turns=CONVERSATION))


def reference_steps(module: ModuleType, folder: Path, turns: str) -> list[tuple[int, int, int, int, int]]:
    """(turn, step in the turn, context, reserved bytes, allocated bytes) of every step."""
    rows: list[tuple[int, int, int, int, int]] = []

    def on_step(allocator: Any, turn: int, step: int, context: int, _: Any) -> None:
        rows.append((turn, step, context, allocator.reserved, allocator.allocated))

    pairs = [(turn.prompt, turn.generated) for turn in parse_turns(turns)]
    module.replay(module.Trace(str(folder / "trace.npz")), pairs, on_step)
    return rows


# ------------------------------------------------------------------------------- the original code's chat


@pytest.mark.parametrize("turns", ["8:60,26:1,30:2,2:3,700:30,30:120", CONVERSATION])
def test_equals_the_reference_replay_step_by_step(reference: ModuleType, shared_data: Path, turns: str) -> None:
    expected = np.array(reference_steps(reference, shared_data / "original-trace", turns))
    run = run_workload(Workload.recorded(TRACE, turns=turns))
    rows = run.rows
    got = np.column_stack(
        [run.schedule[rows, 0], run.schedule[rows, 2], run.replay.reserved[rows], run.replay.allocated[rows]]
    )
    assert np.array_equal(got, expected[:, [0, 2, 3, 4]])


def test_figures_of_the_chapters_conversation(chapter: Curve) -> None:
    table = chapter.table
    assert table["reserved_mib"].iloc[[0, 2, 418, -1]].tolist() == [4584, 4590, 4612, 4758]
    assert table["allocated_mib"].iloc[[0, 2, 418, -1]].round(2).tolist() == [3746.34, 3757.17, 3778.07, 4069.20]
    assert int(table["context_tokens"].iloc[-1]) == 3899
    rising = table[table["reserved_mib"].diff() > 0]
    assert rising[["turn", "context_tokens"]].iloc[-1].tolist() == [5, 1923]
    assert table["peak_allocated_mib"].max() == pytest.approx(4283.75, abs=0.01)
    assert table[["inactive_small_after_mib", "inactive_large_after_mib"]].iloc[-1].round(2).tolist() == [
        174.68,
        514.12,
    ]


def test_breakdown_of_the_last_step(chapter: Curve) -> None:
    last = chapter.table.iloc[-1]
    weights = sum(last[f"weights_{kind}_mib"] for kind in ("attention", "mlp"))
    assert weights == pytest.approx(2727.50 + 0.25, abs=0.01)  # int4 weights and biases
    assert last["weights_embedding_mib"] == last["weights_head_mib"] == 508
    assert last["quantisation_state_mib"] == pytest.approx(2.15, abs=0.01)
    assert last["kv_payload_mib"] == pytest.approx(106.61, abs=0.01)
    assert last["kv_payload_mib"] + last["kv_copies_mib"] == pytest.approx(110.77 + 107.14 + 96.35, abs=0.02)


def test_next_rise_of_a_longer_conversation() -> None:
    curve = forecast(Workload.recorded(TRACE, turns=CONVERSATION + ",30:501" * 5), seeds=())
    late = [rise for rise in explain(curve).rises if rise.context_tokens > 3899]
    assert [(rise.turn, rise.context_tokens, rise.mib, rise.pool) for rise in late] == [(13, 6101, 214, "large")]
    assert "dense_h_to_4h" in str(late[0])


def test_columns_of_the_weights_are_the_owners_of_the_trace() -> None:
    assert tuple(f"{owner}_mib" for owner in WEIGHT_OWNERS) == WEIGHT_COLUMNS


@pytest.mark.parametrize("empty_cache", [(), ("load",), ("load", "turn")])
def test_components_add_up_to_used(empty_cache: Any) -> None:
    table = forecast(Workload.recorded(TRACE, turns="8:300,600:200,30:900", empty_cache=empty_cache), seeds=()).table
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
    workload = Workload.recorded(TRACE, turns="8:1", empty_cache=("load", "turn"))
    changed = _with_settings(trace, workload, None)
    modes = {name: changed.program.events_of(name)[:, 0].tolist() for name in program.section_names}
    assert modes == {
        "load": [ALLOCATE, EMPTY_CACHE],
        "first.prefill": [ALLOCATE],
        "first.end1": [EMPTY_CACHE],
        "later.end1": [FREE, EMPTY_CACHE],
    }
    assert changed.label_of_event.tolist() == [0, -1, 0, -1, -1, -1]


def test_empty_cache_after_loading_gives_idle_segments_back(chapter: Curve) -> None:
    emptied = forecast(Workload.recorded(TRACE, turns=CONVERSATION, empty_cache=("load",)), seeds=()).table
    assert emptied["reserved_mib"].iloc[0] == 3942
    assert emptied["inactive_large_after_mib"].iloc[0] < chapter.table["inactive_large_after_mib"].iloc[0]
    assert emptied["reserved_mib"].iloc[-1] == 4580  # the buffers of dequantising had to be taken again
    assert emptied["kv_payload_mib"].tolist() == chapter.table["kv_payload_mib"].tolist()


def test_the_band_of_address_orders_encloses_the_forecast(chapter: Curve) -> None:
    table = chapter.table
    assert (table["used_min_mib"] <= table["used_mib"]).all()
    assert (table["used_mib"] <= table["used_max_mib"]).all()
    assert (table["used_max_mib"] - table["used_min_mib"]).max() <= 4


def test_a_forecast_survives_its_file(chapter: Curve, tmp_path: Path) -> None:
    chapter.save(tmp_path / "forecast.csv")
    again = read_curve(tmp_path / "forecast.csv")
    assert again.kind == "forecast"
    pd.testing.assert_frame_equal(again.table, chapter.table)
    assert explain(again).rises == explain(chapter).rises


# ---------------------------------------------------------------------------------------------- explain


def test_every_rise_is_explained(chapter: Curve) -> None:
    explanation = explain(chapter)
    reserved = chapter.table["reserved_mib"]
    by_step = np.zeros(len(reserved))
    for rise in explanation.rises:
        by_step[rise.step] += rise.mib
    assert np.array_equal(np.cumsum(by_step), reserved)
    after_loading = [rise for rise in explanation.rises if rise.step > 0]
    assert {rise.pool for rise in after_loading} == {"small"}
    assert all(rise.request.requested_bytes <= MIB for rise in after_loading)


def test_the_last_plateau_is_no_truncation(chapter: Curve) -> None:
    (plateau,) = explain(chapter).plateaus
    assert (plateau.first_context, plateau.last_context) == (1923, 3899)
    kv = next(group for group in plateau.growing if group.bytes_per_token == 512)
    assert (kv.count, kv.leaves_small_pool_at) == (56, 2049)
    assert plateau.largest_inactive_mib[:3] == (214, 214, 214)
    assert "2,049 tokens" in str(plateau)


def test_a_plateau_that_ends_in_a_prefill_is_told_by_its_decode_steps() -> None:
    turns = "8:3000,5:1"  # the second turn is one forward pass, which reads the prompt
    *_, plateau = explain(forecast(Workload.recorded(TRACE, turns=turns), seeds=())).plateaus
    assert plateau.last_context == 3012
    *_, until_then = explain(forecast(Workload.recorded(TRACE, turns="8:3000"), seeds=())).plateaus
    slopes = [(group.count, group.bytes_per_token) for group in plateau.growing]
    assert slopes == [(group.count, group.bytes_per_token) for group in until_then.growing]


def test_only_a_forecast_can_be_explained() -> None:
    table = pd.DataFrame({"step": [1], "turn": [1], "context_tokens": [9], "used_mib": [4700]})
    with pytest.raises(ForecastError, match="measured, not forecast"):
        explain(Curve(table, kind="measured", label="a recording"))


# ------------------------------------------------------------------------------------- card and context


def test_context_comes_from_the_card_or_is_said_to_be_assumed() -> None:
    known = forecast(Workload.recorded(TRACE, turns="8:5", card="RTX 4060"), seeds=())
    assert known.provenance["cuda_context_source"].startswith("RTX 4060: ")
    assumed = forecast(Workload.recorded(TRACE, turns="8:5", card="RTX 3060"), seeds=())
    assert assumed.provenance["cuda_context_mib"] == ASSUMED_CONTEXT_MIB
    assert "assumed, none is known for RTX 3060" in assumed.provenance["cuda_context_source"]
    given = forecast(Workload.recorded(TRACE, turns="8:5", cuda_context_mib=300.5), seeds=())
    assert (given.table["used_mib"] - given.table["reserved_mib"] == 300.5).all()


def test_out_of_memory_ends_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    small = find_card("RTX 4060")._replace(memory_mib=4300 + 119)
    monkeypatch.setattr("glmlab.forecast.forecast.find_card", lambda _: small)
    curve = forecast(Workload.recorded(TRACE, turns=CONVERSATION, card="RTX 4060"), seeds=())
    failure = curve.provenance["out_of_memory"]
    assert curve.table["used_mib"].max() <= small.memory_mib
    assert failure["fits_context_tokens"] == curve.table["context_tokens"].iloc[-1] < 3899
    assert "CUDA out of memory. Tried to allocate" in failure["message"]
    assert any("out of memory at" in line for line in summary(curve))
    capacity = largest_context(Workload.recorded(TRACE), "RTX 4060")
    assert capacity.limited_by == "memory"
    assert capacity.used_mib <= small.memory_mib


def test_the_models_limit_bounds_the_context() -> None:
    capacity = largest_context(Workload.recorded(TRACE), "H100 80 GB")
    assert (capacity.context_tokens, capacity.limited_by) == (8192, "model")
    with pytest.raises(ForecastError, match="8,193 tokens, but .* made for 8,192"):
        forecast(Workload.recorded(TRACE, tokens=8193))


def test_a_card_too_small_for_the_model_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = find_card("RTX 4060")._replace(memory_mib=1024)
    monkeypatch.setattr("glmlab.forecast.forecast.find_card", lambda _: tiny)
    with pytest.raises(ForecastError, match="does not fit on RTX 4060: CUDA out of memory"):
        largest_context(Workload.recorded(TRACE), "RTX 4060")
    with pytest.raises(ForecastError, match=r"does not fit on RTX 4060: .* Take a smaller precision, or a card with"):
        forecast(Workload.recorded(TRACE, card="RTX 4060"))


def test_cards_have_sources_and_sizes() -> None:
    assert len(cards()) >= 15
    assert all(card.source and 4000 < card.memory_mib < 200_000 for card in cards().values())
    assert find_card("NVIDIA GeForce RTX 4060 Laptop GPU").name == "RTX 4060 Laptop"
    with pytest.raises(CardError, match=r"no card 'RTX 1'.*RTX 4090"):
        find_card("RTX 1")


# -------------------------------------------------------------------------------------------- workloads


def test_a_workload_travels() -> None:
    workload = Workload.recorded(TRACE, turns="8:5,9:7", empty_cache=("load",))
    assert pickle.loads(pickle.dumps(workload)) == workload  # noqa: S301 - made here
    assert workload_from_fields(workload_fields(workload)) == workload


@pytest.mark.parametrize("text", ["8", "8:", ":4", "8:4,", "8:4;9:1", "-8:4", "8:4.5"])
def test_broken_turns_are_named(text: str) -> None:
    with pytest.raises(WorkloadError, match="is not prompt:generated"):
        parse_turns(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "fp8"}, "precision='fp8' is not known"),
        ({"attention": "flash"}, "attention='flash' is not known"),
        ({"cache": "paged"}, "cache='paged' is not known"),
        ({"keeps": ("everything",)}, "keeps='everything' is not known"),
        ({"empty_cache": ("step",)}, "empty_cache='step' is not known"),
        ({"architecture": "kepler"}, "architecture='kepler' is not known"),
        ({"card": "GTX 9"}, "no card 'GTX 9'"),
        ({"batch": 0}, "batch=0"),
        ({"static_tokens": -1}, "static_tokens=-1"),
        ({"cuda_context_mib": -1.0}, "cuda_context_mib=-1.0: give MiB from 0 on"),
        ({"cuda_context_mib": float("nan")}, "cuda_context_mib=nan"),
        ({"turns": [(0, 5)]}, "turn 1 is 0:5"),
        ({"turns": []}, "at least one turn"),
        ({"turns": "8:5", "tokens": 9}, "not both"),
        ({"tokens": 0}, "tokens=0"),
    ],
)
def test_impossible_workloads_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        Workload.of({"model_type": "llama"}, **fields)


def test_tokens_is_a_context_length() -> None:
    assert Workload.recorded(TRACE, tokens=1000).context_tokens == 1000
    assert Workload.recorded(TRACE, tokens=3).turns == (Turn(3, 1),)


# ----------------------------------------------------------------------------------------- trace files


def test_a_trace_survives_its_file(tmp_path: Path) -> None:
    trace = load_recorded(TRACE)
    again = read_trace(trace.save(tmp_path / "trace.npz"))
    assert again.facts == trace.facts
    assert again.labels == trace.labels
    assert np.array_equal(again.program.events, trace.program.events)
    assert again.program.carried == trace.program.carried
    with np.load(tmp_path / "trace.npz", allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]


def test_damaged_traces_are_refused(tmp_path: Path) -> None:
    path = load_recorded(TRACE).save(tmp_path / "trace.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceError, match="not a readable allocation trace"):
        read_trace(path)
    path.write_text("no trace")
    with pytest.raises(TraceError, match="not a readable allocation trace"):
        read_trace(path)
    np.savez(path, format=np.array(99))
    with pytest.raises(TraceError, match="format 99"):
        read_trace(path)
    with pytest.raises(TraceError, match="is not there"):
        read_trace(tmp_path / "missing.npz")


def test_hand_edited_traces_are_refused(tmp_path: Path) -> None:
    path = load_recorded(TRACE).save(tmp_path / "trace.npz")
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    facts = json.loads(str(arrays["facts"]))
    names = np.array(["loading" if name == "load" else name for name in arrays["section_names"].tolist()])
    edits: list[tuple[str, object, str]] = [
        ("facts", np.array("[" * 100_000), "not a readable allocation trace"),
        ("facts", np.array(json.dumps({**facts, "first_prompt_min": "x"})), "the fact first_prompt_min is 'x'"),
        ("carried_slots", arrays["carried_slots"] + 0.5, "not a readable allocation trace"),
        ("label_of_event", np.array(5), "needs as many labels"),
        ("section_names", names, "no section 'load', which this conversation needs"),
    ]
    for name, value, message in edits:
        np.savez(path, **{**arrays, name: value})
        with pytest.raises(TraceError, match=message):
            read_trace(path).schedule([Turn(8, 3)])


def test_a_trace_that_unpacks_to_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = load_recorded(TRACE).save(tmp_path / "bomb.npz")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("events2.npy", "w") as member:
        for _ in range(MOST_BYTES // MIB):
            member.write(bytes(MIB))
    assert path.stat().st_size < MIB
    with pytest.raises(TraceError, match=r"its arrays say that they have 64\.\d+ MiB, which no trace has"):
        read_trace(path)


def test_unknown_recorded_traces_are_named() -> None:
    assert TRACE in recorded_traces()
    with pytest.raises(TraceError, match=f"no recorded trace 'other'. There is: {TRACE}"):
        Workload.recorded("other")


def test_a_later_turn_of_one_prompt_token_is_refused() -> None:
    with pytest.raises(TraceError, match="turn 2 is 1:5.*at least 2"):
        forecast(Workload.recorded(TRACE, turns="8:5,1:5"))


# ------------------------------------------------------------------------------------------- comparing


def test_a_log_is_fitted_by_its_two_unknowns(tmp_path: Path) -> None:
    truth = forecast(Workload.recorded(TRACE, tokens=3000), seeds=()).table.iloc[10::15]
    lines = [f"{round(row.context_tokens / 0.62)}, {row.reserved_mib + 131:.0f}" for row in truth.itertuples()]
    log = tmp_path / "gpu.log"
    log.write_text("\n".join([*lines, ""]))
    (compared,) = compare(log=log)
    assert compared.fitted == {
        "tokens_per_character": pytest.approx(0.62, abs=0.006),
        "cuda_context_mib": pytest.approx(131, abs=2),
    }
    assert compared.max_error_mib <= 4
    assert compared.measured.kind == "reported"
    assert "tokens_per_character = 0.62" in str(compared)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12, 4700\n13; 4701\n14, 4702\n", "line 2: '13; 4701' is not 'characters, MiB'"),
        ("12, 4700\n13, x\n", "line 2"),
        ("12, 4700\n\n13, 4700\n", "has 2 lines"),
        ("", "has 0 lines"),
    ],
)
def test_broken_logs_are_named(tmp_path: Path, text: str, message: str) -> None:
    log = tmp_path / "gpu.log"
    log.write_text(text)
    with pytest.raises(ComparisonError, match=message):
        read_log(log)


def test_missing_log_and_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match="cannot be read"):
        read_log(tmp_path / "missing.log")
    with pytest.raises(ComparisonError, match="nothing to compare"):
        compare()
    with pytest.raises(CurveError, match="is not there"):
        compare([tmp_path / "missing.csv"])


def test_a_recording_is_laid_under_its_forecast() -> None:
    workload = Workload.recorded(TRACE, turns="8:300,30:400")
    truth = forecast(workload, seeds=()).table.query("turn > 0").groupby("turn").tail(1)
    table = truth[["step", "turn", "context_tokens", "used_mib"]].assign(used_mib=truth["used_mib"] + 17)
    compared = compare_recording(Curve(table, kind="measured", label="a GPU"), workload)
    assert compared.fitted["cuda_context_mib"] == ASSUMED_CONTEXT_MIB + 17
    assert compared.max_error_mib == 0
    assert len(compared.table) == 2


def test_recordings_that_cannot_be_compared() -> None:
    table = pd.DataFrame({"step": [1], "turn": [1], "context_tokens": [9], "rss_mib": [900]})
    with pytest.raises(ComparisonError, match="no GPU memory was recorded"):
        compare_recording(Curve(table, label="a CPU"))
    used = table.rename(columns={"rss_mib": "used_mib"})
    with pytest.raises(ComparisonError, match="does not say its model, precision, attention, prompt_tokens"):
        compare_recording(Curve(used, label="a GPU"))
    wrong = replace(Curve(used, label="a GPU"))
    with pytest.raises(ComparisonError, match="no row of the recording"):
        compare_recording(wrong, Workload.recorded(TRACE, turns="20:5"))


@pytest.mark.parametrize("gpus", [5, "RTX 4060", [5], [["RTX 4060"]], {"name": "RTX 4060"}])
def test_a_recording_whose_gpus_are_no_list_of_names_is_refused(gpus: object) -> None:
    table = pd.DataFrame(
        {"step": [9], "turn": [1], "context_tokens": [16], "prompt_tokens": [8], "generated_tokens": [9], "used_mib": 9}
    )
    notes = {"model": "chatglm3-6b", "precision": "fp16", "attention": "sdpa", "gpus": gpus}
    with pytest.raises(ComparisonError, match=r"a GPU: the recording's gpus are .*, not a list of names\. Mend its"):
        workload_of(Curve(table, notes, label="a GPU"))
    known = workload_of(Curve(table, {**notes, "gpus": [{"index": 0}, "NVIDIA H200"]}, label="a GPU"))
    assert known.architecture == "hopper"
