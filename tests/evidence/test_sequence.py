"""The tracer's events beside a GPU's history: equal where the history is the trace's own, every difference named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_device import traced_snapshot
from recorded_sequence import differences, recorded_rows, traced_rows

from glmlab.core.resources import data_path
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


def recorded(tmp_path: Path, snapshot: dict[str, Any]) -> Snapshot:
    return read_snapshot(save_stripped(strip(snapshot, {"turns": [list(TURN)]}), tmp_path / "snapshot.json.gz"))


@pytest.mark.parametrize("fields", [{}, {"attention": "eager"}, {"precision": "int4"}, {"precision": "int8"}], ids=str)
def test_history_that_is_the_traces_own_is_equal_event_by_event(tmp_path: Path, fields: dict[str, Any]) -> None:
    own = traced(**fields)
    snapshot = recorded(tmp_path, traced_snapshot(own, TURN))
    assert differences(own, snapshot).empty
    assert sum(map(len, recorded_rows(snapshot).values())) > 22 * 200
    assert replay_snapshot(snapshot).is_equal


def test_scratch_that_the_tracer_does_not_see_is_listed_by_operation_with_its_bytes(
    tmp_path: Path, told: AllocationTrace
) -> None:
    found = differences(told, recorded(tmp_path, traced_snapshot(told, TURN, scratch_bytes=777_216)))
    rows = ["load", *map(str, range(TURN.generated)), "end"]
    assert found.values.tolist() == [
        ["recorded", row, kind, "sort", "model.layers.*.mlp", 1, 777_216]
        for row in rows
        for kind in ("allocate", "free")
    ]


def test_events_that_only_the_tracer_has_are_listed_too(tmp_path: Path, told: AllocationTrace) -> None:
    snapshot = traced_snapshot(told, TURN)
    snapshot["device_traces"][0] = [event for event in snapshot["device_traces"][0] if event["size"] != 8_519_680]
    (found,) = differences(told, recorded(tmp_path, snapshot)).values.tolist()
    assert found == ["traced", "0", "allocate", "cuBLAS workspace", found[4], 1, 8_519_680]


def test_one_wrong_size_moves_nothing_behind_it(tmp_path: Path, told: AllocationTrace) -> None:
    snapshot = traced_snapshot(told, TURN)
    event = next(e for e in snapshot["device_traces"][0] if e["action"] == "alloc" and e["user_metadata"] == "5|")
    event["size"] += 3
    found = differences(told, recorded(tmp_path, snapshot))
    assert found[["side", "row", "count"]].values.tolist() == [["recorded", "5", 1], ["traced", "5", 1]]
    assert found["bytes"].diff().iloc[1] == -3


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_random_weights_leave_what_the_precision_needs_and_no_warm_up_block(precision: str) -> None:
    """On a GPU as well: quantising starts from weights that lie on the device already."""
    own = traced(precision=precision)
    skeleton = build_skeleton(load_config(data_path("tiny-chatglm3", "config.json")))
    expected = sum(predict_bytes(skeleton, precision, FLOAT_PRECISIONS.get(precision, torch.float16)).values())

    events = traced_rows(own, TURN)["load"]
    left = sum(event.n_bytes if event.kind == "allocate" else -event.n_bytes for event in events)

    assert left == pytest.approx(expected, abs=2048)  # bitsandbytes keeps code tables
    assert own.facts.warmup_size == -1
    assert "built from the config with random weights" in own.facts.description
