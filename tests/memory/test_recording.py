"""Recordings of real chats with the embedded model's architecture: rows, provenance, kills, resumptions, refusals.

Most tests take random weights, whose answers have exactly the length that the conversation asks for.
"""

import json
import os
import platform
import signal
import subprocess
import sys
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
from glmlab.forecast.comparison import forecast_of
from glmlab.generation import chat
from glmlab.generation.chat import ChatSession, ContextFullError
from glmlab.generation.decoding import decode_steps
from glmlab.memory.probes import MemoryProbe, Reading
from glmlab.memory.recording import (
    COLUMNS,
    Conversation,
    ConversationError,
    Question,
    Recorder,
    RecordingError,
    load_conversation,
    record,
)
from glmlab.models.checkpoints import find_config, read_config_json
from glmlab.models.loading import LoadedModel, load_model
from glmlab.tracing import tracer as tracing
from glmlab.tracing.cached import trace

QUESTIONS = (Question("你好", 6), Question("Tell me a long story.", 9), Question("谢谢", 4))
CHAT = Conversation("three", "zh, en", QUESTIONS, sha256="0" * 64)
MIB = 2**20


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("embedded", weights="random", precision="fp32", device="cpu")


def provenance_of(path: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["provenance"]
    return content


def transcript_of(path: Path) -> list[dict[str, object]]:
    text = path.with_suffix(".transcript.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def answers_of(path: Path) -> list[object]:
    return [line["ids"] for line in transcript_of(path) if "ids" in line]


def counts_of(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that must not depend on when and where a recording was made."""
    return table[["step", "turn", "context_tokens", "context_characters", "generated_tokens", "kv_mib"]]


class StoppingProbe(MemoryProbe):
    """Reads the process, and stops the run at the n-th reading."""

    def __init__(self, stop_at: int) -> None:
        super().__init__("cpu")
        self.left = stop_at

    def _readings(self, *, fast: bool) -> list[Reading]:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super()._readings(fast=fast)


# ------------------------------------------------------------------------------------------------- the rows


def test_one_row_after_loading_and_one_a_turn(loaded: LoadedModel, tmp_path: Path) -> None:
    curve = record(loaded, CHAT, tmp_path / "chat.csv")

    table, config = curve.table, loaded.model.config
    kv_bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    said = [len(str(line["user"]) + str(line["text"])) for line in transcript_of(tmp_path / "chat.csv")[1:]]
    assert curve.kind == "measured"
    assert tuple(table.columns) == COLUMNS
    assert table["turn"].tolist() == [0, 1, 2, 3]
    assert table["step"].tolist() == [0, 6, 15, 19]
    assert table["generated_tokens"].tolist() == [0, 6, 9, 4]
    assert table["context_tokens"].iloc[0] == 0
    fed = table["prompt_tokens"] + table["generated_tokens"] - 1  # the newest token is not fed yet
    assert (table["context_tokens"].diff().iloc[1:] == fed.iloc[1:]).all()
    assert (table["kv_mib"] * MIB == table["context_tokens"] * kv_bytes_per_token).all()
    assert table["context_characters"].tolist() == [0, *pd.Series(said).cumsum()]
    assert (table["rss_mib"] > 100).all()
    assert table[["gpu", "used_mib", "process_mib", "allocated_mib"]].isna().all(axis=None)
    assert table["first_token_s"].isna().tolist() == [True, False, False, False]
    assert table["elapsed_s"].is_monotonic_increasing


def test_every_token_gives_a_row_a_token_and_the_same_turns(loaded: LoadedModel, tmp_path: Path) -> None:
    turns = record(loaded, CHAT, tmp_path / "turns.csv").table
    tokens = record(loaded, CHAT, tmp_path / "tokens.csv", every_token=True).table

    assert tokens["step"].tolist() == list(range(20))
    last_of_turn = tokens.groupby("turn").tail(1).reset_index(drop=True)
    pd.testing.assert_frame_equal(counts_of(last_of_turn), counts_of(turns))
    within = tokens[tokens["turn"] == 2]["context_tokens"]
    assert (within.diff().dropna() == 1).all()


def test_gpustat_is_asked_once_a_turn_and_nvml_for_every_token(loaded: LoadedModel, tmp_path: Path) -> None:
    asked = []

    class CountingProbe(MemoryProbe):
        def _readings(self, *, fast: bool) -> list[Reading]:
            asked.append("nvml" if fast else "gpustat")
            return super()._readings(fast=fast)

    record(loaded, CHAT, tmp_path / "a.csv", every_token=True, probe=CountingProbe("cpu"))

    assert asked == ["gpustat", *["nvml"] * 5, "gpustat", *["nvml"] * 8, "gpustat", *["nvml"] * 3, "gpustat"]


def test_time_of_reading_is_not_the_models(loaded: LoadedModel, tmp_path: Path) -> None:
    class SlowProbe(MemoryProbe):
        def read_fast(self) -> list[Reading]:
            time.sleep(0.3)
            return super().read_fast()

    one = Conversation("one", "zh", (Question("你好", 4),), sha256="1")
    table = record(loaded, one, tmp_path / "a.csv", every_token=True, probe=SlowProbe("cpu")).table

    assert table["elapsed_s"].iloc[-1] > 0.9
    assert table["token_s"].max() < 0.2


def test_several_gpus_give_several_rows_and_withheld_figures_are_empty(
    loaded: LoadedModel, tmp_path: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.says("gpu 24000 1000 self=600", "gpu 24000 2000 self=withheld")
    FakeCuda(GPU_UUIDS[:2]).install(monkeypatch)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 9))

    curve = record(loaded, CHAT, tmp_path / "two.csv", probe=MemoryProbe(["cuda:0", "cuda:1"]))

    assert curve.table["gpu"].tolist() == [0, 1] * 4
    assert curve.table["turn"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert curve.table["used_mib"].tolist() == [1000.0, 2000.0] * 4
    assert curve.table["process_mib"].isna().tolist() == [False, True] * 4
    assert ",2000.0,,0.0,200.0," in (tmp_path / "two.csv").read_text(encoding="utf-8")  # empty, not 0
    provenance = provenance_of(tmp_path / "two.csv")
    assert provenance["gpus"] == [{"index": gpu, "name": "Fake GPU", "total_mib": 24000.0} for gpu in (0, 1)]
    assert (provenance["driver"], provenance["compute_capability"]) == ("999.00.fake", "8.9")
    assert curve.label == "embedded, fp32, Fake GPU, Fake GPU"


def test_recording_shows_its_progress(loaded: LoadedModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record(loaded, CHAT, tmp_path / "bar.csv")

    progress = capfd.readouterr().err
    assert "recording bar" in progress
    assert "3/3" in progress


# ----------------------------------------------------------------------------------- what a forecast is held against


@pytest.mark.parametrize("static_tokens", [None, 4096])
def test_recording_allocates_what_a_trace_of_its_workload_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, static_tokens: int | None
) -> None:
    """Run the tracer over the very settings with which the recorded chat calls the decode loop."""
    monkeypatch.setenv("GLMLAB_CACHE", str(tmp_path))
    sizes = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2}
    config = {**read_config_json(find_config("qwen2.5-7b")), **sizes, "num_key_value_heads": 1, "layer_types": None}
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


def test_static_cache_is_told_and_a_resumption_needs_the_same(loaded: LoadedModel, tmp_path: Path) -> None:
    dynamic = record(loaded, CHAT, tmp_path / "dynamic.csv")
    curve = record(loaded, CHAT, tmp_path / "static.csv", static_tokens=300)
    assert (dynamic.provenance["cache"], dynamic.provenance["static_tokens"]) == ("dynamic", 0)
    assert (curve.provenance["cache"], curve.provenance["static_tokens"]) == ("static", 300)
    assert answers_of(tmp_path / "static.csv") == answers_of(tmp_path / "dynamic.csv")
    config = loaded.model.config
    full = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * 300 / MIB
    assert curve.table["kv_mib"].tolist() == [0.0, full, full, full]
    with pytest.raises(RecordingError, match=r"cache 'static', now 'dynamic'; static_tokens 300, now 0"):
        record(loaded, CHAT, tmp_path / "static.csv", resume=True)


def test_conversation_that_a_static_cache_cannot_hold_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"turn 2 was not recorded: .* static cache's limit is 12 tokens"):
        record(loaded, CHAT, tmp_path / "short.csv", static_tokens=12)


# ------------------------------------------------------------------------------------------------ provenance


def test_provenance_says_what_was_recorded_and_nothing_of_this_machine(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    record(loaded, load_conversation("short"), tmp_path / "chat.csv")

    provenance = provenance_of(tmp_path / "chat.csv")
    text = (tmp_path / "chat.json").read_text(encoding="utf-8")
    conversation = provenance["conversation"]
    assert isinstance(conversation, dict)
    assert conversation["sha256"] == load_conversation("short").sha256
    assert provenance["date"] == "2023-11-14T22:13:20+00:00"
    assert provenance["status"] == "finished"
    assert (provenance["model"], provenance["precision"], provenance["attention"]) == ("embedded", "fp32", "sdpa")
    assert provenance["load_path"] == "random weights from the config -> ChatGLM3ForCausalLM on CPU"
    assert "exactly max_new_tokens" in str(provenance["answers"])
    assert {"python", "glmlab", "torch", "transformers", "bitsandbytes", "gpustat"} == set(provenance["versions"])  # type: ignore[call-overload]
    assert str(provenance["os"]).startswith(platform.system())
    assert not [word for word in (str(tmp_path), os.getcwd(), str(Path.home()) + os.sep) if word in text]
    assert platform.node() not in text.replace("\n", " ").split('"')


def test_folder_of_a_checkpoint_is_recorded_by_its_last_name(loaded: LoadedModel, tmp_path: Path) -> None:
    folder = tmp_path / "somewhere" / "my-chatglm"
    folder.mkdir(parents=True)
    from_folder = LoadedModel(loaded.model, loaded.tokenizer, replace(loaded.report, name=str(folder)))

    curve = record(from_folder, CHAT, tmp_path / "chat.csv")

    assert curve.provenance["model"] == "my-chatglm"
    assert curve.label == "my-chatglm, fp32, CPU"


# ----------------------------------------------------------------------------------------- killed and resumed

RECORD_SLOWLY = """
import sys
from glmlab.memory.recording import load_conversation, record
from glmlab.models.loading import load_model
loaded = load_model("embedded", weights="random", precision="fp32", device="cpu")
record(loaded, load_conversation(sys.argv[1]), sys.argv[2], every_token=True)
"""


def test_killed_run_leaves_a_readable_file_and_is_resumed(loaded: LoadedModel, tmp_path: Path) -> None:
    file, killed, whole = tmp_path / "chat.json", tmp_path / "killed.csv", tmp_path / "whole.csv"
    turns = [{"user": "你好", "max_new_tokens": n} for n in (5, 5, 120)]
    file.write_text(json.dumps({"name": "kill", "language": "zh", "turns": turns}), encoding="utf-8")
    child = subprocess.Popen([sys.executable, "-c", RECORD_SLOWLY, file, killed], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (killed.exists() and killed.read_bytes().count(b"\n") > 15):  # in the midst of the third turn
            assert child.poll() is None, "the recording ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL

    torn = read_curve(killed)
    assert torn.provenance["status"] == "running"
    assert torn.table["step"].tolist() == list(range(len(torn.table)))
    assert 14 < len(torn.table) < 120

    conversation = load_conversation(file)
    resumed = record(loaded, conversation, killed, every_token=True, resume=True)
    uninterrupted = record(loaded, conversation, whole, every_token=True)

    assert answers_of(killed) == answers_of(whole)
    pd.testing.assert_frame_equal(counts_of(resumed.table), counts_of(uninterrupted.table))
    assert resumed.table["elapsed_s"].is_monotonic_increasing
    assert resumed.provenance["status"] == "finished"
    (resumption,) = resumed.provenance["resumptions"]
    assert resumption["after_turn"] == 2
    assert "prefilled in one pass" in resumption["note"]


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("torn_file", ["csv", "transcript"])
def test_torn_last_lines_are_cut_off(loaded: LoadedModel, tmp_path: Path, torn_file: str, every_token: bool) -> None:
    whole, torn = tmp_path / "whole.csv", tmp_path / "torn.csv"
    record(loaded, CHAT, whole, every_token=every_token)
    record(loaded, CHAT, torn, every_token=every_token)
    transcript = torn.with_suffix(".transcript.jsonl")
    lines = transcript.read_bytes().splitlines(keepends=True)
    transcript.write_bytes(b"".join(lines[:3]) + (lines[3][:20] if torn_file == "transcript" else b""))
    if torn_file == "csv":
        torn.write_bytes(torn.read_bytes()[:-7])
        assert len(read_curve(torn).table) == len(read_curve(whole).table) - 1

    resumed = record(loaded, CHAT, torn, every_token=every_token, resume=True)

    pd.testing.assert_frame_equal(counts_of(resumed.table), counts_of(read_curve(whole).table))
    assert answers_of(torn) == answers_of(whole)


@pytest.mark.parametrize("stop_at", [1, 2, 4])
def test_run_stopped_at_any_reading_is_resumed(loaded: LoadedModel, tmp_path: Path, stop_at: int) -> None:
    stopped, whole = tmp_path / "stopped.csv", tmp_path / "whole.csv"
    with pytest.raises(KeyboardInterrupt):
        record(loaded, CHAT, stopped, probe=StoppingProbe(stop_at))

    resumed = record(loaded, CHAT, stopped, resume=True)

    pd.testing.assert_frame_equal(counts_of(resumed.table), counts_of(record(loaded, CHAT, whole).table))
    assert answers_of(stopped) == answers_of(whole)


def test_driver_gone_in_mid_run_leaves_the_rows_and_resume_goes_on(
    loaded: LoadedModel, tmp_path: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.csv"
    driver.says("gpu 24000 1000")
    FakeCuda(GPU_UUIDS[:1]).install(monkeypatch)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 9))

    class FragileProbe(MemoryProbe):
        def read(self) -> list[Reading]:
            if path.exists() and path.read_bytes().count(b"\n") == 3:  # header, loading, turn 1
                driver.goes_away()
            return super().read()

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
        with pytest.raises(RecordingError, match=r"is there already.*Name another file, or continue .* --resume"):
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
        with pytest.raises(RecordingError, match="is there already"):
            record(loaded, CHAT, path)
        assert path.read_bytes() == before

    with Recorder(ChatSession(loaded), path, conversation=CHAT, resume=True) as second:
        assert second.turns == 1


def test_resume_needs_a_recording(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"nothing to resume\. Start it without --resume"):
        record(loaded, CHAT, tmp_path / "chat.csv", resume=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("precision", "precision 'fp32', now 'bf16'"),
        ("model", "model 'embedded', now 'other'"),
        ("conversation", rf"conversation \(sha256\) '{'0' * 64}', now 'f'"),
        ("rows", "rows 'one a turn', now 'one a token'"),
    ],
)
def test_resume_with_another_setting_is_refused(loaded: LoadedModel, tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "chat.csv"
    with pytest.raises(KeyboardInterrupt):
        record(loaded, CHAT, path, probe=StoppingProbe(3))
    content = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    report = loaded.report
    if change == "precision":
        report = replace(report, precision="bf16")
    if change == "model":
        report = replace(report, name="other")
    conversation = Conversation("three", "zh", QUESTIONS, sha256="f") if change == "conversation" else CHAT

    with pytest.raises(RecordingError, match=f"another setting: {message}. Resume with the same setting"):
        record(
            LoadedModel(loaded.model, loaded.tokenizer, report),
            conversation,
            path,
            resume=True,
            every_token=change == "rows",
        )
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == content


def test_lost_rows_and_damaged_transcripts_are_noticed(loaded: LoadedModel, tmp_path: Path) -> None:
    def break_csv(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:200])

    def break_transcript(path: Path) -> None:
        transcript = path.with_suffix(".transcript.jsonl")
        transcript.write_bytes(b'{"turn": 0,\n' + transcript.read_bytes())

    def other_answer(path: Path) -> None:
        transcript = path.with_suffix(".transcript.jsonl")
        lines = [json.loads(line) for line in transcript.read_bytes().splitlines()]
        lines[1]["ids"].append(5)
        transcript.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def unknown_token(path: Path) -> None:
        transcript = path.with_suffix(".transcript.jsonl")
        lines = [json.loads(line) for line in transcript.read_bytes().splitlines()]
        lines[1]["ids"][0] = 10**9
        transcript.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def other_json(path: Path) -> None:
        path.with_suffix(".transcript.jsonl").write_text("[1, 2]\n", encoding="utf-8")

    def no_resumptions(path: Path) -> None:
        header = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        del header["provenance"]["resumptions"]
        path.with_suffix(".json").write_text(json.dumps(header), encoding="utf-8")

    cases: list[tuple[Callable[[Path], None], str]] = [
        (unknown_token, r"transcript\.jsonl is damaged \(line 2 is not one that a recording writes\)"),
        (other_json, r"transcript\.jsonl is damaged \(line 1 is not one that a recording writes\)"),
        (no_resumptions, r"no_resumptions\.json is damaged \(its provenance has no resumptions"),
        (break_csv, "shorter than its transcript says"),
        (break_transcript, r"transcript\.jsonl is damaged"),
        (other_answer, r"tokenizer or chat format changed"),
    ]
    for damage, message in cases:
        path = tmp_path / f"{damage.__name__}.csv"
        record(loaded, CHAT, path)
        damage(path)
        with pytest.raises(RecordingError, match=message):
            record(loaded, CHAT, path, resume=True)


def test_full_context_ends_the_recording_with_its_rows(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", 24)
    loaded = LoadedModel(loaded.model, loaded.tokenizer, replace(loaded.report, weights="checkpoint"))

    with pytest.raises(RecordingError, match=r"not recorded: .*limit.*\. The rows up to turn \d are in .*shorter conv"):
        record(loaded, Conversation("long", "zh", QUESTIONS[:1] * 3, sha256="2"), tmp_path / "full.csv")

    assert read_curve(tmp_path / "full.csv").table["context_tokens"].max() <= 24


def test_typed_chat_that_fills_the_context_can_be_cleared_and_goes_on(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", 24)
    with Recorder(ChatSession(loaded), tmp_path / "typed.csv") as recorder:
        list(recorder.say("你好", max_new_tokens=5))
        with pytest.raises(ContextFullError):
            list(recorder.say("Please tell me a very long story about an elephant.", max_new_tokens=5))
        recorder.clear()
        list(recorder.say("谢谢", max_new_tokens=5))

    assert read_curve(tmp_path / "typed.csv").table["turn"].tolist() == [0, 1, 1, 2]


def test_unwritable_place_is_named(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")

    with pytest.raises(RecordingError, match=r"chat\.csv cannot be written \(.*\)\. Name a file in another folder"):
        record(loaded, CHAT, tmp_path / "file" / "chat.csv")


# ------------------------------------------------------------------------------------------------ typed chats


def test_answer_cut_off_by_the_user_is_recorded_and_the_chat_is_resumed_behind_it(
    loaded: LoadedModel, tmp_path: Path
) -> None:
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


def test_fixed_conversation_says_a_cut_off_turn_again(loaded: LoadedModel, tmp_path: Path) -> None:
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
    assert table["context_tokens"].tolist()[2] == 0
    assert table["kv_mib"].tolist()[2] == 0

    session = ChatSession(loaded)
    with Recorder(session, path, resume=True):
        assert [turn.user_text for turn in session.turns] == ["谢谢"]
        assert session.context_tokens == table["context_tokens"].iloc[-1]


# ------------------------------------------------------------------------------------------------ conversations


def test_bundled_conversations_hold_what_they_promise() -> None:
    long, short = load_conversation("long"), load_conversation("short")

    spoken = [question.user for question in long.turns]
    chinese = [text for text in spoken if not text.isascii()]
    assert len(long.turns) >= 8
    assert min(len(chinese), len(spoken) - len(chinese)) >= 4
    assert sum(question.max_new_tokens for question in long.turns) + 500 < 8192  # every model of the suite takes it
    assert 1 < len(short.turns) < 8


GOOD = {"name": "n", "language": "en", "turns": [{"user": "Hello", "max_new_tokens": 5}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"name": ', "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON in UTF-8"),
        ("[]", "has no list of turns"),
        (json.dumps({**GOOD, "turns": []}), "has no list of turns"),
        (json.dumps({"language": "en", "turns": GOOD["turns"]}), "has no name"),
        (json.dumps({"name": "n", "turns": GOOD["turns"]}), "has no language"),
        (json.dumps({**GOOD, "turns": [*GOOD["turns"], {"max_new_tokens": 5}]}), "turn 2 says nothing"),
        (json.dumps({**GOOD, "turns": ["Hello"]}), "turn 1 says nothing"),
        (json.dumps({**GOOD, "turns": [{"user": " ", "max_new_tokens": 5}]}), "turn 1 says nothing"),
        (json.dumps({**GOOD, "turns": [{"user": "Hello"}]}), "turn 1 has max_new_tokens None"),
        (json.dumps({**GOOD, "turns": [{"user": "Hello", "max_new_tokens": 0}]}), "turn 1 has max_new_tokens 0"),
        (json.dumps({**GOOD, "turns": [{"user": "Hello", "max_new_tokens": "9"}]}), "turn 1 has max_new_tokens '9'"),
    ],
)
def test_bad_conversation_files_are_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "chat.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(ConversationError, match=message):
        load_conversation(file)


def test_missing_conversation_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConversationError, match=r"nowhere\.json is not there. Give a conversation file, or one of long, "
    ):
        load_conversation(tmp_path / "nowhere.json")
