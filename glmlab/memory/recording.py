"""A chat, and the memory after every turn or every token: a recording.

A recording is a measured Curve (``core/curve.py`` explains its columns) that grows during the chat, in three files of
one stem:

    NAME.csv                 one row a turn (or a token), flushed and fsynced at once
    NAME.json                kind, label and provenance; written first, so that a killed run has it too
    NAME.transcript.jsonl    one line a finished turn: what was said, the answer's ids, the length of the CSV by then

A killed run resumes after its last finished turn: the CSV is cut back to the length in the transcript (the rows of an
unfinished turn would come twice), the earlier turns are prefilled in one pass, and the chat goes on. The memory after
one long prefill is not that of an uninterrupted chat: cached keys and values are the same bytes, but the allocator took
another way, and peaks differ. The provenance lists every resumption.

A run locks its CSV, so two runs never write one file.
"""

import csv
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from tqdm.auto import tqdm
from transformers import GenerationConfig

from glmlab.core.curve import SIDE_FILES, Curve, csv_file, curve_json, read_curve, read_curve_json
from glmlab.core.errors import GlmlabError
from glmlab.core.files import file_lock, write_atomically
from glmlab.core.units import mib
from glmlab.generation.chat import ChatSession, ContextFullError, Turn
from glmlab.memory.conversations import Conversation
from glmlab.memory.probes import READING_COLUMNS, MemoryProbe, ProbeError, Reading
from glmlab.memory.provenance import chat_provenance
from glmlab.models.loading import LoadedModel

COLUMNS = (
    "step", "turn", "context_tokens", "context_characters", "prompt_tokens", "generated_tokens",
    *READING_COLUMNS,
    "kv_mib", "first_token_s", "token_s", "elapsed_s",
)  # fmt: skip
"""Columns of a recording, in order."""

_SAME_ON_RESUME = (
    "model", "load_path", "precision", "dtype", "attention", "parameters", "gpus", "sampling", "rows", "cache",
    "static_tokens",
)  # fmt: skip
_PREFILLED = (
    "the turns before were prefilled in one pass: keys and values are the same bytes, but reserved and used memory "
    "from here on need not be those of an uninterrupted run"
)


class RecordingError(GlmlabError):
    """A recording cannot be started, resumed or finished; the message says which file or setting is in the way."""


def record(
    loaded: LoadedModel,
    conversation: Conversation,
    path: str | os.PathLike[str],
    *,
    every_token: bool = False,
    resume: bool = False,
    probe: MemoryProbe | None = None,
    notes: Mapping[str, Any] | None = None,
    static_tokens: int | None = None,
) -> Curve:
    """Chat through a conversation and record the memory after loading and after every turn.

    Decoding is greedy. With random weights, whose answers have no end, every answer has exactly the turn's
    ``max_new_tokens``; the provenance says so.

    Args:
        loaded: from ``load_model``.
        conversation: what the user says.
        path: the CSV file; it must not exist yet.
        every_token: a row for every token instead of every turn.
        resume: continue a recording that was killed or stopped, after its last finished turn.
        probe: where to read the memory; by default every device that the model lies on.
        notes: added to the provenance; plain types.
        static_tokens: keep keys and values in a StaticCache of this length (:class:`ChatSession`).

    Returns:
        The recording, as :func:`~glmlab.core.curve.read_curve` reads it.

    Raises:
        RecordingError: the file exists (or, with ``resume``, does not), another run writes it, it was recorded with
            another model or conversation, the context is full, or the driver went away.
    """
    session = ChatSession(loaded, generation_config=GenerationConfig(do_sample=False), static_tokens=static_tokens)
    recorder = Recorder(
        session, path, conversation=conversation, every_token=every_token, resume=resume, probe=probe, notes=notes
    )
    with recorder as run:
        done = run.turns
        with tqdm(total=len(conversation.turns), initial=done, unit="turn", desc=f"recording {run.path.stem}") as bar:
            for question in conversation.turns[done:]:
                for turn in run.say(question.user, max_new_tokens=question.max_new_tokens):
                    bar.set_postfix_str(f"context {turn.context_tokens} tokens", refresh=False)
                    bar.update(0)
                bar.update(1)
    return read_curve(run.path)


