"""Curves: what counts as one, the two files on disk, and what is said of files that are something else."""

from pathlib import Path

import pandas as pd
import pytest

from glmlab.core.curve import Curve, CurveError, csv_file, read_curve


def table() -> pd.DataFrame:
    return pd.DataFrame(
        {"step": [0, 7], "turn": [0, 1], "gpu": [None, 0], "context_tokens": [0, 19], "used_mib": [10.5, 11.25]}
    )


def test_saved_curve_is_read_back_equal(tmp_path: Path) -> None:
    curve = Curve(table(), {"model": "embedded", "notes": ["你好"]}, kind="forecast", label="TinyGLM, fp32")

    csv_path, json_path = curve.save(tmp_path / "folder" / "tiny")
    again = read_curve(csv_path)

    assert json_path == tmp_path / "folder" / "tiny.json"
    pd.testing.assert_frame_equal(again.table, curve.table)
    assert (again.kind, again.label, again.provenance) == ("forecast", "TinyGLM, fp32", curve.provenance)
    assert sorted(path.name for path in csv_path.parent.iterdir()) == ["tiny.csv", "tiny.json"]  # no temporary files


def test_missing_gpu_and_missing_figures_stay_missing(tmp_path: Path) -> None:
    with_gap = table().assign(process_mib=[None, None], reserved_mib=[None, 2.0])
    csv_path, _ = Curve(with_gap).save(tmp_path / "gap.csv")

    again = read_curve(csv_path)

    assert again.table["gpu"].isna().tolist() == [True, False]
    assert again.table["process_mib"].isna().all()
    assert again.memory_columns == ("used_mib", "reserved_mib")


def test_torn_last_row_of_a_recording_is_left_out_but_a_hand_written_table_is_read_whole(tmp_path: Path) -> None:
    for kind, steps in (("measured", [0, 7]), ("reported", [0, 7, 9])):
        csv_path, _ = Curve(table(), kind=kind).save(tmp_path / kind)  # type: ignore[arg-type]
        with csv_path.open("a", encoding="utf-8") as handle:
            handle.write("9,2,0,31,1")  # perhaps cut from "1234.5"

        assert read_curve(csv_path).table["step"].tolist() == steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "turn"}, "column 'turn' is missing"),
        ({"drop": "context_tokens"}, r"no column of context \(context_tokens or context_characters\)"),
        ({"drop": "used_mib"}, "no column of memory"),
        ({"used_mib": ["10", "much"]}, "row 2 of the column 'used_mib' is 'much', not a number"),
        ({"step": [0, None]}, "column 'step' has an empty cell"),
    ],
)
def test_table_that_is_no_curve_is_refused(change: dict[str, object], message: str) -> None:
    bad = table()
    bad = bad.drop(columns=[change["drop"]]) if "drop" in change else bad.assign(**change)  # type: ignore[arg-type]

    with pytest.raises(CurveError, match=message):
        Curve(bad)


def test_a_column_twice_and_an_unknown_kind_are_refused() -> None:
    with pytest.raises(CurveError, match="the column 'used_mib' is there twice"):
        Curve(pd.concat([table(), table()[["used_mib"]]], axis=1))
    with pytest.raises(CurveError, match="measured, forecast, reported, not 'guessed'"):
        Curve(table(), kind="guessed")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".json", '{"kind": "measured"}', r"a\.json has no kind, label and provenance"),
        (".json", '{"kind": "mea', r"a\.json is not readable JSON"),
        (".json", "[" * 100_000, r"a\.json is not readable JSON"),
        (".json", '{"kind": "measured", "label": "x", "provenance": null}', r"a\.json: the label must be text"),
        (".json", None, r"a\.json is not there: .* Copy the two together"),
        (".csv", "step,turn\n1,2,3,4\n", r"a\.csv: no column of context"),
        (".csv", "", r"a\.csv is no table"),
        (".csv", None, r"a\.csv is not there"),
        (".csv", "step,turn,context_tokens,used_mib,gpu\n1,1,1,1,0.5\n", "no index of a GPU"),
        (".csv", "step,turn,context_tokens,used_mib,gpu\n1,1,1,inf,0\n", "'used_mib' is inf, not a number"),
        (".csv", "step,turn,context_tokens,used_mib,gpu\n1,1,1," + "9" * 400 + ",0\n", "too large"),
    ],
    ids=range(11),
)
def test_bad_files_are_named(tmp_path: Path, suffix: str, content: str | None, message: str) -> None:
    csv_path, _ = Curve(table()).save(tmp_path / "a.csv")
    bad = csv_path.with_suffix(suffix)
    bad.unlink() if content is None else bad.write_text(content, encoding="utf-8")
    with pytest.raises(CurveError, match=message):
        read_curve(csv_path)


def test_other_suffixes_are_refused() -> None:
    with pytest.raises(CurveError, match=r"end in \.csv"):
        csv_file("run.json")


def test_places_that_cannot_be_written_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(CurveError, match=r"folder\.csv is a folder"):
        Curve(table()).save(tmp_path / "folder.csv")
    with pytest.raises(CurveError, match="cannot be written .* another folder"):
        Curve(table()).save(tmp_path / "file" / "a.csv")
    with pytest.raises(CurveError, match="names no file"):
        read_curve("")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.csv"]
