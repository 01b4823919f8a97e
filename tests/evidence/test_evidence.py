"""The evidence runs on the CPU with the embedded model: plan, results, kills, budget, what lands and what not.

The driver is the stand-in of ``fake_gpu.py``; the memory history is made up.
"""

import gzip
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from fake_gpu import GPU_UUIDS, FakeCuda, build_library, install_driver
from recorded_device import RecordedDevice
from typer.testing import CliRunner

from glmlab.cli import app
from glmlab.core.curve import read_curve, read_curve_json
from glmlab.evidence import child, runner
from glmlab.evidence.child import main, perform, time_tokens
from glmlab.evidence.plan import (
    ALL_TURNS,
    LATENCY_TOKENS,
    PLAN,
    SNAPSHOT_TURN,
    STATIC_TOKENS,
    TURNS,
    EvidenceError,
    Run,
    choose,
)
from glmlab.evidence.runner import Outcome, gather, gpu_of_this_machine
from glmlab.forecast.comparison import forecast_of
from glmlab.forecast.workload import resolve_model
from glmlab.latency.polling import API, NVML, STARTING, SUBPROCESS, measure_polling
from glmlab.latency.roofline import measure_rates
from glmlab.memory.conversations import load_conversation
from glmlab.models.compiling import Compilation
from glmlab.models.loading import LoadedModel
from glmlab.snapshots.reader import read_snapshot

RECORDING = Run("recording", "embedded", "fp32", cache="static", turns=1)
LATENCY = Run("latency", "embedded", "fp32", lengths=(8, 16))
SNAPSHOT = Run("snapshot", "embedded", "fp32", "eager", "static")
GPU = "fake"

OBEDIENT = """
import json, os, pathlib, sys
order = json.loads(sys.argv[1])
assert order["parent"] == os.getppid()
for suffix in (".csv", ".json", ".transcript.jsonl", ".json.gz"):
    (pathlib.Path(order["folder"]) / f"result{suffix}").write_text(order["run"]["precision"])
"""
KILLED = OBEDIENT + "import signal; os.kill(os.getpid(), signal.SIGKILL)"


class MadeUpHistory:
    """torch.cuda.memory's history: every note that is set becomes an allocation and its free."""

    def __init__(self) -> None:
        self.device = RecordedDevice()

    def start(self, enabled: str | None = "all", **asked: Any) -> None:
        if enabled is not None:
            assert asked == {"context": "alloc", "stacks": "all", "skip_actions": ["free_requested"]}

    def note(self, text: str) -> None:
        self.device.note = text
        self.device.free(self.device.malloc(1000 + len(text)))

    def snapshot(self) -> dict[str, Any]:
        self.device.history[0]["frames"] = [{"name": "forward", "filename": "/home/somebody/secret/m.py", "line": 7}]
        return self.device.snapshot()


def pretend_gpu(patch: pytest.MonkeyPatch) -> None:
    history = MadeUpHistory()
    FakeCuda(GPU_UUIDS[:1]).install(patch)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_name", lambda _=0: "NVIDIA Fake GPU")
    patch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    patch.setattr(torch.cuda.memory, "_record_memory_history", history.start)
    patch.setattr(torch.cuda.memory, "_set_memory_metadata", history.note)
    patch.setattr(torch.cuda.memory, "_snapshot", history.snapshot)
    patch.setattr(child.MemoryProbe, "for_model", classmethod(lambda cls, model: cls("cuda:0")))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The stand-in driver, for this process and its children."""
    folder = tmp_path_factory.mktemp("nvml")
    library = build_library(folder)
    (folder / "state").write_text("gpu 24000 1000 self=600\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        install_driver(library, folder / "state", patch)
        patch.setenv("LD_LIBRARY_PATH", str(folder))
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        yield folder


@pytest.fixture
def gpu(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in's GPU for this process, with a made-up memory history."""
    pretend_gpu(monkeypatch)


def do(folder: Path, *runs: Run, child: Sequence[str], budget_s: float = 600.0) -> list[Outcome]:
    data, work = folder / "data", folder / "work"
    return list(gather(runs, data, work, GPU, budget_s=budget_s, device="cpu", child=child))


