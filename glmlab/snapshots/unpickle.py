"""Bytes of a snapshot file -> numbers, strings, lists and dicts. Nothing in the file can name code or ask for memory.

Two formats hold the same: the pickle that ``torch.cuda.memory._dump_snapshot`` writes, and the stripped form of
:mod:`glmlab.snapshots.stripping` (JSON, compressed by gzip). A pickle is scanned before it is read, because CPython's
unpickler believes what an opcode says of sizes: a file of twenty bytes can make it reserve gigabytes.
"""

import gzip
import io
import json
import pickle
import pickletools
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from glmlab.core.errors import GlmlabError
from glmlab.core.units import MIB, format_bytes

RECORD_HINT = (
    "record one with torch.cuda.memory._record_memory_history(), run the program, then "
    "torch.cuda.memory._dump_snapshot('snapshot.pickle')"
)

MOST_UNPACKED_BYTES = 256 * MIB
"""Longest JSON that a stripped snapshot may unpack to; those that the suite writes have 2 to 10 MiB."""

_GZIP = b"\x1f\x8b"


class SnapshotError(GlmlabError):
    """A file that is not a memory snapshot, or cannot be replayed; says what is missing and how to record it."""


def load_plain(path: Path) -> Any:
    """Read a pickle, or JSON in gzip, as plain types.

    Raises:
        SnapshotError: the file is missing, truncated or neither; the pickle names a class, or says sizes that its own
            length contradicts; the JSON unpacks to more than :data:`MOST_UNPACKED_BYTES`.
    """
    try:
        if not path.is_file():
            raise SnapshotError(f"{path} is not there, or not a file; {RECORD_HINT}.")
        content = path.read_bytes()
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        return _from_json(content) if content.startswith(_GZIP) else _from_pickle(content)
    except SnapshotError as error:
        raise SnapshotError(f"{path}: {error}.") from None


def _from_json(content: bytes) -> Any:
    unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        text = unpacker.decompress(content, MOST_UNPACKED_BYTES)
        if unpacker.unconsumed_tail:
            raise SnapshotError(
                f"it unpacks to more than {format_bytes(MOST_UNPACKED_BYTES)}, which no stripped snapshot does"
            )
        if not unpacker.eof:
            raise SnapshotError("it is truncated: the compressed data end too early. Copy or strip it again")
        return json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise SnapshotError(f"it is gzip, but not JSON that can be read ({error}). Copy or strip it again") from None


def to_json_gz(document: Any) -> bytes:
    """Compact JSON in gzip; equal documents give equal bytes."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return gzip.compress(text.encode(), mtime=0)


class _RefusingUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists, tuples and dicts; refuses everything that names code."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise SnapshotError(
            f"the pickle wants to load {module_name}.{global_name}, which a memory snapshot never does: it could run "
            "code and was not read further. Get the file from a source you trust"
        )

    def persistent_load(self, pid: Any) -> NoReturn:
        raise SnapshotError(f"the pickle refers to an object outside itself ({pid!r}), which a snapshot never does")


def _from_pickle(content: bytes) -> Any:
    try:
        _refuse_false_sizes(content)
        return _RefusingUnpickler(io.BytesIO(content)).load()
    except SnapshotError:
        raise
    except EOFError:
        raise SnapshotError("it is truncated: the pickle ends too early. Copy or record it again") from None
    except Exception as error:  # the unpickler raises almost anything for bytes that are not a pickle
        is_cut = any(word in str(error) for word in ("truncated", "exhausted before", "remain", "not enough data"))
        hint = "It may be truncated: copy or record it again" if is_cut else RECORD_HINT
        raise SnapshotError(f"it is not a pickle that can be read ({error}): {hint}") from None


def _refuse_false_sizes(content: bytes) -> None:
    """Walk over the opcodes without running them; refuse a memo index or a frame that the file cannot have.

    A pickler numbers what it memoises one by one, so an index is never above the number of opcodes before it; the
    unpickler makes its table as long as the index says. ``genops`` itself checks the lengths of strings and bytes.
    """
    operations: Iterable[tuple[Any, Any, Any]] = pickletools.genops(content)
    for number, (opcode, argument, position) in enumerate(operations):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > number:
            raise SnapshotError(
                f"the pickle puts an object at place {argument:,} of its memo after {number:,} steps, which no pickler "
                "does: reading it would take memory for every place below. Get the file from a source you trust"
            )
        if opcode.name == "FRAME" and argument > len(content) - position:
            raise SnapshotError(
                f"it is truncated: the pickle says that {argument:,} B follow, but {len(content) - position - 9:,} B "
                "do. Copy or record it again"
            )
