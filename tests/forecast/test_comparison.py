"""Forecasts laid over logs and recordings, and what is refused."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from glmlab.core.cards import ASSUMED_CONTEXT_MIB
from glmlab.core.curve import Curve, CurveError
from glmlab.forecast.comparison import compare, compare_recording, forecast_of, read_log
from glmlab.forecast.forecast import Forecast
from glmlab.forecast.workload import ForecastError

TRACE = "chatglm3-6b-original-int4"
NOTES = {"model": "chatglm3-6b", "precision": "fp16", "attention": "sdpa", "weights": "random"}


def recording(**notes: Any) -> Curve:
    table = pd.DataFrame(
        {"step": [9], "turn": [1], "context_tokens": [16], "prompt_tokens": [8], "generated_tokens": [9], "used_mib": 9}
    )
    return Curve(table, {**NOTES, **notes}, label="a GPU")


def test_a_log_is_fitted_by_its_two_unknowns(tmp_path: Path) -> None:
    truth = Forecast.of(trace=TRACE, tokens=3000).curve.table.iloc[10::15]
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
        ("1, 1\n2, 2\n30000, 3\n", "reaches 30000 characters, but the forecast ends at 8192 tokens"),
    ],
)
def test_broken_logs_are_named(tmp_path: Path, text: str, message: str) -> None:
    log = tmp_path / "gpu.log"
    log.write_text(text)
    with pytest.raises(ForecastError, match=message):
        compare(log=log)


def test_missing_files_and_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ForecastError, match="cannot be read"):
        read_log(tmp_path / "missing.log")
    with pytest.raises(ForecastError, match="nothing to compare"):
        compare()
    with pytest.raises(CurveError, match="is not there"):
        compare([tmp_path / "missing.csv"])


def test_a_recording_is_laid_under_its_forecast() -> None:
    forecast = Forecast.of(trace=TRACE, turns="8:300,30:400")
    truth = forecast.curve.table.query("turn > 0").groupby("turn").tail(1)
    table = truth[["step", "turn", "context_tokens", "used_mib"]].assign(used_mib=truth["used_mib"] + 17)
    compared = compare_recording(Curve(table, kind="measured", label="a GPU"), forecast)
    assert compared.fitted["cuda_context_mib"] == ASSUMED_CONTEXT_MIB + 17
    assert compared.max_error_mib == 0
    assert len(compared.table) == 2


def test_recordings_that_cannot_be_compared() -> None:
    table = pd.DataFrame({"step": [1], "turn": [1], "context_tokens": [9], "rss_mib": [900]})
    with pytest.raises(ForecastError, match="no GPU memory was recorded"):
        compare_recording(Curve(table, label="a CPU"))
    used = Curve(table.rename(columns={"rss_mib": "used_mib"}), label="a GPU")
    with pytest.raises(ForecastError, match="does not say its model, precision, attention, prompt_tokens"):
        compare_recording(used)
    with pytest.raises(ForecastError, match="no row of the recording"):
        compare_recording(used, Forecast.of(trace=TRACE, turns="20:5"))


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        *(
            ({"gpus": gpus}, r"a GPU: the recording's gpus are .*, not a list of names\. Correct its \.json")
            for gpus in (5, "RTX 4060", [5], [["RTX 4060"]], {"name": "RTX 4060"})
        ),
        ({"compiled": True}, r"decode steps were compiled, .* Record it without compile=True"),
        ({"static_tokens": "many"}, "static_tokens is 'many'"),
    ],
)
def test_provenance_of_the_wrong_type_is_refused(notes: dict[str, Any], message: str) -> None:
    with pytest.raises(ForecastError, match=message):
        forecast_of(recording(**notes))


@pytest.mark.parametrize(
    ("notes", "architecture"),
    [
        ({"gpus": [{"index": 0}, "NVIDIA H200"]}, "hopper"),
        ({"gpus": [{"name": "NVIDIA H100 80GB HBM3"}], "compute_capability": "9.0"}, "hopper"),
        *(
            ({"compute_capability": capability}, architecture)
            for capability, architecture in (
                ("7.5", "turing"),
                ("8.6", "ampere"),
                ("8.9", "ada"),
                ("12.0", "blackwell"),
            )
        ),
        ({}, ""),
    ],
)
def test_the_architecture_is_the_known_cards_or_the_compute_capabilitys(
    notes: dict[str, Any], architecture: str
) -> None:
    workload = forecast_of(recording(**notes, cache="static", static_tokens=4096)).workload
    assert workload.architecture == architecture
    assert (workload.weights, workload.cache, workload.static_tokens) == ("random", "static", 4096)