class Recorder:
    """Records a chat session without turns: use :meth:`say` instead of the session's, inside a ``with`` block.

    Arguments and errors are those of :func:`record`. Without a conversation the chat is a typed one; a resumed session
    takes up the turns that are in the recording.
    """

    def __init__(
        self,
        session: ChatSession,
        path: str | os.PathLike[str],
        *,
        conversation: Conversation | None = None,
        every_token: bool = False,
        resume: bool = False,
        probe: MemoryProbe | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = csv_file(path)
        self.turns = 0  # finished ones in the recording
        self._json_path = self.path.with_suffix(".json")
        self._transcript_path = self.path.with_suffix(".transcript.jsonl")
        self._session, self._conversation, self._every_token = session, conversation, every_token
        self._probe = probe or MemoryProbe.for_model(session.loaded.model)
        self._step = 0
        self._provenance = {**chat_provenance(session, self._probe, conversation, every_token), **(notes or {})}
        with ExitStack() as files:
            self._csv, self._transcript = files.enter_context(_opened(self.path, self._transcript_path, resume=resume))
            self._began = time.perf_counter()
            checkpoints = self._read_transcript() if resume else []
            if checkpoints:
                self._resume(checkpoints)
            else:
                self._start()
            self._files = files.pop_all()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._provenance["status"] = "finished" if kind is None else f"stopped ({kind.__name__})"
        self._write_json()
        self._files.close()

    def say(self, text: str, *, max_new_tokens: int | None = None) -> Iterator[Turn]:
        """Stream the answer as :meth:`ChatSession.say` does, and record it.

        With random weights the answer has exactly ``max_new_tokens``, if given.

        Raises:
            RecordingError: the driver went away, or a fixed conversation does not fit into the context; the rows so far
                are on disk.
            ContextFullError: a typed chat has filled the context.
        """
        stops = max_new_tokens is None or self._session.loaded.report.weights != "random"
        turns_before = len(self._session.turns)
        away_s = 0.0  # time between two tokens that is not the model's
        try:
            stream = self._session.say(text, max_new_tokens=max_new_tokens, stops=stops)
            with closing(stream):  # type: ignore[type-var]
                for turn in stream:
                    started = time.perf_counter()
                    if turn.stop_reason is not None:
                        self._finish_turn(turn, away_s)
                    elif self._every_token:
                        self._write_turn(turn, self._probe.read(fast=True), away_s)
                    yield turn
                    away_s += time.perf_counter() - started
        except (ProbeError, ContextFullError) as error:
            is_full = isinstance(error, ContextFullError)
            if is_full and self._conversation is None:
                raise  # a typed chat can be cleared and goes on
            kept = f"The rows up to turn {self.turns} are in {self.path}"
            advice = ". Record a shorter conversation with this model" if is_full else "; --resume continues from there"
            raise RecordingError(f"turn {self.turns + 1} was not recorded: {error} {kept}{advice}.") from error
        except (GeneratorExit, KeyboardInterrupt):
            # a typed chat goes on after an interrupted answer; a fixed one says the turn again when resumed
            interrupted = self._session.turns[turns_before:]
            if interrupted and interrupted[0].stop_reason == "interrupted" and self._conversation is None:
                self._finish_turn(interrupted[0], away_s)
            raise

    def clear(self) -> None:
        """Clear the session, and record the memory after it."""
        self._session.clear()
        self._write_rows(self._probe.read(), context_tokens=0, context_characters=0)
        self._write_checkpoint({"clear": True})

    # ------------------------------------------------------------------------------------- start and resume

    def _start(self) -> None:
        self._csv.truncate(0)
        self._write_json()
        self._append(COLUMNS)
        self._write_rows(self._probe.read(), context_tokens=0, context_characters=0)
        self._write_checkpoint({})

    def _resume(self, checkpoints: list[dict[str, Any]]) -> None:
        """Cut the files back to the last finished turn and let the session prefill what was said."""
        last = checkpoints[-1]
        before = read_curve_json(self._json_path)["provenance"]
        if not isinstance(before.get("resumptions"), list) or not isinstance(before.get("versions"), dict):
            raise self._damaged(self._json_path, "its provenance has no resumptions or versions")
        self._refuse_other_settings(before)
        if self._csv.seek(0, os.SEEK_END) < last["csv_bytes"]:
            raise RecordingError(
                f"{self.path} is shorter than its transcript says, so rows were lost. Record into another file."
            )
        self._csv.truncate(last["csv_bytes"])
        self._csv.seek(0, os.SEEK_END)

        cleared = max((i for i, checkpoint in enumerate(checkpoints) if "clear" in checkpoint), default=-1)
        said = [(turn["user"], turn["ids"]) for turn in checkpoints[cleared + 1 :] if "user" in turn]
        self._session.restore(said)
        if said and self._session.context_tokens != last["context_tokens"]:
            raise RecordingError(
                f"the turns in {self._transcript_path.name} give {self._session.context_tokens} tokens of context now, "
                f"but gave {last['context_tokens']} when recorded: tokenizer or chat format changed. Record into "
                "another file."
            )
        self._probe.read(fast=True)  # so that the next row's peaks are not those of this prefill
        self.turns, self._step = last["turn"], last["step"]
        self._began = time.perf_counter() - last["elapsed_s"]
        resumption = {
            "date": self._provenance["date"],
            "after_turn": self.turns,
            "context_tokens": self._session.context_tokens,
            "note": _PREFILLED,
        }
        if (versions := self._provenance["versions"]) != before["versions"]:
            resumption["versions"] = versions
        self._provenance = {**before, "status": "running", "resumptions": [*before["resumptions"], resumption]}
        self._write_json()

    def _refuse_other_settings(self, before: dict[str, Any]) -> None:
        pairs = {name: (before.get(name), self._provenance[name]) for name in _SAME_ON_RESUME}
        followed = [p.get("conversation") for p in (before, self._provenance)]
        old, now = (one.get("sha256") if isinstance(one, dict) else one for one in followed)
        pairs["conversation (sha256)"] = (old, now)
        different = [f"{name} {old!r}, now {now!r}" for name, (old, now) in pairs.items() if old != now]
        if different:
            raise RecordingError(
                f"{self.path} was recorded with another setting: {'; '.join(different)}. Resume with the same setting, "
                "or record into another file."
            )

    def _read_transcript(self) -> list[dict[str, Any]]:
        """Read the whole lines of the transcript; a torn last one is cut off."""
        self._transcript.seek(0)
        content = self._transcript.read()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            checkpoints = [json.loads(line) for line in whole.split(b"\n")[:-1]]
        except (ValueError, RecursionError) as error:
            raise self._damaged(self._transcript_path, str(error)) from error
        vocabulary = self._session.loaded.model.config.vocab_size
        for number, checkpoint in enumerate(checkpoints, start=1):
            if not _is_checkpoint(checkpoint, vocabulary):
                raise self._damaged(self._transcript_path, f"line {number} is not one that a recording writes")
        self._transcript.truncate(len(whole))
        return checkpoints

    def _damaged(self, path: Path, why: str) -> RecordingError:
        return RecordingError(f"{path} is damaged ({why}), so the recording cannot go on. Record into another file.")

    # --------------------------------------------------------------------------------------------- writing

    def _finish_turn(self, turn: Turn, away_s: float) -> None:
        self._write_turn(turn, self._probe.read(), away_s)
        self.turns += 1
        self._step += turn.generated_tokens
        self._write_checkpoint({"user": turn.user_text, "ids": list(turn.token_ids), "text": turn.text})

    def _write_turn(self, turn: Turn, readings: list[Reading], away_s: float) -> None:
        self._write_rows(
            readings,
            step=self._step + turn.generated_tokens,
            turn=self.turns + 1,
            context_tokens=turn.context_tokens,
            context_characters=turn.context_characters,
            prompt_tokens=turn.prompt_tokens,
            generated_tokens=turn.generated_tokens,
            kv_mib=mib(turn.kv_bytes),
            first_token_s=_microseconds(turn.first_token_s),
            token_s=_microseconds(turn.token_s and turn.token_s - away_s / (turn.generated_tokens - 1)),
        )

    def _write_rows(self, readings: list[Reading], **cells: float | None) -> None:
        """Write one row for each reading; a cell that is not given is 0 for counts and empty for times."""
        counts = {"step": self._step, "turn": self.turns, "prompt_tokens": 0, "generated_tokens": 0, "kv_mib": 0.0}
        for reading in readings:
            row = {**counts, **cells, **reading.row(), "elapsed_s": self._elapsed_s()}
            self._append(row.get(column) for column in COLUMNS)

    def _elapsed_s(self) -> float:
        return round(time.perf_counter() - self._began, 6)

    def _append(self, cells: Any) -> None:
        line = StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        _write_durably(self._csv, line.getvalue())

    def _write_checkpoint(self, said: dict[str, Any]) -> None:
        checkpoint = {
            "turn": self.turns,
            "step": self._step,
            "context_tokens": self._session.context_tokens,
            "elapsed_s": self._elapsed_s(),
            "csv_bytes": self._csv.tell(),
            **said,
        }
        _write_durably(self._transcript, json.dumps(checkpoint, ensure_ascii=False) + "\n")

    def _write_json(self) -> None:
        where = ", ".join(gpu["name"] for gpu in self._provenance["gpus"]) or "CPU"
        label = f"{self._provenance['model']}, {self._provenance['precision']}, {where}"
        write_atomically(self._json_path, curve_json("measured", label, self._provenance))


@contextmanager
def _opened(path: Path, transcript: Path, *, resume: bool) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Lock the CSV and open it with its transcript, both unbuffered, so that a line reaches the system in one piece.

    Raises:
        RecordingError: the CSV exists, or with ``resume`` does not; a file cannot be written; another run writes it.
    """
    if not resume and any(path.with_suffix(suffix).exists() for suffix in (".csv", *SIDE_FILES)):
        raise RecordingError(
            f"{path} (or a file beside it) exists already, and a recording never overwrites one. Name another file, or "
            "continue this recording with --resume (resume=True)."
        )
    if resume and not path.exists():
        raise RecordingError(
            f"{path} is not there, so there is nothing to resume. Start it without --resume (resume=True)."
        )
    with ExitStack() as files:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.enter_context(file_lock(path))
            rows = files.enter_context(path.open("r+b" if resume else "xb", buffering=0))
            turns = files.enter_context(transcript.open("a+b", buffering=0))
        except BlockingIOError as error:
            raise RecordingError(
                f"{path} is being written by another run. Wait until it ends, or record into another file."
            ) from error
        except OSError as error:
            raise RecordingError(
                f"{path} cannot be written ({error.strerror}). Name a file in another folder."
            ) from error
        yield rows, turns


def _microseconds(seconds: float | None) -> float | None:
    """Seconds, rounded to what the clock is worth."""
    return None if seconds is None else round(seconds, 6)


def _write_durably(file: BinaryIO, text: str) -> None:
    """Write text and wait until the disk has it."""
    file.write(text.encode("utf-8"))
    os.fsync(file.fileno())


def _is_checkpoint(line: Any, vocabulary: int) -> bool:
    """Whether a line of the transcript has what a resumed recording reads, each field of its type."""
    if not isinstance(line, dict) or not isinstance(line.get("elapsed_s"), int | float):
        return False
    counts = [line.get(name) for name in ("turn", "step", "context_tokens", "csv_bytes")]
    user, ids = line.get("user", ""), line.get("ids", [])
    return (
        all(isinstance(count, int) and count >= 0 for count in counts)
        and ("user" in line) == ("ids" in line)
        and isinstance(user, str)
        and isinstance(ids, list)
        and all(isinstance(token_id, int) and 0 <= token_id < vocabulary for token_id in ids)
    )
