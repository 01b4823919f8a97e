"""The files of a recording: opened so that no two runs write one, written so that a killed run leaves whole lines."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from glmlab.core.curve import SIDE_FILES
from glmlab.core.errors import GlmlabError
from glmlab.core.files import file_lock


class RecordingError(GlmlabError):
    """A recording cannot be started, continued or finished; says which file or setting is in the way."""


@contextmanager
def open_locked(path: Path, *, resume: bool) -> Iterator[BinaryIO]:
    """Open the CSV unbuffered, created anew or (``resume``) as it is, and hold it alone until it is closed.

    Raises:
        RecordingError: it is there already, or with ``resume`` is not; it cannot be written; another run writes it.
    """
    if not resume and any(path.with_suffix(suffix).exists() for suffix in (".csv", *SIDE_FILES)):
        raise RecordingError(
            f"{path} (or a file beside it) is there already, and a recording never overwrites one. Name another file, "
            "or continue this recording with --resume (resume=True)."
        )
    if resume and not path.exists():
        raise RecordingError(
            f"{path} is not there, so there is nothing to resume. Start it without --resume (resume=True)."
        )
    with ExitStack() as files:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.enter_context(file_lock(path))
            file = files.enter_context(path.open("r+b" if resume else "xb", buffering=0))
        except BlockingIOError as error:
            raise RecordingError(
                f"{path} is being written by another run. Wait until it ends, or record into another file."
            ) from error
        except OSError as error:
            raise RecordingError(
                f"{path} cannot be written ({error.strerror}). Name a file in another folder."
            ) from error
        yield file


def open_transcript(path: Path) -> BinaryIO:
    """Open the transcript unbuffered, so that a line reaches the system in one piece; what is there stays.

    Raises:
        RecordingError: it cannot be written.
    """
    try:
        return path.open("a+b", buffering=0)
    except OSError as error:
        raise RecordingError(f"{path} cannot be written ({error.strerror}). Record into another file.") from error


def is_checkpoint(line: Any, vocabulary: int) -> bool:
    """Whether a line of the transcript has what :class:`~glmlab.memory.recording.Recorder` reads, each of its type."""
    if not isinstance(line, dict) or not isinstance(line.get("elapsed_s"), int | float):
        return False
    counts = [line.get(name) for name in ("turn", "step", "context_tokens", "csv_bytes")]
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        return False
    if "user" not in line:
        return True
    ids = line.get("ids")
    return (
        isinstance(line["user"], str)
        and isinstance(ids, list)
        and all(isinstance(token_id, int) and 0 <= token_id < vocabulary for token_id in ids)
    )


def write_durably(file: BinaryIO, text: str) -> None:
    """Write text and wait until the disk has it."""
    file.write(text.encode("utf-8"))
    os.fsync(file.fileno())
