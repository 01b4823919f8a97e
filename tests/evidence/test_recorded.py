"""What is recorded in ``data`` holds: replay, tracer and forecast against real GPUs, on any machine.

Nothing is recorded yet. The same checks run on files made from a forecast, right ones and wrong ones, so that they are
known to work, and to fail, before the first recording comes.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from recorded_device import traced_snapshot
from recorded_sequence import differences

from glmlab.core.curve import Curve, read_curve, read_curve_json
from glmlab.core.resources import data_path
from glmlab.evidence.accuracy import error_table
from glmlab.evidence.plan import LATENCY_PREFIX, SNAPSHOT_TURN
from glmlab.forecast.comparison import compare_recording, forecast_of_notes
from glmlab.forecast.forecast import Forecast
from glmlab.snapshots.reader import read_snapshot
from glmlab.snapshots.replay import replay_snapshot
from glmlab.snapshots.stripping import MOST_FILE_BYTES, save_stripped, strip

NOTES = {
    "model": str(data_path("tiny-chatglm3")), "precision": "fp16", "attention": "sdpa", "weights": "random",
    "cache": "dynamic", "gpus": [{"index": 0, "name": "NVIDIA H200", "total_mib": 143771.0}], "driver": "999",
    "compute_capability": "9.0", "date": "2026-01-02", "versions": {"torch": "2"}, "turns": [list(SNAPSHOT_TURN)],
    "command": "glmlab evidence snapshot-tiny",
}  # fmt: skip


def check_provenance(notes: Any) -> None:
    assert {"model", "precision", "gpus", "driver", "versions", "date"} <= set(notes)
    assert re.match(r"glmlab evidence \S+$", notes["command"])
    assert notes["gpus"]


def check_snapshot(path: Path) -> None:
    assert path.stat().st_size < MOST_FILE_BYTES
    snapshot = read_snapshot(path)
    notes = snapshot.provenance
    check_provenance(notes)
    report = replay_snapshot(snapshot)
    assert report.is_equal, f"{path.name}: {report}"
    found = differences(forecast_of_notes(path.name, notes, notes["turns"]).trace, snapshot)
    assert found.empty, f"{path.name}:\n{found.to_string()}"


def check_timed(table: pd.DataFrame, notes: Any) -> None:
    """A measured time below the floor, or a GPU that did not answer, is no evidence."""
    check_provenance(notes)
    assert np.isfinite(table[["token_ms", "first_token_ms", "floor_ms"]]).all(axis=None)
    assert (table["token_ms"] >= table["floor_ms"]).all(), table.to_string()
    assert not any(way["outcome"] for way in notes["polling"]), notes["polling"]


def is_recording(path: Path) -> bool:
    """Whether a .json of data/recordings lies beside a recording that ``glmlab evidence`` made."""
    provenance = json.loads(path.read_text(encoding="utf-8")).get("provenance", {})
    return str(provenance.get("command", "")).startswith("glmlab evidence recording-")


def check_recordings(curves: list[Curve]) -> None:
    for curve in curves:
        check_provenance(curve.provenance)
    table = error_table(map(compare_recording, curves))
    assert table["holds"].all(), table.to_string()


def test_every_recorded_snapshot_is_what_allocator_and_tracer_say() -> None:
    paths = sorted(data_path("snapshots").glob("*.json.gz"))
    if not paths:
        pytest.skip("no snapshot is recorded yet: make gpu-evidence, on a machine with an NVIDIA GPU")
    for path in paths:
        check_snapshot(path)


def test_every_recording_is_what_the_forecast_says() -> None:
    paths = [path for path in sorted(data_path("recordings").glob("*.json")) if is_recording(path)]
    curves = [read_curve(path.with_suffix(".csv")) for path in paths]
    if not curves:
        pytest.skip("no recording is made yet: make gpu-evidence, on a machine with an NVIDIA GPU")
    check_recordings(curves)


def test_every_timed_token_is_above_the_floor() -> None:
    paths = sorted(data_path("recordings").glob(f"{LATENCY_PREFIX}*.csv"))
    if not paths:
        pytest.skip("no token is timed on a GPU yet: make gpu-evidence, on a machine with an NVIDIA GPU")
    for path in paths:
        check_timed(pd.read_csv(path), read_curve_json(path.with_suffix(".json"))["provenance"])


# ---------------------------------------------------------------- the checks themselves, on files made from a forecast


def made_up() -> Forecast:
    return forecast_of_notes("made up", NOTES, [SNAPSHOT_TURN])


def test_snapshot_that_the_trace_explains_passes_and_one_with_scratch_does_not(tmp_path: Path) -> None:
    told = made_up().trace
    check_snapshot(save_stripped(strip(traced_snapshot(told, SNAPSHOT_TURN), NOTES), tmp_path / "good.json.gz"))

    scratch = save_stripped(strip(traced_snapshot(told, SNAPSHOT_TURN, 4096), NOTES), tmp_path / "scratch.json.gz")
    with pytest.raises(AssertionError, match=r"scratch.json.gz:\n.*\n.*recorded .* sort +model.layers"):
        check_snapshot(scratch)


def test_snapshot_whose_addresses_are_not_the_allocators_does_not_pass(tmp_path: Path) -> None:
    snapshot = traced_snapshot(made_up().trace, SNAPSHOT_TURN)
    events = snapshot["device_traces"][0]
    freed = {event["addr"] for event in events if event["action"] == "free_completed"}
    moved = next(event for event in events if event["action"] == "alloc" and event["addr"] in freed)
    for event in events:
        if event["addr"] == moved["addr"] and event["action"] != "segment_alloc":
            event["addr"] += 512
    with pytest.raises(AssertionError, match="moved.json.gz: device 0"):
        check_snapshot(save_stripped(strip(snapshot, NOTES), tmp_path / "moved.json.gz"))


def test_recording_with_a_wrong_curve_does_not_pass() -> None:
    table = made_up().replace(turns="8:500").curve.table[["step", "turn", "context_tokens", "reserved_mib"]].copy()
    table["prompt_tokens"], table["generated_tokens"] = 8, table["step"]
    check_recordings([Curve(table, NOTES, kind="measured", label="right")])

    table.loc[300:, "reserved_mib"] += 40
    with pytest.raises(AssertionError, match="wrong"):
        check_recordings([Curve(table, NOTES, kind="measured", label="wrong")])


def test_recordings_are_told_from_what_lies_beside_them(tmp_path: Path) -> None:
    commands = {"glmlab evidence recording-a": True, "glmlab evidence latency-a": False, "glmlab record": False}
    for command, expected in commands.items():
        file = tmp_path / "a.json"
        file.write_text(json.dumps({"provenance": {"command": command}}), encoding="utf-8")
        assert is_recording(file) is expected
    assert not is_recording(data_path("figures", "decode_steps.json"))


def test_times_below_the_floor_and_a_silent_driver_do_not_pass() -> None:
    table = pd.DataFrame({"token_ms": [5.0, 4.0], "first_token_ms": 9.0, "floor_ms": 4.0})
    answers, silent = ({**NOTES, "polling": [{"way": "NVML", "outcome": outcome}]} for outcome in ("", "not found"))
    check_timed(table, answers)
    for times, notes in ((table, silent), (table.assign(token_ms=[5.0, 3.9]), answers)):
        with pytest.raises(AssertionError):
            check_timed(times, notes)


def test_evidence_without_provenance_does_not_pass() -> None:
    for lost in ("driver", "gpus", "versions"):
        with pytest.raises(AssertionError):
            check_provenance({name: value for name, value in NOTES.items() if name != lost})
