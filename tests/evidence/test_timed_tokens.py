"""Timed tokens: compiled and eager models, what is written is read, what is no evidence is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from glmlab.core.curve import CurveError
from glmlab.evidence import latency
from glmlab.evidence.latency import read_timed_tokens, time_tokens, timed_tokens
from glmlab.evidence.plan import EvidenceError
from glmlab.latency.polling import measure_polling
from glmlab.latency.roofline import measure_rates
from glmlab.models.compiling import Compilation
from glmlab.models.loading import LoadedModel

NOTES = {"command": "glmlab evidence latency-test"}


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "measure_rates", lambda device: measure_rates(device, block_bytes=2**20))
    monkeypatch.setattr(latency, "measure_polling", lambda: measure_polling(repetitions=1))


def test_compiled_tokens_are_timed_and_say_so(compiled: LoadedModel, embedded: LoadedModel, tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    for name, loaded in (("compiled", compiled), ("eager", embedded)):
        time_tokens(loaded, [16, 8], folder / f"latency-{name}.csv", NOTES)
    (folder / "other.csv").write_text("no times", encoding="utf-8")

    fast, slow = timed_tokens(tmp_path)

    assert (fast.label, slow.label) == ("embedded, fp32, compiled, CPU", "embedded, fp32, eager, CPU")
    assert (fast.provenance["compiled"], slow.provenance["compiled"]) == (True, False)
    assert fast.provenance["compilation_s"] > 0
    assert slow.provenance["compilation_s"] is None
    for timed in (fast, slow):
        assert timed.table["context_tokens"].tolist() == [16, 8]
        assert timed.table["tokens"].tolist() == [32, 32]
        assert timed.table["kv_read_bytes"].tolist() == [16 * 4096, 8 * 4096]
        assert timed.table["prefills"].tolist() == [3, 3]
        assert len(timed.polling) == 3
        assert timed.provenance["command"] == NOTES["command"]


def test_eager_tokens_do_not_pass_as_compiled_ones(embedded: LoadedModel, tmp_path: Path) -> None:
    failed = Compilation(failure="InvalidCxxCompiler: no compiler")
    loaded = replace(embedded, report=replace(embedded.report, compilation=failed))
    with pytest.raises(EvidenceError, match=r"embedded in fp32 cannot be compiled here \(InvalidCxxCompiler: no comp"):
        time_tokens(loaded, [8], tmp_path / "a.csv", NOTES)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_times_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recordings" / "latency-a.csv"
    path.parent.mkdir()
    path.write_text("context_tokens,token_ms\n8,1.0\n", encoding="utf-8")
    with pytest.raises(CurveError, match="latency-a.json is not there"):
        timed_tokens(tmp_path)
    header = {"kind": "measured", "label": "a", "provenance": {}}
    path.with_suffix(".json").write_text(json.dumps(header), encoding="utf-8")
    with pytest.raises(EvidenceError, match=r"latency-a.csv lacks the column 'p10_ms'. Time the tokens again"):
        timed_tokens(tmp_path)
    path.unlink()
    with pytest.raises(EvidenceError, match=r"latency-a.csv is no table of timed tokens \(.*No such file"):
        read_timed_tokens(path)


@pytest.mark.parametrize(
    ("cell", "provenance", "message"),
    [
        ("fast", {"polling": []}, "'token_ms' is not all numbers. Time the tokens again"),
        ("", {"polling": []}, "'token_ms' is not all numbers. Time the tokens again"),
        ("1", {}, r"latency-a.json lacks what gpustat costs \('polling'\)"),
        ("1", {"polling": "x"}, r"latency-a.json lacks what gpustat costs \('polling'\)"),
    ],
)
def test_times_that_are_no_numbers_are_refused(tmp_path: Path, cell: str, provenance: object, message: str) -> None:
    path = tmp_path / "latency-a.csv"
    path.write_text(f"{','.join(latency.COLUMNS)}\n8,{cell},1,1,1,1\n", encoding="utf-8")
    header = {"kind": "measured", "label": "a", "provenance": provenance}
    path.with_suffix(".json").write_text(json.dumps(header), encoding="utf-8")
    with pytest.raises(EvidenceError, match=message):
        read_timed_tokens(path)
