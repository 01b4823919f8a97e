"""The benchmark command takes its ways in turn, prints one table and keeps it; how fast they are is no test."""

import json

import pytest
from typer.testing import CliRunner

from glmlab import bench
from glmlab.cli import app
from glmlab.errors import GlmlabError
from glmlab.memory import benchmark


def test_the_ways_take_turns_after_a_round_that_does_not_count():
    calls = []
    seconds = bench.take_turns({name: lambda name=name: calls.append(name) for name in "abc"}, repetitions=3)
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_compares_speeds_of_equal_work(monkeypatch):
    clocked = {"generate": [3.0, 4.0, 5.0], "default": [2.0, 2.0, 9.0], "full logits": [8.0, 8.0, 8.0]}
    monkeypatch.setattr(bench, "take_turns", lambda ways, repetitions: clocked)
    default, full = bench.decode_ratios(3, tokens=4)
    assert (default.key, default.value, default.at_least) == ("decode_over_generate", 2.0, 1.0)
    assert (full.key, full.value, full.at_least) == ("decode_full_logits_over_generate", 0.5, 0.9)
    assert (default.first_ms, default.second_ms) == (500.0, 1000.0)


def test_the_command_prints_its_tables_and_writes_the_ratios_down(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "STEPS", (20, 40))
    out = tmp_path / "build" / "bench.json"
    result = CliRunner().invoke(app, ["bench", "--repetitions", "1", "--out", str(out)])
    assert result.exit_code == 0
    ratio_table, sdpa, eager = result.stdout.split("\n\n")
    header, *lines = ratio_table.splitlines()
    assert header.split()[:2] == ["key", "ratio"]
    ratios = json.loads(out.read_text())["ratios"]
    assert [line.split()[0] for line in lines] == list(ratios)
    assert {"decode_over_generate", "decode_full_logits_over_generate"} <= set(ratios)
    assert all(ratio["value"] > 0 for ratio in ratios.values())
    for attention, table in {"sdpa": sdpa, "eager": eager}.items():
        title, head, *rows = table.splitlines()
        assert f"fp16, {attention}" in title
        assert head.split() == ["steps", "events", "seconds", "ns/event", "growth"]
        assert [row.split()[0] for row in rows] == ["20", "40"]


def test_nothing_measured_is_refused(tmp_path):
    with pytest.raises(GlmlabError, match="0 repetitions measure nothing"):
        bench.run_benchmarks(0, tmp_path / "bench.json")