def script(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------ the plan


def test_plan_covers_what_forecasts_are_held_against() -> None:
    settings = {(run.model, run.precision) for run in PLAN if run.kind == "recording"}
    assert {("chatglm3-6b", precision) for precision in ("fp16", "bf16", "int8", "int4")} <= settings
    assert {model for model, _ in settings} == {"chatglm3-6b", "glm-4-9b-chat-hf", "qwen2.5-7b", "llama-2-7b"}
    for kind in ("recording", "snapshot"):
        assert {run.attention for run in PLAN if run.kind == kind} == {"sdpa", "eager"}
        assert {run.cache for run in PLAN if run.kind == kind} == {"dynamic", "static"}
    timed = {(run.precision, run.compile) for run in PLAN if run.kind == "latency"}
    assert timed == {(precision, how) for precision in ("fp16", "bf16", "int8", "int4") for how in (False, True)}
    assert not any(run.compile for run in PLAN if run.kind != "latency")
    assert len({run.name for run in PLAN}) == len(PLAN)


@pytest.mark.parametrize("run", [run for run in PLAN if run.kind == "recording"], ids=str)
def test_recorded_turns_pass_2048_tokens_and_stay_within_the_models_limit(run: Run) -> None:
    turns = load_conversation("long").turns[: run.turns]
    answers = sum(turn.max_new_tokens for turn in turns)
    config = resolve_model(run.model)[1]
    limit = STATIC_TOKENS if run.cache == "static" else config.get("max_position_embeddings", config.get("seq_length"))
    longest_prompt = 60 * len(turns)
    assert answers > 2100
    assert answers + longest_prompt < limit
    assert len(turns) == run.turns in (TURNS, ALL_TURNS)


def test_timed_lengths_and_the_steps_behind_them_stay_within_the_models_limit() -> None:
    config = resolve_model("chatglm3-6b")[1]
    assert max(LATENCY_TOKENS) + 35 <= config["seq_length"]


def test_runs_are_chosen_by_a_part_of_their_name() -> None:
    assert choose([]) == list(PLAN)
    assert {run.precision for run in choose(["int4", "int8"])} == {"int4", "int8"}
    assert {run.kind for run in choose(["snapshot-*"])} == {"snapshot"}
    with pytest.raises(EvidenceError, match=r"no run has '' in its name"):
        choose([""])
    with pytest.raises(EvidenceError, match=r"no run has 'int2' in its name; 'glmlab evidence --list' shows"):
        choose(["int4", "int2"])


# ------------------------------------------------------------------------------------------------------ the runs


def check_notes(run: Run, told: Mapping[str, Any], folder: Path) -> None:
    """Provenance is whole, and no file has anything of this machine."""
    assert told["command"] == f"glmlab evidence {run.name}"
    assert (told["model"], told["weights"], told["attention"]) == ("embedded", "random", run.attention)
    assert told["gpus"] == [{"index": 0, "name": "Fake GPU", "total_mib": 24000.0}]
    assert (told["driver"], told["compute_capability"]) == ("999.00.fake", "9.0")
    assert told["date"] == "2023-11-14T22:13:20+00:00"
    assert {"torch", "transformers", "bitsandbytes"} <= set(told["versions"])
    texts = [path.read_bytes() for path in folder.iterdir()]
    texts = [gzip.decompress(text) if text.startswith(b"\x1f\x8b") else text for text in texts]
    for word in (str(folder), os.getcwd(), str(Path.home()) + os.sep, "somebody", f'"{platform.node()}"'):
        assert all(word.encode() not in text for text in texts)


def test_a_recording_has_every_token_and_says_what_ran(gpu: None, tmp_path: Path) -> None:
    curve = read_curve(perform(RECORDING, tmp_path, "cpu"))
    assert files(tmp_path) == ["result.csv", "result.json", "result.transcript.jsonl"]
    spoken = load_conversation("long").turns[0].max_new_tokens
    assert curve.table["step"].tolist() == list(range(spoken + 1))
    assert curve.table["used_mib"].tolist() == [1000.0] * (spoken + 1)
    assert (curve.provenance["status"], curve.provenance["resumptions"]) == ("finished", [])
    workload = forecast_of(curve).workload
    assert (workload.cache, workload.static_tokens, workload.weights) == ("static", STATIC_TOKENS, "random")
    check_notes(RECORDING, curve.provenance, tmp_path)


@pytest.fixture
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "measure_rates", lambda device, threads: measure_rates(device, block_bytes=2**20))
    monkeypatch.setattr(child, "measure_polling", lambda: measure_polling(repetitions=1))


