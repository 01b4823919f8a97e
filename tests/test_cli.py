"""The command line, in this process where nothing hangs on the process itself."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glmlab.cli import app, main
from glmlab.core.curve import read_curve
from glmlab.memory.recording import RecordingError


def test_help_names_every_command_and_loads_no_torch():
    code = (
        "import sys; from glmlab.cli import app; app(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    commands = "fetch chat record forecast replay compare evidence notebooks figures report bench doctor"
    for command in commands.split():
        assert command in shown
    assert shown.endswith("False\n")


def test_a_chat_is_streamed_cleared_stopped_and_recorded(tmp_path):
    said = "你好\nclear\n3 + 4 = ?\nstop\nnever reached\n"
    done = CliRunner().invoke(app, ["chat", "--record", str(tmp_path / "chat.csv")], input=said)
    assert done.exit_code == 0
    assert "TinyGLM" in done.stdout
    assert "3 + 4 = 7" in done.stdout
    assert "(conversation cleared)" in done.stdout
    table = read_curve(tmp_path / "chat.csv").table
    assert table["turn"].tolist() == [0, 1, 1, 2]
    assert table["context_tokens"].tolist()[2] == 0


def test_a_chat_ends_with_its_input():
    result = CliRunner().invoke(app, ["chat", "--max-new-tokens", "3"], input="你好\n")
    assert result.exit_code == 0
    assert "ended by: length, context" in result.stdout


def test_a_recording_lands_where_it_is_asked_for(tmp_path):
    out = tmp_path / "short.csv"
    arguments = ["record", str(out), "--conversation", "short", "--precision", "bf16"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    curve = read_curve(out)
    assert f"{len(curve.table)} rows" in result.stdout
    assert curve.provenance["precision"] == "bf16"
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, RecordingError)
    assert read_curve(out).table.equals(curve.table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "--model", "no/such/model/here"], "glmlab: 'no/such/model/here' is neither 'embedded'"),
        (["chat", "--precision", "int2"], "glmlab: precision='int2' is not known"),
        (["record", "x.csv", "--conversation", "nowhere.json"], "glmlab: nowhere.json is not there"),
        (["fetch", "misspelt"], "glmlab: 'misspelt' is not a hub id"),
        (["fetch", "some/body", "--from", "nowhere"], "glmlab: hub 'nowhere' is not known"),
        (["forecast"], "glmlab: give either a model or --trace NAME"),
        (["forecast", "misspelt"], "glmlab: no config for 'misspelt'"),
        (
            ["forecast", "--trace", "chatglm3-6b-original-int4", "--tokens", "9000"],
            "glmlab: the turns reach 9,000 tokens",
        ),
        (["forecast", "chatglm3-6b", "--turns", "30-500"], "glmlab: turns: '30-500' is not prompt:generated"),
        (["forecast", "chatglm3-6b", "--card", "RTX 9999"], "glmlab: no card 'RTX 9999'"),
        (["replay", "nowhere.pickle"], "glmlab: nowhere.pickle"),
        (["compare"], "glmlab: nothing to compare"),
        (["figures", "--width", "86"], "glmlab: width '86' is not a length. Give a number and mm, cm or in"),
        (["figures", "--format", "pdf,bmp"], "glmlab: format 'bmp' is not known"),
        (["figures", "no_such_figure"], "glmlab: figure 'no_such_figure' is not known"),
        (["report", "--out", "report.docx"], "glmlab: report.docx is neither .html nor .pdf"),
        (["report", "--folder", "nowhere"], "glmlab: nowhere holds no notebooks"),
        (["notebooks", "--folder", "nowhere"], "glmlab: nowhere holds no notebooks"),
        (["notebooks", "99"], "glmlab: '99' names no notebook of notebooks"),
        (["notebooks", "04", "-p", "precision"], "glmlab: parameter 'precision' is not name=value"),
    ],
)
def test_errors_are_one_line_and_exit_code_two(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["glmlab", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


ORIGINAL = ["forecast", "--trace", "chatglm3-6b-original-int4", "--turns", "8:418,26:259"]


def test_a_forecast_is_printed_saved_drawn_and_explained(tmp_path):
    table, figure = tmp_path / "curve.csv", tmp_path / "curve.svg"  # a figure's data has the curve's name
    result = CliRunner().invoke(app, [*ORIGINAL, "--explain", "--csv", str(table), "--figure", str(figure)])
    assert result.exit_code == 0
    written = [figure, table, *(tmp_path / f"curve.{suffix}" for suffix in ("json", "md"))]
    assert result.stdout.splitlines()[-1] == f"wrote {', '.join(map(str, written))}"
    assert "inactive, large pool" in result.stdout
    assert "after loading" in result.stdout
    assert "small pool, for" in result.stdout
    curve = read_curve(table)
    assert curve.kind == "forecast"
    assert {"step", "turn", "context_tokens", "allocated_mib", "reserved_mib", "used_mib"} <= set(curve.table.columns)
    assert curve.table["reserved_mib"].iloc[[0, 2, 418]].tolist() == [4584, 4590, 4612]
    assert figure.read_text().startswith("<?xml")


def test_a_forecast_as_json_is_one_document_with_rises_and_the_longest_context(tmp_path):
    arguments = ["--json", "--explain", "--card", "RTX 4060", "--csv", str(tmp_path / "curve.csv")]
    result = CliRunner().invoke(app, [*ORIGINAL, *arguments])
    told = json.loads(result.stdout)
    assert told["step"] == 418 + 259
    for old, new in (("slack", "inactive_{}_mib"), ("idle", "inactive_{}_after_mib")):
        assert [told[f"{old}_{pool}_mib"] == told[new.format(pool)] for pool in ("small", "large")] == [True, True]
    assert told["rises"][-1]["step"] > 0
    assert told["rises"][-1]["request"].keys() == {"operation", "module", "layer", "requested_bytes"}
    assert told["plateaus"][-1]["growing"][0]["request"]["operation"].startswith("aten.")
    assert told["provenance"]["workload"]["turns"] == [[8, 418], [26, 259]]
    assert told["longest_context"]["limited_by"] == "model"
    assert told["provenance"]["cuda_context_mib"] == 119
    assert result.stderr.startswith(f"wrote {tmp_path / 'curve.csv'}, ")


def test_the_module_is_the_command_and_forecasts_a_recorded_trace_without_torch():
    command = [sys.executable, "-X", "importtime", "-m", "glmlab", *ORIGINAL]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    assert done.stdout.startswith("ChatGLM3-6B, original code, int4\n")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "glmlab.forecast.forecast" in imported
    assert not {"torch", "transformers"} & imported


def test_a_context_beyond_the_models_limit_is_forecast_with_a_warning_of_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["glmlab", "forecast", "embedded", "--tokens", "8193"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    says = "the turns reach 8,193 tokens, but embedded is made for 8,192"
    with pytest.warns(UserWarning, match=says), pytest.raises(SystemExit):
        main()
    assert "8,193 tokens" in capsys.readouterr().out
    assert warnings.formatwarning("beyond", UserWarning, "a.py", 7) == "glmlab: beyond\n"
    assert warnings.formatwarning("old", DeprecationWarning, "a.py", 7) == "a.py:7: DeprecationWarning: old\n"


def test_a_real_snapshot_is_replayed(shared_data):
    result = CliRunner().invoke(app, ["replay", str(shared_data / "gpu-snapshots" / "a.pickle"), "--json"])
    report = json.loads(result.stdout)
    assert report["allocations"] == report["equal_addresses"] > 1000
    assert report["segments"] == report["equal_segments"]
    assert report["first_difference"] is None


def test_the_forecast_is_laid_over_a_log_of_the_chapters_form(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("".join(f"{characters}, {4700 + characters // 50}\n" for characters in range(10, 900, 30)))
    result = CliRunner().invoke(app, ["compare", "--log", str(log)])
    assert result.exit_code == 0
    assert "fitted: tokens" in result.stdout


def test_doctor_says_what_works():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    for what in ("Python", "torch", "bitsandbytes", "host memory", "GPU", "CJK font"):
        assert what in result.stdout


def test_doctor_names_a_package_that_is_missing(monkeypatch):
    from glmlab.suite import doctor

    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    (finding,) = doctor._packages()
    assert (finding.good, finding.found) == (False, "not installed")
    assert str(finding).startswith("-- ")


def test_the_script_is_installed():
    assert Path(sys.executable).with_name("glmlab").exists() or sys.platform == "win32"
