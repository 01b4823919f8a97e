"""Memory snapshots of real GPUs, read without running code: nothing in a file can name code or ask for memory.

Two formats hold the same: the pickle that ``torch.cuda.memory._dump_snapshot`` writes, and the stripped form of
:mod:`glmlab.snapshots.stripping` (JSON, compressed by gzip). A pickle is scanned before it is read, because CPython's
unpickler believes what an opcode says of sizes: a file of twenty bytes can make it reserve gigabytes.

A snapshot recorded with history holds the segments at its end and a list of events before it: allocations with the
address that PyTorch chose, frees, and every segment taken from or given back to the driver.
"""

import io
import json
import pickle
import pickletools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from glmlab.allocator.config import DEFAULT_POOL, SMALL_SEGMENT_BYTES, AllocatorError, AllocatorSettings
from glmlab.core.errors import GlmlabError
from glmlab.core.units import MIB, format_bytes

RECORD_HINT = (
    "record one with torch.cuda.memory._record_memory_history(), run the program, then "
    "torch.cuda.memory._dump_snapshot('snapshot.pickle')"
)

MOST_UNPACKED_BYTES = 256 * MIB
"""Longest JSON that a stripped snapshot may unpack to; those that the suite writes have 2 to 10 MiB."""

STRIPPED_FORMAT = "glmlab stripped snapshot 1"
"""First field of a stripped snapshot, with the number of the layout."""

EVENT_NUMBERS = ("addr", "size", "stream")
"""Numbers of an event, in PyTorch's names."""

POOL_FIELDS = ("segment_pool_id", "pool_id", "mempool_id")
"""Names that versions of PyTorch give to the pool of an event or a segment."""

_GZIP = b"\x1f\x8b"


class SnapshotError(GlmlabError):
    """A file that is not a memory snapshot, or cannot be replayed; says what is missing and how to record it."""


@dataclass(frozen=True)
class SegmentRecord:
    """One segment of the snapshot's end, or one mapped range of an expandable segment; sizes in bytes."""

    address: int
    size: int
    stream: int
    is_small: bool
    pool_id: tuple[int, int]
    is_expandable: bool
    live: tuple[tuple[int, int], ...]  # (address, bytes) of the tensors' blocks


@dataclass(frozen=True)
class Event:
    """One entry of the history; ``operation`` and ``note`` are in stripped snapshots only.

    The operation asked for the memory (:func:`~glmlab.snapshots.stripping.operation_of`); the note is what the program
    had set with ``torch.cuda.memory._set_memory_metadata``.
    """

    action: str
    address: int
    size: int
    stream: int
    pool_id: tuple[int, int] | None  # None where the entry has none
    operation: str = ""
    note: str = ""


@dataclass(frozen=True)
class DeviceHistory:
    """Segments and events of one GPU."""

    device: int
    segments: tuple[SegmentRecord, ...]
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Snapshot:
    """Every GPU that has a history, and the allocator's settings; None where the snapshot has none."""

    devices: tuple[DeviceHistory, ...]
    settings: AllocatorSettings | None
    has_garbage_collection: bool
    provenance: Mapping[str, Any] = field(default_factory=dict)  # of a stripped snapshot


def read_snapshot(path: str | Path) -> Snapshot:
    """Read a snapshot; no class in it is ever created and no code of it is run.

    Raises:
        SnapshotError: a missing, truncated or foreign file, a pickle that names a class, a snapshot without history.
    """
    try:
        raw = load_plain(Path(path))
        if isinstance(raw, list):
            raise SnapshotError(f"it holds segments without history (torch.cuda.memory_snapshot()); {RECORD_HINT}")
        if not isinstance(raw, dict) or "segments" not in raw:
            raise SnapshotError(f"it has no 'segments'; {RECORD_HINT}")
        is_stripped = str(raw.get("format", "")).startswith("glmlab stripped snapshot")
        return _parse(_unpacked(raw) if is_stripped else raw)
    except SnapshotError as error:
        raise SnapshotError(f"{path} is not a memory snapshot that can be replayed: {error}.") from None


