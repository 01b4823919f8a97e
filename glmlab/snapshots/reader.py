"""Memory snapshots of real GPUs (``torch.cuda.memory._dump_snapshot``, whole or stripped), read without running code.

A snapshot recorded with history holds the segments at its end and a list of events before it: allocations with the
address that PyTorch chose, frees, and every segment taken from or given back to the driver.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmlab.allocator.config import DEFAULT_POOL, SMALL_SEGMENT_BYTES, AllocatorError, AllocatorSettings
from glmlab.core.units import MIB
from glmlab.snapshots.stripping import is_stripped, unpacked
from glmlab.snapshots.unpickle import RECORD_HINT, SnapshotError, load_plain


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
    """One entry of the history; ``pool_id`` is None where the entry has none.

    ``operation`` and ``note`` are in stripped snapshots only: who asked (see
    :func:`~glmlab.snapshots.stripping.operation_of`), and the text that the program had set with
    ``torch.cuda.memory._set_memory_metadata``.
    """

    action: str
    address: int
    size: int
    stream: int
    pool_id: tuple[int, int] | None
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
    """A snapshot with history: every GPU that has one, and the allocator's settings (None: the snapshot has none)."""

    devices: tuple[DeviceHistory, ...]
    settings: AllocatorSettings | None
    has_garbage_collection: bool
    provenance: Mapping[str, Any] = field(default_factory=dict)  # of a stripped snapshot


def read_snapshot(path: str | Path) -> Snapshot:
    """Read a snapshot; no class in it is ever created and no code of it is run.

    Raises:
        SnapshotError: a missing, truncated or foreign file, a pickle that names a class, a snapshot without history.
    """
    raw = load_plain(Path(path))
    try:
        if isinstance(raw, list):
            raise SnapshotError(f"it holds segments without history (torch.cuda.memory_snapshot()); {RECORD_HINT}")
        if not isinstance(raw, dict) or "segments" not in raw:
            raise SnapshotError(f"it has no 'segments'; {RECORD_HINT}")
        return _parse(unpacked(raw) if is_stripped(raw) else raw)
    except SnapshotError as error:
        raise SnapshotError(f"{path} is not a snapshot of torch.cuda.memory that can be replayed: {error}.") from None


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
        if value is not None and not isinstance(value, dict):
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
        raise SnapshotError(f"{where} has no 'action'")
    address, size, stream = (_int(entry, key, where, 0) for key in ("addr", "size", "stream"))
    if size < entry["action"].startswith("segment_"):
        raise SnapshotError(f"{where} has a size of {size} B")
    operation, note = str(entry.get("operation", "")), str(entry.get("note", ""))
    return Event(entry["action"], address, size, stream, _pool_id(entry, where), operation, note)


def _pool_id(entry: Mapping[Any, Any], where: str) -> tuple[int, int] | None:
    pool_id = next((entry[key] for key in ("segment_pool_id", "pool_id", "mempool_id") if key in entry), None)
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
