"""Recordings of real chats with the embedded model's architecture: rows, provenance, kills, resumptions, refusals.

Most tests take random weights, whose answers have exactly the length that the conversation asks for.
"""

import json
import multiprocessing
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fake_gpu import GPU_UUIDS, FakeCuda, FakeDriver
from transformers import GenerationConfig

from glmlab.core.curve import read_curve
from glmlab.core.units import MIB
from glmlab.forecast.comparison import forecast_of
from glmlab.generation import chat
from glmlab.generation.chat import ChatSession, ContextFullError
from glmlab.generation.decoding import decode_steps
from glmlab.memory.conversations import Conversation, Question, load_conversation
from glmlab.memory.probes import MemoryProbe, Reading
from glmlab.memory.recording import COLUMNS, Recorder, RecordingError, record
from glmlab.models.checkpoints import find_config, read_config_json
from glmlab.models.kv_cache import kv_cache_bytes
from glmlab.models.loading import LoadedModel, load_model
from glmlab.tracing import tracer as tracing
from glmlab.tracing.cached import trace

QUESTIONS = (Question("你好", 6), Question("Tell me a long story.", 9), Question("谢谢", 4))
CHAT = Conversation("three", "zh, en", QUESTIONS, sha256="0" * 64)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("embedded", weights="random", precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def whole(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished recording of the chat, a row a turn; tests must not change it."""
    path = tmp_path_factory.mktemp("whole") / "chat.csv"
    record(loaded, CHAT, path)
    return path


@pytest.fixture(scope="module")
def whole_tokens(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, a row a token."""
    path = tmp_path_factory.mktemp("whole") / "chat.csv"
    record(loaded, CHAT, path, every_token=True)
    return path


def provenance_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["provenance"]
    return content


def transcript_of(path: Path) -> list[dict[str, Any]]:
    text = path.with_suffix(".transcript.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def answers_of(path: Path) -> list[object]:
    return [line["ids"] for line in transcript_of(path) if "ids" in line]


def assert_same_chat(path: Path, expected: Path) -> None:
    """Answers and counts are equal; times and memory depend on when a recording was made."""
    columns = ["step", "turn", "context_tokens", "context_characters", "generated_tokens", "kv_mib"]
    pd.testing.assert_frame_equal(read_curve(path).table[columns], read_curve(expected).table[columns])
    assert answers_of(path) == answers_of(expected)


def renamed(loaded: LoadedModel, **report: str) -> LoadedModel:
    return LoadedModel(loaded.model, loaded.tokenizer, replace(loaded.report, **report))  # type: ignore[arg-type]


def interrupt() -> None:
    raise KeyboardInterrupt


class StoppingProbe(MemoryProbe):
    """Reads the process, and stops the run instead of the n-th reading."""

    def __init__(self, stop_at: int, stop: Callable[[], object]) -> None:
        super().__init__("cpu")
        self.left, self.stop = stop_at, stop

    def read(self, *, fast: bool = False) -> list[Reading]:
        self.left -= 1
        if self.left == 0:
            self.stop()
        return super().read(fast=fast)


# ------------------------------------------------------------------------------------------------- the rows


def test_one_row_after_loading_and_one_a_turn(loaded: LoadedModel, whole: Path) -> None:
    curve = read_curve(whole)

    table = curve.table
    token_bytes = kv_cache_bytes(loaded.model.config, tokens=1, dtype_bytes=4)
    said = [len(line["user"] + line["text"]) for line in transcript_of(whole)[1:]]
    assert curve.kind == "measured"
    assert tuple(table.columns) == COLUMNS
    assert table["turn"].tolist() == [0, 1, 2, 3]
    assert table["step"].tolist() == [0, 6, 15, 19]
    assert table["generated_tokens"].tolist() == [0, 6, 9, 4]
    assert table["context_tokens"].iloc[0] == 0
    fed = table["prompt_tokens"] + table["generated_tokens"] - 1  # the newest token is not fed yet
    assert (table["context_tokens"].diff().iloc[1:] == fed.iloc[1:]).all()
    assert (table["kv_mib"] * MIB == table["context_tokens"] * token_bytes).all()
    assert table["context_characters"].tolist() == [0, *pd.Series(said).cumsum()]
    assert (table["rss_mib"] > 100).all()
    assert table[["gpu", "used_mib", "process_mib", "allocated_mib"]].isna().all(axis=None)
    assert table["first_token_s"].isna().tolist() == [True, False, False, False]
    assert table["elapsed_s"].is_monotonic_increasing


def test_every_token_gives_a_row_a_token_and_the_same_turns(whole: Path, whole_tokens: Path) -> None:
    turns, tokens = read_curve(whole).table, read_curve(whole_tokens).table

    assert tokens["step"].tolist() == list(range(20))
    last_of_turn = tokens.groupby("turn").tail(1).reset_index(drop=True)
    columns = ["step", "context_tokens", "context_characters", "prompt_tokens", "generated_tokens", "kv_mib"]
    pd.testing.assert_frame_equal(last_of_turn[columns], turns[columns])
    assert (tokens[tokens["turn"] == 2]["context_tokens"].diff().dropna() == 1).all()


def test_gpustat_is_asked_once_a_turn_and_nvml_for_every_token_and_neither_time_is_the_models(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands still but while the probe reads."""
    asked = []
    now_s = 0.0

    class SlowProbe(MemoryProbe):
        def read(self, *, fast: bool = False) -> list[Reading]:
            nonlocal now_s
            asked.append("nvml" if fast else "gpustat")
            now_s += 0.25
            return super().read(fast=fast)

    monkeypatch.setattr(time, "perf_counter", lambda: now_s)
    table = record(loaded, CHAT, tmp_path / "a.csv", every_token=True, probe=SlowProbe("cpu")).table

    assert asked == ["gpustat", *["nvml"] * 5, "gpustat", *["nvml"] * 8, "gpustat", *["nvml"] * 3, "gpustat"]
    assert table["elapsed_s"].tolist() == [0.25 * (reading + 1) for reading in range(20)]
    assert table["first_token_s"].dropna().unique().tolist() == table["token_s"].dropna().unique().tolist() == [0.0]


def test_several_gpus_give_several_rows_and_withheld_figures_are_empty(
    loaded: LoadedModel, tmp_path: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.says("gpu 24000 1000 self=600", "gpu 24000 2000 self=withheld")
    FakeCuda(GPU_UUIDS[:2]).install(monkeypatch)

    curve = record(loaded, CHAT, tmp_path / "two.csv", probe=MemoryProbe(["cuda:0", "cuda:1"]))

    assert curve.table["gpu"].tolist() == [0, 1] * 4
    assert curve.table["turn"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert curve.table["used_mib"].tolist() == [1000.0, 2000.0] * 4
    assert curve.table["process_mib"].isna().tolist() == [False, True] * 4
    assert ",2000.0,,0.0,200.0," in (tmp_path / "two.csv").read_text(encoding="utf-8")  # empty, not 0
    assert curve.provenance["gpus"] == [{"index": gpu, "name": "Fake GPU", "total_mib": 24000.0} for gpu in (0, 1)]
    assert (curve.provenance["driver"], curve.provenance["compute_capability"]) == ("999.00.fake", "8.9")
    assert curve.label == "embedded, fp32, Fake GPU, Fake GPU"


# ----------------------------------------------------------------------------------- what a forecast is compared to


@pytest.mark.parametrize("static_tokens", [None, 4096])
def test_recording_allocates_what_a_trace_of_its_workload_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, static_tokens: int | None
) -> None:
    """Run the tracer with the settings that the recorded chat gives to the decode loop."""
    monkeypatch.setenv("GLMLAB_CACHE", str(tmp_path))
    sizes = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 128, "vocab_size": 4096}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": None}
    config = {**read_config_json(find_config("qwen2.5-7b")), **sizes, **heads}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = load_model(str(tmp_path), weights="random", precision="fp32", device="cpu")
    seen: dict[str, GenerationConfig] = {}

    def noting(*args: Any, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        seen["config"] = generation_config
        return decode_steps(*args, generation_config=generation_config, **kwargs)

    monkeypatch.setattr(chat, "decode_steps", noting)
    curve = record(loaded, CHAT, tmp_path / "chat.csv", static_tokens=static_tokens)
    told = forecast_of(replace(curve, provenance={**curve.provenance, "model": str(tmp_path)})).workload
    assert (told.cache, told.static_tokens) == (("dynamic", 0) if static_tokens is None else ("static", 4096))
    assert [turn.generated for turn in told.turns] == [question.max_new_tokens for question in QUESTIONS]

    expected = trace(told.trace_settings())
    monkeypatch.setattr(tracing.decoding, "decode_steps", partial(decode_steps, generation_config=seen["config"]))
    made = trace(told.trace_settings(), refresh=True)
    assert made.labels == expected.labels
    for name in ("first.prefill", "first.step2", "steady", "later.prefill"):
        assert made.program.slots(name) == expected.program.slots(name) > 0


def test_static_cache_is_noted_and_a_resumption_needs_the_same(
    loaded: LoadedModel, tmp_path: Path, whole: Path
) -> None:
    curve = record(loaded, CHAT, tmp_path / "static.csv", static_tokens=300)
    dynamic = provenance_of(whole)
    assert (dynamic["cache"], dynamic["static_tokens"]) == ("dynamic", 0)
    assert (curve.provenance["cache"], curve.provenance["static_tokens"]) == ("static", 300)
    assert answers_of(tmp_path / "static.csv") == answers_of(whole)
    full_mib = kv_cache_bytes(loaded.model.config, tokens=300, dtype_bytes=4) / MIB
    assert curve.table["kv_mib"].tolist() == [0.0, full_mib, full_mib, full_mib]
    with pytest.raises(RecordingError, match=r"cache 'static', now 'dynamic'; static_tokens 300, now 0"):
        record(loaded, CHAT, tmp_path / "static.csv", resume=True)
    with pytest.raises(RecordingError, match=r"turn 2 was not recorded: .* static cache's limit is 12 tokens"):
        record(loaded, CHAT, tmp_path / "short.csv", static_tokens=12)


# ------------------------------------------------------------------------------------------------ provenance


def test_provenance_says_what_was_recorded_and_nothing_of_this_machine(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    conversation = replace(load_conversation("short"), turns=QUESTIONS[:1])
    record(loaded, conversation, tmp_path / "chat.csv")

    provenance = provenance_of(tmp_path / "chat.csv")
    text = (tmp_path / "chat.json").read_text(encoding="utf-8")
    assert provenance["conversation"]["sha256"] == load_conversation("short").sha256
    assert provenance["date"] == "2023-11-14T22:13:20+00:00"
    assert provenance["status"] == "finished"
    assert (provenance["model"], provenance["precision"], provenance["attention"]) == ("embedded", "fp32", "sdpa")
    assert provenance["load_path"] == "random weights from the config -> ChatGLM3ForCausalLM on CPU"
    assert provenance["sampling"] == {"do_sample": False}
    assert "exactly max_new_tokens" in provenance["answers"]
    assert {"python", "glmlab", "torch", "transformers", "bitsandbytes", "gpustat"} == set(provenance["versions"])
    assert provenance["os"].startswith(platform.system())
    assert not [word for word in (str(tmp_path), os.getcwd(), str(Path.home()) + os.sep) if word in text]
    assert platform.node() not in text.replace("\n", " ").split('"')


def test_folder_of_a_checkpoint_is_recorded_by_its_last_name_and_progress_is_shown(
    loaded: LoadedModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "somewhere" / "my-chatglm"
    folder.mkdir(parents=True)
    curve = record(renamed(loaded, name=str(folder)), CHAT, tmp_path / "bar.csv")
    assert curve.provenance["model"] == "my-chatglm"
    assert curve.label == "my-chatglm, fp32, CPU"
    progress = capfd.readouterr().err
    assert "recording bar" in progress
    assert "3/3" in progress


# ----------------------------------------------------------------------------------------- killed and resumed


@pytest.mark.skipif(os.name != "posix", reason="the run that is killed is a fork of this process")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_run_leaves_a_readable_file_and_is_resumed(
    loaded: LoadedModel, tmp_path: Path, whole_tokens: Path
) -> None:
    killed = tmp_path / "killed.csv"
    probe = StoppingProbe(12, lambda: os.kill(os.getpid(), signal.SIGKILL))  # in the midst of the second turn
    how = {"every_token": True, "probe": probe}
    run = multiprocessing.get_context("fork").Process(target=record, args=(loaded, CHAT, killed), kwargs=how)
    run.start()
    run.join()
    assert run.exitcode == -signal.SIGKILL

    torn = read_curve(killed)
    assert torn.provenance["status"] == "running"
    assert torn.table["step"].tolist() == list(range(11))

    resumed = record(loaded, CHAT, killed, every_token=True, resume=True)

    assert_same_chat(killed, whole_tokens)
    assert resumed.table["elapsed_s"].is_monotonic_increasing
    assert resumed.provenance["status"] == "finished"
    (resumption,) = resumed.provenance["resumptions"]
    assert resumption["after_turn"] == 1
    assert "prefilled in one pass" in resumption["note"]


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("torn_file", ["csv", "transcript"])
def test_torn_last_lines_are_cut_off(
    loaded: LoadedModel, tmp_path: Path, whole: Path, whole_tokens: Path, torn_file: str, every_token: bool
) -> None:
    expected = whole_tokens if every_token else whole
    torn = Path(shutil.copytree(expected.parent, tmp_path / "torn")) / "chat.csv"
    transcript = torn.with_suffix(".transcript.jsonl")
    lines = transcript.read_bytes().splitlines(keepends=True)
    transcript.write_bytes(b"".join(lines[:3]) + (lines[3][:20] if torn_file == "transcript" else b""))
    if torn_file == "csv":
        torn.write_bytes(torn.read_bytes()[:-7])
        assert len(read_curve(torn).table) == len(read_curve(expected).table) - 1

    record(loaded, CHAT, torn, every_token=every_token, resume=True)

    assert_same_chat(torn, expected)


@pytest.mark.parametrize("stop_at", [1, 2, 4])
def test_run_stopped_at_any_reading_is_resumed(loaded: LoadedModel, tmp_path: Path, whole: Path, stop_at: int) -> None:
    stopped = tmp_path / "stopped.csv"
    with pytest.raises(KeyboardInterrupt):
        record(loaded, CHAT, stopped, probe=StoppingProbe(stop_at, interrupt))

    record(loaded, CHAT, stopped, resume=True)

    assert_same_chat(stopped, whole)


def test_driver_gone_in_mid_run_leaves_the_rows_and_resume_goes_on(
    loaded: LoadedModel, tmp_path: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.csv"
    driver.says("gpu 24000 1000")
    FakeCuda(GPU_UUIDS[:1]).install(monkeypatch)

    class FragileProbe(MemoryProbe):
        def read(self, *, fast: bool = False) -> list[Reading]:
            if path.exists() and path.read_bytes().count(b"\n") == 3:  # header, loading, turn 1
                driver.goes_away()
            return super().read(fast=fast)

    with pytest.raises(
        RecordingError, match=r"turn 2 was not recorded: .*driver does not answer.*up to turn 1 are in .*--resume"
    ):
        record(loaded, CHAT, path, probe=FragileProbe("cuda:0"))
    assert read_curve(path).table["turn"].tolist() == [0, 1]
    assert provenance_of(path)["status"] == "stopped (RecordingError)"

    driver.says("gpu 24000 1500")
    resumed = record(loaded, CHAT, path, resume=True, probe=MemoryProbe("cuda:0"))
    assert resumed.table["used_mib"].tolist() == [1000.0, 1000.0, 1500.0, 1500.0]


# ---------------------------------------------------------------------------------------------------- refusals


def test_recording_never_overwrites_a_file(loaded: LoadedModel, tmp_path: Path) -> None:
    for taken in ("chat.csv", "chat.json", "chat.transcript.jsonl"):
        (tmp_path / taken).write_text("precious", encoding="utf-8")
        with pytest.raises(RecordingError, match=r"exists already.*Name another file, or continue .* --resume"):
            record(loaded, CHAT, tmp_path / "chat.csv")
        assert [(file.name, file.read_text(encoding="utf-8")) for file in tmp_path.iterdir()] == [(taken, "precious")]
        (tmp_path / taken).unlink()


def test_two_runs_never_write_one_file(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "chat.csv"
    with Recorder(ChatSession(loaded), path, conversation=CHAT) as first:
        list(first.say("你好", max_new_tokens=3))
        before = path.read_bytes()
        with pytest.raises(RecordingError, match=r"being written by another run. Wait until it ends"):
            record(loaded, CHAT, path, resume=True)
        with pytest.raises(RecordingError, match="exists already"):
            record(loaded, CHAT, path)
        assert path.read_bytes() == before

    with Recorder(ChatSession(loaded), path, conversation=CHAT, resume=True) as second:
        assert second.turns == 1


def test_resume_needs_a_recording(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"nothing to resume\. Start it without --resume"):
        record(loaded, CHAT, tmp_path / "chat.csv", resume=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("report", "arguments", "message"),
    [
        ({"precision": "bf16"}, {}, "precision 'fp32', now 'bf16'"),
        ({"name": "other"}, {}, "model 'embedded', now 'other'"),
        ({}, {"conversation": replace(CHAT, sha256="f")}, rf"conversation \(sha256\) '{'0' * 64}', now 'f'"),
        ({}, {"every_token": True}, "rows 'one a turn', now 'one a token'"),
    ],
)
def test_resume_with_another_setting_is_refused(
    loaded: LoadedModel, tmp_path: Path, whole: Path, report: dict[str, str], arguments: dict[str, Any], message: str
) -> None:
    path = Path(shutil.copytree(whole.parent, tmp_path / "copy")) / "chat.csv"
    content = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(RecordingError, match=f"another setting: {message}. Resume with the same setting"):
        record(renamed(loaded, **report), **{"conversation": CHAT, "path": path, "resume": True, **arguments})
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == content


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".csv", lambda text: text[:200], "shorter than its transcript says"),
        (
            ".json",
            lambda text: text.replace("resumptions", "x"),
            r"chat\.json is damaged \(its provenance has no resum",
        ),
        (".transcript.jsonl", lambda text: '{"turn": 0,\n' + text, r"transcript\.jsonl is damaged"),
        (".transcript.jsonl", lambda text: "[1, 2]\n" + text, r"damaged \(line 1 is not one that a recording writes"),
        (".transcript.jsonl", lambda text: text.replace('"ids"', '"x"', 1), r"damaged \(line 2 is not one that a rec"),
        (".transcript.jsonl", lambda text: text.replace('"ids": [', '"ids": [1000000000, '), r"damaged \(line 2 is no"),
        (".transcript.jsonl", lambda text: text.replace('"ids": [', '"ids": [5, '), "tokenizer or chat format changed"),
    ],
)
def test_lost_rows_and_damaged_files_are_noticed(
    loaded: LoadedModel, tmp_path: Path, whole: Path, suffix: str, change: Callable[[str], str], message: str
) -> None:
    path = Path(shutil.copytree(whole.parent, tmp_path / "damaged")) / "chat.csv"
    file = path.with_suffix(suffix)
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(RecordingError, match=message):
        record(loaded, CHAT, path, resume=True)


def test_full_context_ends_a_fixed_recording_and_a_typed_chat_can_be_cleared(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", 24)

    with pytest.raises(RecordingError, match=r"not recorded: .*limit.*\. The rows up to turn \d are in .*shorter conv"):
        record(loaded, CHAT, tmp_path / "full.csv")
    assert 0 < read_curve(tmp_path / "full.csv").table["context_tokens"].max() <= 24

    with Recorder(ChatSession(loaded), tmp_path / "typed.csv") as recorder:
        list(recorder.say("你好", max_new_tokens=5))
        with pytest.raises(ContextFullError):
            list(recorder.say("Please tell me a very long story about an elephant.", max_new_tokens=5))
        recorder.clear()
        list(recorder.say("谢谢", max_new_tokens=5))
    assert read_curve(tmp_path / "typed.csv").table["turn"].tolist() == [0, 1, 1, 2]


def test_unwritable_place_is_named(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordingError, match=r"chat\.csv cannot be written \(.*\)\. Name a file in another folder"):
        record(loaded, CHAT, tmp_path / "file" / "chat.csv")


# ------------------------------------------------------------------------------------------------ typed chats


def test_interrupted_answer_is_recorded_and_the_chat_resumes_after_it(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "typed.csv"
    with Recorder(ChatSession(loaded), path) as recorder:
        answer = recorder.say("你好", max_new_tokens=50)
        for _ in range(4):
            next(answer)
        answer.close()  # type: ignore[attr-defined]
        list(recorder.say("谢谢", max_new_tokens=3))
        expected_context = recorder._session.context_tokens
    assert read_curve(path).table["generated_tokens"].tolist() == [0, 4, 3]

    session = ChatSession(loaded)
    with Recorder(session, path, resume=True) as recorder:
        assert session.context_tokens == expected_context
        list(recorder.say("再见", max_new_tokens=2))
    assert read_curve(path).table["turn"].tolist() == [0, 1, 2, 3]


def test_fixed_conversation_says_an_interrupted_turn_again(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "fixed.csv"
    with Recorder(ChatSession(loaded), path, conversation=CHAT) as recorder:
        answer = recorder.say("你好", max_new_tokens=50)
        next(answer)
        answer.close()  # type: ignore[attr-defined]
        assert recorder.turns == 0
    assert read_curve(path).table["turn"].tolist() == [0]


def test_cleared_chat_is_resumed_from_where_it_was_cleared(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "typed.csv"
    with Recorder(ChatSession(loaded), path) as recorder:
        list(recorder.say("你好", max_new_tokens=5))
        recorder.clear()
        list(recorder.say("谢谢", max_new_tokens=3))
    table = read_curve(path).table
    assert table["turn"].tolist() == [0, 1, 1, 2]
    assert table[["context_tokens", "kv_mib"]].values.tolist()[2] == [0, 0]

    session = ChatSession(loaded)
    with Recorder(session, path, resume=True):
        assert [turn.user_text for turn in session.turns] == ["谢谢"]
        assert session.context_tokens == table["context_tokens"].iloc[-1]
