"""The error table on recordings made from a forecast, right and wrong."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import pytest

from glmlab.core.curve import Curve
from glmlab.core.resources import data_path
from glmlab.evidence.accuracy import error_table
from glmlab.evidence.plan import EvidenceError
from glmlab.forecast.comparison import compare_recording
from glmlab.forecast.forecast import Forecast

MODEL = str(data_path("tiny-chatglm3"))
H200 = {"index": 0, "name": "NVIDIA H200", "total_mib": 143771.0}
NOTES = {
    "model": MODEL, "precision": "fp16", "attention": "eager", "weights": "random", "cache": "dynamic",
    "gpus": [H200], "compute_capability": "9.0", "driver": "999", "date": "2026-01-02",
}  # fmt: skip


@pytest.fixture(scope="module")
def truth() -> pd.DataFrame:
    """What a GPU would record if the forecast were true: every step of three turns."""
    turns = [(8, 400), (30, 700), (30, 700)]
    settings = {"precision": "fp16", "attention": "eager", "weights": "random", "architecture": "hopper"}
    table = Forecast.of(MODEL, turns=turns, **settings).curve.table
    table = table[["step", "turn", "context_tokens", "reserved_mib"]].assign(gpu=0)
    table["prompt_tokens"] = table["turn"].map({0: 0, 1: 8, 2: 30, 3: 30})
    table["generated_tokens"] = table.groupby("turn").cumcount() + (table["turn"] > 0)
    return table


def recording(table: pd.DataFrame, **notes: Any) -> Curve:
    return Curve(table, {**NOTES, **notes}, kind="measured", label="made from a forecast")


def table_of(*curves: Curve) -> pd.DataFrame:
    return error_table(map(compare_recording, curves))


def row(curve: Curve) -> Mapping[str, Any]:
    (only,) = table_of(curve).to_dict("records")
    return {str(name): value for name, value in only.items()}


def test_true_forecast_has_no_error_and_holds(truth: pd.DataFrame) -> None:
    found = row(recording(truth))
    assert found["points"] == len(truth) == 1801
    assert (found["max_error_mib"], found["points_outside"], found["growth_error_share"]) == (0.0, 0, 0.0)
    assert found["growth_measured_mib"] == found["growth_forecast_mib"] > 4
    assert found["holds"]
    assert (found["gpu"], found["attention"], found["cache"]) == ("NVIDIA H200", "eager", "dynamic")


def test_points_beyond_32_mib_are_counted_and_the_miss_stays_in_the_table(truth: pd.DataFrame) -> None:
    within, beyond = truth.copy(), truth.copy()
    within["reserved_mib"] += 1.0
    beyond.loc[900:909, "reserved_mib"] += 33.0
    table = table_of(recording(within), recording(beyond))
    assert table["points_outside"].tolist() == [0, 10]
    assert table["max_error_mib"].tolist() == [1.0, 33.0]
    assert table["holds"].tolist() == [True, False]


def test_one_percent_of_a_large_model_is_allowed(truth: pd.DataFrame) -> None:
    large = truth.assign(reserved_mib=truth["reserved_mib"] + 10_000)
    assert row(recording(large))["points_outside"] == len(truth)
    compared = compare_recording(recording(truth))
    compared.table[["measured_mib", "forecast_mib"]] += 10_000
    compared.table["measured_mib"] += 99
    compared.table["difference_mib"] += 99
    assert error_table([compared])["holds"].tolist() == [True]


@pytest.mark.parametrize(("share", "holds"), [(0.04, True), (0.06, False), (-0.06, False)])
def test_growth_off_by_more_than_five_percent_does_not_hold(truth: pd.DataFrame, share: float, holds: bool) -> None:
    start = truth["reserved_mib"].iloc[1]
    grown = truth.assign(reserved_mib=start + (truth["reserved_mib"] - start) * (1 + share))
    found = row(recording(grown))
    assert found["points_outside"] == 0
    assert found["growth_error_share"] == pytest.approx(abs(share) / (1 + share))
    assert found["holds"] is holds


def test_recording_of_one_length_cannot_grow(truth: pd.DataFrame) -> None:
    with pytest.raises(EvidenceError, match="one context length, so nothing grows"):
        row(recording(truth[truth["step"] == 400]))
