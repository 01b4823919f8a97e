"""The tracer's events beside a GPU's history: equal where the history is the trace's own, every difference named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_device import RecordedDevice, traced_snapshot

from glmlab.core.resources import data_path
from glmlab.evidence.plan import EvidenceError
from glmlab.evidence.sequence import compare_sequence, traced_rows
from glmlab.forecast.forecast import Forecast
from glmlab.models.loading import build_skeleton, load_config
from glmlab.models.placement import FLOAT_PRECISIONS, predict_bytes
from glmlab.snapshots.reader import Snapshot, read_snapshot
from glmlab.snapshots.replay import replay_snapshot
from glmlab.snapshots.stripping import save_stripped, strip
from glmlab.tracing.trace import AllocationTrace, TurnTokens

TURN = TurnTokens(8, 21)


def traced(**fields: Any) -> AllocationTrace:
    return Forecast.of(str(data_path("tiny-chatglm3")), weights="random", **fields).trace


@pytest.fixture(scope="module")
def told() -> AllocationTrace:
    return traced()


def recorded(tmp_path: Path, snapshot: dict[str, Any], turns: Any = ((8, 21),)) -> Snapshot:
    provenance = {"turns": turns}
    return read_snapshot(save_stripped(strip(snapshot, provenance), tmp_path / "snapshot.json.gz"))


@pytest.mark.parametrize("fields", [{}, {"attention": "eager"}, {"precision": "int4"}, {"precision": "int8"}], ids=str)
def test_history_that_is_the_traces_own_is_equal_event_by_event(tmp_path: Path, fields: dict[str, Any]) -> None:
    own = traced(**fields)
    snapshot = recorded(tmp_path, traced_snapshot(own, TURN))

    compared = compare_sequence(own, snapshot)

    assert compared.is_equal, str(compared)
    assert compared.table.empty
    assert compared.n_equal > 22 * 200
    assert str(compared) == f"{compared.n_equal:,} of {compared.n_equal:,} recorded and {compared.n_equal:,} traced " \
        "events are equal"  # fmt: skip
    assert replay_snapshot(snapshot).is_equal


def test_scratch_that_the_tracer_does_not_see_is_listed_by_operation_with_its_bytes(
    tmp_path: Path, told: AllocationTrace
) -> None:
    compared = compare_sequence(told, recorded(tmp_path, traced_snapshot(told, TURN, scratch_bytes=777_216)))

    n_rows = TURN.generated + 2
    assert not compared.is_equal
    assert compared.n_recorded == compared.n_traced + 2 * n_rows == compared.n_equal + 2 * n_rows
    found = compared.by_operation()
    assert found[["side", "kind", "operation", "module"]].values.tolist() == [
        ["recorded", kind, "sort", "model.layers.*.mlp"] for kind in ("allocate", "free")
    ]
    assert found[["count", "bytes", "rows"]].values.tolist() == [[n_rows, n_rows * 777_216, n_rows]] * 2
    assert "recorded alone: allocate 23 x, 17,875,968 B in 23 rows: sort in model.layers.*.mlp" in str(compared)


def test_events_that_only_the_tracer_has_are_listed_too(tmp_path: Path, told: AllocationTrace) -> None:
    snapshot = traced_snapshot(told, TURN)
    snapshot["device_traces"][0] = [event for event in snapshot["device_traces"][0] if event["size"] != 8_519_680]
    compared = compare_sequence(told, recorded(tmp_path, snapshot))
    (difference,) = compared.table.to_dict("records")
    assert (difference["side"], difference["row"], difference["kind"]) == ("traced", "0", "allocate")
    assert (difference["operation"], difference["bytes"]) == ("cuBLAS workspace", 8_519_680)


def test_one_wrong_size_moves_nothing_behind_it(tmp_path: Path, told: AllocationTrace) -> None:
    snapshot = traced_snapshot(told, TURN)
    events = snapshot["device_traces"][0]
    event = next(e for e in events if e["action"] == "alloc" and e["user_metadata"] == "5|")
    event["size"] += 3
    compared = compare_sequence(told, recorded(tmp_path, snapshot))
    assert compared.table[["side", "row", "count"]].values.tolist() == [["recorded", "5", 1], ["traced", "5", 1]]
    assert compared.table["bytes"].diff().iloc[1] == -3


@pytest.mark.parametrize(
    ("turns", "devices", "notes", "says"),
    [
        (None, 1, True, "says turns None, not one pair"),
        ([[8, 21], [8, 21]], 1, True, "not one pair of tokens"),
        ([[8, 21]], 2, True, "histories of 2 GPUs"),
        ([[8, 21]], 1, False, "do not note which step"),
    ],
)
def test_history_that_cannot_be_compared_says_what_it_lacks(
    tmp_path: Path, told: AllocationTrace, turns: Any, devices: int, notes: bool, says: str
) -> None:
    device = RecordedDevice()
    device.note = "load|" if notes else ""
    device.malloc(1000)
    snapshot = device.snapshot()
    snapshot["device_traces"] *= devices
    with pytest.raises(EvidenceError, match=says):
        compare_sequence(told, recorded(tmp_path, snapshot, turns))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_random_weights_leave_what_the_precision_needs_and_no_warm_up_block(precision: str) -> None:
    """On a GPU as well: quantising starts from weights that lie on the device already."""
    own = traced(precision=precision)
    folder = data_path("tiny-chatglm3")
    skeleton = build_skeleton(load_config(folder / "config.json"))
    dtype = FLOAT_PRECISIONS.get(precision, torch.float16)
    expected = sum(predict_bytes(skeleton, precision, dtype).values())

    steps = traced_rows(own, TURN)["load"]
    left = sum(step.n_bytes if step.kind == "allocate" else -step.n_bytes for step in steps)

    assert left == pytest.approx(expected, abs=2048)  # bitsandbytes keeps code tables
    assert own.facts.warmup_size == -1
    assert "built from the config with random weights" in own.facts.description