# -- bytes -> plain types ----------------------------------------------------------------------------------------------


def load_plain(path: Path) -> Any:
    """Read a pickle, or JSON in gzip, as numbers, strings, lists, tuples and dicts.

    Raises:
        SnapshotError: the file is missing, truncated or neither; the pickle names a class, or says sizes that its own
            length contradicts; the JSON unpacks to more than :data:`MOST_UNPACKED_BYTES`.
    """
    try:
        if not path.is_file():
            raise SnapshotError(f"it is not there, or not a file; {RECORD_HINT}")
        content = path.read_bytes()
    except OSError as error:
        raise SnapshotError(f"it cannot be read: {error.strerror}") from None
    return _from_json(content) if content.startswith(_GZIP) else _from_pickle(content)


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
        _refuse_false_places(content)
        return _RefusingUnpickler(io.BytesIO(content)).load()
    except SnapshotError:
        raise
    except Exception as error:  # the unpickler raises almost anything for bytes that are not a pickle
        says = ("truncated", "exhausted before", "remain", "not enough data", "Ran out of input")
        is_cut = any(words in str(error) for words in says)
        hint = "It may be truncated: copy or record it again" if is_cut else RECORD_HINT
        raise SnapshotError(f"it is not a pickle that can be read ({error}): {hint}") from None


def _refuse_false_places(content: bytes) -> None:
    """Walk over the opcodes without running them; refuse a memo index that the file cannot have.

    A pickler numbers what it memoises one by one, so an index is never above the number of opcodes before it; the
    unpickler makes its table as long as the index says. ``genops`` itself checks the lengths of strings and bytes.
    """
    operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(content)
    for number, (opcode, argument, _) in enumerate(operations):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > number:
            raise SnapshotError(
                f"the pickle puts an object at place {argument:,} of its memo after {number:,} steps, which no pickler "
                "does: reading it would take memory for every place below. Get the file from a source you trust"
            )


def _unpacked(document: Mapping[Any, Any]) -> dict[str, Any]:
    """A stripped snapshot with one dict an event, as PyTorch writes it, and ``operation`` and ``note`` in each."""
    if document["format"] != STRIPPED_FORMAT:
        raise SnapshotError(f"its layout is {document['format']!r}, and this version reads {STRIPPED_FORMAT!r}")
    try:
        return {**document, "device_traces": [list(_rows(trace)) for trace in document["device_traces"]]}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SnapshotError(f"the columns of its events do not fit together ({error!r})") from None


