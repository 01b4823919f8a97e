"""Files that appear whole or not at all, and that one program at a time writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file (text in UTF-8) so that a reader finds the old one or the whole new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(content.encode() if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a file alone while the context lasts: a second holder, here or in another program, is refused at once.

    The lock is a hidden file beside ``path``; a killed program's lock counts for nothing.

    Raises:
        BlockingIOError: another holds it.
    """
    from filelock import FileLock, Timeout

    beside = path.with_name(f".{path.name}.lock")
    lock = FileLock(beside, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(f"{path} is in use by another program") from None
    try:
        yield
    finally:
        with suppress(OSError):  # before the release: whoever opened it meanwhile sees that it is gone, and asks anew
            beside.unlink()
        lock.release()
