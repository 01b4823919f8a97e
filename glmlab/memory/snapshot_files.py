"""Memory snapshots of real GPUs (``torch.cuda.memory._dump_snapshot``), read without running code.

A snapshot recorded with history holds the segments at its end and a list of events before it: allocations with the
address that PyTorch chose, frees, and every segment taken from or given back to the driver.
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from glmlab.errors import GlmlabError
from glmlab.memory.settings import DEFAULT_POOL, SMALL_SEGMENT_BYTES, AllocatorError, AllocatorSettings
from glmlab.units import MIB

RECORD_HINT = (
    "record one with torch.cuda.memory._record_memory_history(), run the program, then "
    "torch.cuda.memory._dump_snapshot('snapshot.pickle')"
)


class SnapshotError(GlmlabError):
    """A file that is no memory snapshot, or none that can be replayed: says what is missing and how to record it."""


@dataclass(frozen=True)
class LiveBlock:
    """A tensor's block in the final segments; sizes in bytes."""

    address: int
    size: int
    requested: int


@dataclass(frozen=True)
class SegmentRecord:
    """One segment of the snapshot's end, or one mapped range of an expandable segment; sizes in bytes."""

    address: int
    size: int
    stream: int
    is_small: bool
    pool_id: tuple[int, int]
    is_expandable: bool
    live: tuple[LiveBlock, ...]


@dataclass(frozen=True)
class Event:
    """One entry of the history; ``pool_id`` is None where the entry does not tell it."""

    action: str
    address: int
    size: int
    stream: int
    pool_id: tuple[int, int] | None


@dataclass(frozen=True)
class DeviceHistory:
    """Segments and events of one GPU."""

    device: int
    segments: tuple[SegmentRecord, ...]
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Snapshot:
    """A snapshot with history: every GPU that has one, and the allocator's settings (None: the snapshot tells none)."""

    devices: tuple[DeviceHistory, ...]
    settings: AllocatorSettings | None
    has_garbage_collection: bool


def read_snapshot(path: str | Path) -> Snapshot:
    """Read a snapshot; no class in it is ever created and no code of it is run.

    Raises :class:`SnapshotError` for a missing, truncated or foreign file, a pickle that names a class, and a snapshot
    without history.
    """
    path = Path(path)
    raw = _load(path)
    if isinstance(raw, list):
        raise SnapshotError(f"{path} holds segments without history (torch.cuda.memory_snapshot()); {RECORD_HINT}.")
    if not isinstance(raw, dict) or "segments" not in raw:
        raise SnapshotError(f"{path} is not a snapshot of torch.cuda.memory: it has no 'segments'; {RECORD_HINT}.")
    try:
        return _parse(raw)
    except _WrongShapeError as error:
        raise SnapshotError(f"{path} is not a snapshot of torch.cuda.memory that can be read: {error}.") from None
    except SnapshotError as error:
        raise SnapshotError(f"{path}: {error}") from None


class _RefusingUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists, tuples and dicts; refuses everything that names code."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise SnapshotError(
            f"the pickle wants to load {module_name}.{global_name}, which a memory snapshot never does: it could run "
            "code and was not read further. Get the file from a source you trust"
        )

    def persistent_load(self, pid: Any) -> NoReturn:
        raise SnapshotError(f"the pickle refers to an object outside itself ({pid!r}), which a snapshot never does")


def _load(path: Path) -> Any:
    try:
        if not path.is_file():
            raise SnapshotError(f"{path} is not there, or not a file; {RECORD_HINT}")
        with path.open("rb") as file:
            return _RefusingUnpickler(file).load()
    except SnapshotError as error:
        raise SnapshotError(f"{path}: {error}.") from None
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error.strerror}.") from None
    except EOFError:
        raise SnapshotError(f"{path} is truncated: the pickle ends too early. Copy or record it again.") from None
    except Exception as error:  # the unpickler raises almost anything for bytes that are no pickle
        mend = "It may be truncated: copy or record it again" if "truncated" in str(error) else RECORD_HINT
        raise SnapshotError(f"{path} is not a pickle that can be read ({error}): {mend}.") from None


class _WrongShapeError(Exception):
    """Something in the snapshot has not the type it must have."""