def _rows(trace: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    columns = [trace[name] for name in ("action", "pool", "label", *EVENT_NUMBERS)]
    for action, pool, label, *numbers in zip(*columns, strict=True):
        operation, note = trace["labels"][label]
        event = {"action": trace["actions"][action], "operation": operation, "note": note}
        event |= dict(zip(EVENT_NUMBERS, numbers, strict=True))
        if trace["pools"][pool] is not None:
            event["pool_id"] = trace["pools"][pool]
        yield event


# -- plain types -> records --------------------------------------------------------------------------------------------


def _parse(raw: dict[Any, Any]) -> Snapshot:
    segments: dict[int, list[SegmentRecord]] = {}
    for i, entry in enumerate(_list(raw["segments"], "'segments'")):
        where = f"segment {i}"
        segments.setdefault(_int(entry, "device", where, 0), []).append(_segment(entry, where))
    devices = []
    for device, trace in enumerate(_list(raw.get("device_traces", []), "'device_traces'")):
        entries = _list(trace, f"device_traces[{device}]")
        events = tuple(_event(entry, f"event {i} of device {device}") for i, entry in enumerate(entries))
        if events:
            devices.append(DeviceHistory(device, tuple(segments.get(device, [])), events))
    if not any(event.action == "alloc" for device in devices for event in device.events):
        raise SnapshotError(f"it has no history of allocations, so there is nothing to replay; {RECORD_HINT}")
    settings, provenance = raw.get("allocator_settings"), raw.get("provenance") or {}
    for name, value in (("allocator_settings", settings), ("provenance", provenance)):
        if not isinstance(value, dict | None):
            raise SnapshotError(f"{name!r} is not a dict")
    collects = bool((settings or {}).get("garbage_collection_threshold", 0))
    return Snapshot(tuple(devices), None if settings is None else _settings(settings), collects, provenance)


def _segment(entry: Any, where: str) -> SegmentRecord:
    address, size = _int(entry, "address", where), _int(entry, "total_size", where)
    kind = entry.get("segment_type", "small" if size == SMALL_SEGMENT_BYTES else "large")
    live, at = [], address
    for i, block in enumerate(_list(entry.get("blocks"), f"{where}, 'blocks'")):
        block_size = _int(block, "size", f"{where}, block {i}")
        if block.get("state") not in ("inactive", None):
            live.append((at, block_size))
        at += block_size
    if at != address + size or size <= 0:
        raise SnapshotError(f"the blocks of {where} add up to {at - address} B, the segment has {size} B")
    stream, pool_id = _int(entry, "stream", where, 0), _pool_id(entry, where) or DEFAULT_POOL
    is_expandable = bool(entry.get("is_expandable", False))
    return SegmentRecord(address, size, stream, kind == "small", pool_id, is_expandable, tuple(live))


def _event(entry: Any, where: str) -> Event:
    if not isinstance(entry, dict) or not isinstance(entry.get("action"), str):
        raise SnapshotError(f"{where} has no 'action'")
    address, size, stream = (_int(entry, key, where, 0) for key in ("addr", "size", "stream"))
    if size < entry["action"].startswith("segment_"):
        raise SnapshotError(f"{where} has a size of {size} B")
    operation, note = str(entry.get("operation", "")), str(entry.get("note", ""))
    return Event(entry["action"], address, size, stream, _pool_id(entry, where), operation, note)


def _pool_id(entry: Mapping[Any, Any], where: str) -> tuple[int, int] | None:
    pool_id = next((entry[key] for key in POOL_FIELDS if key in entry), None)
    if pool_id is None:
        return None
    if isinstance(pool_id, Sequence) and len(pool_id) == 2 and all(isinstance(part, int) for part in pool_id):
        return int(pool_id[0]), int(pool_id[1])
    raise SnapshotError(f"{where} has the pool id {pool_id!r}, not a pair of numbers")


def _settings(raw: Mapping[Any, Any]) -> AllocatorSettings:
    """Read ``allocator_settings``; what has no field of its own is read from the configuration string."""
    parts = str(raw.get("PYTORCH_CUDA_ALLOC_CONF", "")).replace(" ", "").split(",")
    conf = dict(part.split(":", 1) for part in parts if ":" in part)
    max_split = raw.get("max_split_size", -1)
    divisions = raw.get("roundup_power2_divisions")
    try:
        return AllocatorSettings(
            max_split_size_mb=max_split // MIB if isinstance(max_split, int) and 0 < max_split < 1 << 62 else None,
            roundup_power2_divisions={int(k): int(v) for k, v in (divisions or {}).items()},
            expandable_segments=bool(raw.get("expandable_segments", False)),
            max_non_split_rounding_mb=int(conf.get("max_non_split_rounding_mb", 20)),
            large_segment_size_mb=int(conf.get("large_segment_size_mb", 20)),
        )
    except (ValueError, TypeError, AttributeError, AllocatorError) as error:
        raise SnapshotError(f"'allocator_settings' cannot be understood ({error})") from None


def _list(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise SnapshotError(f"{name} is not a list")
    return value


def _int(entry: Any, key: str, where: str, default: int | None = None) -> int:
    value = entry.get(key, default) if isinstance(entry, dict) else None
    if not isinstance(value, int):
        raise SnapshotError(f"{where} has no number {key!r}")
    return value