@pytest.mark.usefixtures("_short_measurements")
def test_times_of_tokens_have_a_floor_and_the_cost_of_polling(gpu: None, tmp_path: Path) -> None:
    path = perform(LATENCY, tmp_path, "cpu")
    table, header = pd.read_csv(path), read_curve_json(path.with_suffix(".json"))
    notes = header["provenance"]
    assert table["context_tokens"].tolist() == list(LATENCY.lengths)
    assert table["sm_clock_mhz"].tolist() == [1500, 1500]
    assert (table[["token_ms", "first_token_ms", "floor_ms"]] > 0).all(axis=None)
    assert [way["way"] for way in notes["polling"]] == [STARTING, SUBPROCESS, API, NVML]
    assert not any(way["outcome"] for way in notes["polling"])
    assert notes["rates"]["bandwidth_bytes_per_s"] > 0
    assert header["label"] == "embedded, fp32, eager, Fake GPU"
    check_notes(LATENCY, notes, tmp_path)


@pytest.mark.usefixtures("_short_measurements")
def test_compiled_tokens_are_timed_and_eager_ones_do_not_pass_as_compiled(
    compiled: LoadedModel, embedded: LoadedModel, tmp_path: Path
) -> None:
    path = time_tokens(compiled, [16, 8], tmp_path / "compiled.csv", {"command": "test"})
    table, header = pd.read_csv(path), read_curve_json(path.with_suffix(".json"))
    assert header["label"] == "embedded, fp32, compiled, CPU"
    assert header["provenance"]["compiled"]
    assert header["provenance"]["compilation_s"] > 0
    assert header["provenance"]["command"] == "test"
    assert table[["context_tokens", "tokens", "prefills"]].values.tolist() == [[16, 32, 3], [8, 32, 3]]
    assert table["kv_read_bytes"].tolist() == [16 * 4096, 8 * 4096]

    failed = Compilation(failure="InvalidCxxCompiler: no compiler")
    loaded = replace(embedded, report=replace(embedded.report, compilation=failed))
    with pytest.raises(EvidenceError, match=r"embedded in fp32 cannot be compiled here \(InvalidCxxCompiler: no comp"):
        time_tokens(loaded, [8], tmp_path / "eager.csv", {})
    assert not (tmp_path / "eager.csv").exists()


@pytest.mark.parametrize("run", [SNAPSHOT, replace(SNAPSHOT, cache="dynamic")], ids=str)
def test_history_notes_the_row_and_the_module_of_every_event(gpu: None, tmp_path: Path, run: Run) -> None:
    snapshot = read_snapshot(perform(run, tmp_path, "cpu"))

    notes = [event.note for event in snapshot.devices[0].events if event.action == "alloc"]
    rows = list(dict.fromkeys(note.partition("|")[0] for note in notes))
    assert rows == ["load", *map(str, range(SNAPSHOT_TURN.generated)), "end"]
    of_step = [note.partition("|")[2] for note in notes if note.startswith("3|")]
    assert of_step[:3] == ["", "model", "model.embed_tokens"]
    assert of_step.count("model.layers.2.self_attn.q_proj") == 1
    assert of_step[-1] == ""
    assert snapshot.provenance["turns"] == [list(SNAPSHOT_TURN)]
    expected = ("static", STATIC_TOKENS) if run.cache == "static" else ("dynamic", 0)
    assert (snapshot.provenance["cache"], snapshot.provenance["static_tokens"]) == expected
    check_notes(run, snapshot.provenance, tmp_path)


