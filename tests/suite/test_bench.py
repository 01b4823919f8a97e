"""The benchmark command takes its ways in turn, prints one table and keeps it; how fast they are is no test."""

import json

import nbformat
import pandas as pd
import pytest
from typer.testing import CliRunner

from glmlab import load_model
from glmlab.cli import app
from glmlab.core.errors import GlmlabError
from glmlab.latency.polling import API, SUBPROCESS
from glmlab.models.compiling import CompiledForward, CompileWarning
from glmlab.suite import bench

KEYS = (
    "decode_over_generate",
    "decode_full_logits_over_generate",
    "compiled_over_eager",
    "forecast_32k_replay_s",
    "forecast_32k_trace_s",
    "gpustat_api_over_subprocess",
    "notebooks_s",
)


def test_the_ways_take_turns_after_a_round_that_does_not_count():
    calls = []
    seconds = bench.take_turns({name: lambda name=name: calls.append(name) for name in "abc"}, repetitions=3)
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_compares_speeds_of_equal_work(monkeypatch):
    clocked = {"generate": [3.0, 4.0, 5.0], "default": [2.0, 2.0, 9.0], "full logits": [8.0, 8.0, 8.0]}
    clocked |= {"eager": [6.0] * 3, "compiled": [1.0, 2.0, 3.0]}
    monkeypatch.setattr(bench, "take_turns", lambda ways, repetitions: clocked)
    monkeypatch.setattr(bench, "load_model", lambda name, compile=False, **how: load_model(name, **how))
    default, full, compiled = bench.decode_rows(3, tokens=4)
    assert (default.key, default.value, default.at_least) == ("decode_over_generate", 2.0, 1.0)
    assert (full.key, full.value, full.at_least) == ("decode_full_logits_over_generate", 0.5, 0.9)
    assert (default.first_ms, default.second_ms) == (500.0, 1000.0)
    assert (compiled.key, compiled.value, compiled.at_least) == ("compiled_over_eager", 3.0, 1.0)


def test_where_compiling_fails_there_is_no_ratio_but_a_reason(monkeypatch):
    def failing(self):
        self._give_up("no compiler")

    monkeypatch.setattr(CompiledForward, "_try_out", failing)
    with pytest.warns(CompileWarning):
        *rows, compiled = bench.decode_rows(1, tokens=4)
    assert all(row.value > 0 for row in rows)
    assert (compiled.key, compiled.value, compiled.reason) == ("compiled_over_eager", None, "no compiler")


def test_forecast_rows_are_seconds_of_a_trace_made_anew():
    replay, traced = bench.forecast_rows(steps=64)
    assert (replay.key, replay.unit, traced.key, traced.unit) == (
        "forecast_32k_replay_s", "s", "forecast_32k_trace_s", "s",
    )  # fmt: skip
    assert replay.value > 0
    assert traced.value > 0


def test_polling_is_compared_where_a_driver_answers(monkeypatch):
    table = pd.DataFrame({"way": [SUBPROCESS, API], "poll_ms": [600.0, 100.0], "outcome": ""})
    monkeypatch.setattr(bench, "measure_polling", lambda repetitions: table)
    (row,) = bench.polling_rows(3)
    assert (row.key, row.value, row.at_least) == ("gpustat_api_over_subprocess", 6.0, 1.0)
    silent = table.assign(outcome="NVML Shared Library Not Found")
    monkeypatch.setattr(bench, "measure_polling", lambda repetitions: silent)
    (row,) = bench.polling_rows(3)
    assert row.value is None
    assert row.reason == "no answer from an NVIDIA driver on this machine (NVML Shared Library Not Found)"


def test_the_command_prints_its_tables_and_writes_the_ratios_down(tmp_path, monkeypatch):
    """With made-up rows of decoding and forecasts; the tests above make the real ones."""
    made_up = {key: bench.Row(key, 1.5, "a against b") for key in KEYS[:3]}
    made_up |= {key: bench.Row(key, 2.5, "all of c", "s") for key in KEYS[3:5]}
    monkeypatch.setattr(bench, "decode_rows", lambda _: [made_up[key] for key in KEYS[:3]])
    monkeypatch.setattr(bench, "forecast_rows", lambda: [made_up[key] for key in KEYS[3:5]])
    monkeypatch.setattr(bench.replay_table, "__defaults__", ((20, 40),))
    out = tmp_path / "build" / "bench.json"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    nbformat.write(notebook, tmp_path / "made_up.ipynb")
    arguments = ["bench", "--repetitions", "1", "--out", str(out), "--notebooks", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    first_table, sdpa, eager = result.stdout.split("\n\n")
    header, *lines = first_table.splitlines()
    assert header.split()[:2] == ["key", "value"]
    written = json.loads(out.read_text())
    assert [line.split()[0] for line in lines] == list(KEYS) == [row["key"] for row in written["rows"]]
    for row in written["rows"]:
        assert written[row["key"]] == row["value"]
        assert row["value"] is None if row["reason"] else row["value"] > 0
        assert row["unit"] == ("s" if row["key"].endswith("_s") else "ratio")
    for attention, table in {"sdpa": sdpa, "eager": eager}.items():
        title, head, *rows = table.splitlines()
        assert f"fp16, {attention}" in title
        assert head.split() == ["steps", "events", "seconds", "ns/event", "growth"]
        assert [row.split()[0] for row in rows] == ["20", "40"]


def test_nothing_measured_is_refused(tmp_path):
    with pytest.raises(GlmlabError, match="0 repetitions measure nothing"):
        bench.run_benchmarks(0, tmp_path / "bench.json")


def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "decode_rows", lambda _: pytest.fail("it measured"))
    with pytest.raises(GlmlabError, match="is a folder. Let --out name a .json file"):
        bench.run_benchmarks(1, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(GlmlabError, match="cannot be made a folder .*Give another --out"):
        bench.run_benchmarks(1, tmp_path / "file" / "bench.json")