def _parse(raw: dict[Any, Any]) -> Snapshot:
    segments: dict[int, list[SegmentRecord]] = {}
    for i, entry in enumerate(_list(raw["segments"], "'segments'")):
        where = f"segment {i}"
        segments.setdefault(_int(entry, "device", where, 0), []).append(_segment(entry, where))
    devices = []
    for device, trace in enumerate(_list(raw.get("device_traces", []), "'device_traces'")):
        events = tuple(
            _event(entry, f"event {i} of device {device}")
            for i, entry in enumerate(_list(trace, f"device_traces[{device}]"))
        )
        if events:
            devices.append(DeviceHistory(device, tuple(segments.get(device, [])), events))
    if not any(event.action == "alloc" for device in devices for event in device.events):
        raise SnapshotError(
            f"the snapshot has no history of allocations, so there is nothing to replay; {RECORD_HINT}."
        )
    settings = raw.get("allocator_settings")
    if settings is not None and not isinstance(settings, dict):
        raise _WrongShapeError("'allocator_settings' is not a dict")
    collects = bool((settings or {}).get("garbage_collection_threshold", 0))
    return Snapshot(tuple(devices), None if settings is None else _settings(settings), collects)


def _segment(entry: Any, where: str) -> SegmentRecord:
    address, size = _int(entry, "address", where), _int(entry, "total_size", where)
    kind = entry.get("segment_type", "small" if size == SMALL_SEGMENT_BYTES else "large")
    live, at = [], address
    for i, block in enumerate(_list(entry.get("blocks"), f"{where}, 'blocks'")):
        block_where = f"{where}, block {i}"
        block_size = _int(block, "size", block_where)
        if block.get("state") not in ("inactive", None):
            live.append(LiveBlock(at, block_size, _int(block, "requested_size", block_where, block_size)))
        at += block_size
    if at != address + size:
        raise _WrongShapeError(f"the blocks of {where} add up to {at - address} B, the segment has {size} B")
    return SegmentRecord(
        address,
        size,
        _int(entry, "stream", where, 0),
        kind == "small",
        _pool_id(entry, where) or DEFAULT_POOL,
        bool(entry.get("is_expandable", False)),
        tuple(live),
    )


def _event(entry: Any, where: str) -> Event:
    if not isinstance(entry, dict) or not isinstance(entry.get("action"), str):
        raise _WrongShapeError(f"{where} has no 'action'")
    if _int(entry, "size", where, 0) < 0:
        raise _WrongShapeError(f"{where} has a negative size")
    return Event(
        entry["action"],
        _int(entry, "addr", where, 0),
        _int(entry, "size", where, 0),
        _int(entry, "stream", where, 0),
        _pool_id(entry, where),
    )


def _pool_id(entry: Mapping[Any, Any], where: str) -> tuple[int, int] | None:
    pool_id = next((entry[key] for key in ("segment_pool_id", "pool_id", "mempool_id") if key in entry), None)
    if pool_id is None:
        return None
    if isinstance(pool_id, Sequence) and len(pool_id) == 2 and all(isinstance(part, int) for part in pool_id):
        return int(pool_id[0]), int(pool_id[1])
    raise _WrongShapeError(f"{where} has the pool id {pool_id!r}, not a pair of numbers")


def _settings(raw: Mapping[Any, Any]) -> AllocatorSettings:
    """Read ``allocator_settings``; what has no field of its own is read from the configuration string."""
    parts = str(raw.get("PYTORCH_CUDA_ALLOC_CONF", "")).replace(" ", "").split(",")
    conf = dict(part.split(":", 1) for part in parts if ":" in part)
    max_split = raw.get("max_split_size", -1)
    divisions = raw.get("roundup_power2_divisions", {})
    try:
        return AllocatorSettings(
            max_split_size_mb=max_split // MIB if isinstance(max_split, int) and 0 < max_split < 1 << 62 else None,
            roundup_power2_divisions={int(k): int(v) for k, v in divisions.items()}
            if isinstance(divisions, dict)
            else 0,
            expandable_segments=bool(raw.get("expandable_segments", False)),
            max_non_split_rounding_mb=int(conf.get("max_non_split_rounding_mb", 20)),
            large_segment_size_mb=int(conf.get("large_segment_size_mb", 20)),
        )
    except (ValueError, TypeError, AllocatorError) as error:
        raise _WrongShapeError(f"'allocator_settings' cannot be understood ({error})") from None


def _list(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise _WrongShapeError(f"{name} is not a list")
    return value


def _int(entry: Any, key: str, where: str, default: int | None = None) -> int:
    value = entry.get(key, default) if isinstance(entry, dict) else None
    if not isinstance(value, int):
        raise _WrongShapeError(f"{where} has no number {key!r}")
    return value