def test_results_land_finished_runs_are_skipped_and_a_killed_run_starts_anew(tmp_path: Path) -> None:
    assert [outcome.status for outcome in do(tmp_path, SNAPSHOT, child=script(OBEDIENT))] == ["finished"]
    (killed,) = do(tmp_path, RECORDING, child=script(KILLED))
    assert killed.status == "failed"
    assert files(tmp_path / "data") == [f"snapshots/{GPU}-{SNAPSHOT.setting}.json.gz"]
    torn = tmp_path / "work" / RECORDING.name / "result.csv"
    assert torn.read_text() == "fp32"

    outcomes = do(tmp_path, SNAPSHOT, RECORDING, LATENCY, child=script(OBEDIENT))
    assert [str(outcome).split(",")[0] for outcome in outcomes] == [
        f"was there {SNAPSHOT.name}",
        f"finished  {RECORDING.name}",
        f"finished  {LATENCY.name}",
    ]
    assert [outcome.file.read_text() for outcome in outcomes if outcome.file] == ["fp32"] * 3
    assert files(tmp_path / "work") == []
    assert files(tmp_path / "data") == [
        f"recordings/{GPU}-embedded-fp32-sdpa-static.csv",
        f"recordings/{GPU}-embedded-fp32-sdpa-static.json",
        f"recordings/{GPU}-embedded-fp32-sdpa-static.transcript.jsonl",
        f"recordings/latency-{GPU}-embedded-fp32-sdpa-dynamic.csv",
        f"recordings/latency-{GPU}-embedded-fp32-sdpa-dynamic.json",
        f"snapshots/{GPU}-embedded-fp32-eager-static.json.gz",
    ]


def test_no_run_starts_after_the_budget(tmp_path: Path) -> None:
    assert [outcome.status for outcome in do(tmp_path, SNAPSHOT, child=(), budget_s=0.0)] == ["left"]
    assert files(tmp_path) == []


def test_a_run_that_cannot_be_done_says_why_and_exits_with_two(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends_with: list[int] = []
    monkeypatch.setattr(child, "end_with", ends_with.append)
    order = {"run": asdict(replace(SNAPSHOT, precision="int2")), "folder": str(tmp_path), "device": "cpu"}
    with pytest.raises(SystemExit) as stopped:
        main(json.dumps({**order, "parent": 123}))
    assert ends_with == [123]
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("glmlab: precision='int2' is not known")
    assert files(tmp_path) == []


# ------------------------------------------------------------------------------------------------------ the command


def test_gpu_is_named_by_another_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    main("gpu")
    pretend_gpu(monkeypatch)
    main("gpu")
    assert capsys.readouterr().out.splitlines() == ["null", '"NVIDIA Fake GPU"']

    assert gpu_of_this_machine(script("print('\"NVIDIA H200\"')")) == "h200"
    with pytest.raises(EvidenceError, match="its own words stand above"):
        gpu_of_this_machine(script("raise SystemExit(1)"))
    with pytest.raises(EvidenceError, match=r"PyTorch sees none here\. .*evidence --list' shows what would run"):
        gpu_of_this_machine(script("print('null')"))


def test_list_shows_every_run_and_needs_no_gpu() -> None:
    result = CliRunner().invoke(app, ["evidence", "--list", "llama"])
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [str(run) for run in choose(["llama"])]


def test_command_counts_what_became_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = choose(["snapshot-llama"])
    statuses = {"finished": "1 finished", "left": "goes on with what is left"}
    monkeypatch.setattr(runner, "gpu_of_this_machine", lambda: GPU)
    for status, said in statuses.items():
        monkeypatch.setattr(runner, "gather", lambda *_, status=status, **__: iter([Outcome(run, status, 2.0)]))
        result = CliRunner().invoke(app, ["evidence", "snapshot-llama", "--data", str(tmp_path)])
        assert result.exit_code == 0
        assert said in result.stdout
    monkeypatch.setattr(runner, "gather", lambda *_, **__: iter([Outcome(run, "failed", 2.0)]))
    result = CliRunner().invoke(app, ["evidence", "snapshot-llama"])
    assert isinstance(result.exception, EvidenceError)
    assert "1 runs failed" in str(result.exception)


def test_a_budget_or_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match="a budget of nan minutes is not possible. Give --minutes 0 or more"):
        do(tmp_path, SNAPSHOT, child=(), budget_s=float("nan"))
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    with pytest.raises(EvidenceError, match="the folder .* cannot be made .*Choose another"):
        list(gather([SNAPSHOT], in_the_way, tmp_path / "work", "gpu", budget_s=1.0))
