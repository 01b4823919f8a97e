"""A GPU's memory snapshot without what names a machine or its user, small enough to be kept beside the code.

``torch.cuda.memory._dump_snapshot`` keeps the call stack of every event, with the paths of every file on it: megabytes,
most of them about the machine. :func:`strip` keeps what a replay and a comparison read, and nothing else:

    segments, allocator settings   as they are, known fields only
    events                         action, address, size, stream, pool, and of the stack the operations on it
    provenance                     what the recorder says of GPU, driver, versions and command

The file is JSON in gzip (``.json.gz``), events by column. :func:`~glmlab.snapshots.reader.read_snapshot` reads it like
a snapshot of PyTorch.
"""

import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glmlab.core.files import write_atomically
from glmlab.core.units import format_bytes
from glmlab.snapshots.reader import EVENT_NUMBERS, POOL_FIELDS, STRIPPED_FORMAT, SnapshotError

MOST_FILE_BYTES = 2_000_000
"""A larger stripped snapshot is refused, because it is kept with the code."""

_SEGMENT_FIELDS = ("device", "address", "total_size", "stream", "segment_type", "segment_pool_id", "is_expandable")
_BLOCK_FIELDS = ("size", "requested_size", "state")
_SETTINGS = (
    "PYTORCH_CUDA_ALLOC_CONF", "max_split_size", "garbage_collection_threshold", "expandable_segments",
    "roundup_power2_divisions",
)  # fmt: skip
_OPERATION = re.compile(r"\bat::_ops::(\w+)::(?:call|redispatch)\b")
_WORKSPACE = re.compile(r"\bat::cuda::\w*(?:Workspace|CUDABlas(?:Lt)?Handle)\w*")
_PLAIN_NAME = re.compile(r"[A-Za-z_]\w{0,80}")
_PLAIN_TEXT = re.compile(r"[\w.,|:\[\] -]{0,200}")


def strip(raw: Mapping[Any, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document of a stripped snapshot.

    Args:
        raw: what ``torch.cuda.memory._snapshot()`` returns.
        provenance: what to say of it; plain types.

    Raises:
        SnapshotError: ``raw`` is not a snapshot with history.
    """
    try:
        settings = raw.get("allocator_settings")
        return {
            "format": STRIPPED_FORMAT,
            "provenance": dict(provenance),
            "allocator_settings": None if settings is None else _pick(settings, _SETTINGS),
            "segments": [
                {**_pick(segment, _SEGMENT_FIELDS), "blocks": [_pick(b, _BLOCK_FIELDS) for b in segment["blocks"]]}
                for segment in raw["segments"]
            ],
            "device_traces": [_columns(list(trace)) for trace in raw.get("device_traces", [])],
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SnapshotError(f"this is not a snapshot of torch.cuda.memory with history ({error!r}).") from error


def save_stripped(document: Mapping[str, Any], path: Path) -> Path:
    """Write a stripped snapshot; the file appears whole or not at all.

    Raises:
        SnapshotError: it is larger than :data:`MOST_FILE_BYTES`.
    """
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    content = gzip.compress(text.encode(), mtime=0)  # equal documents give equal bytes
    if len(content) > MOST_FILE_BYTES:
        raise SnapshotError(
            f"{path.name}: the stripped snapshot has {format_bytes(len(content))}, more than "
            f"{format_bytes(MOST_FILE_BYTES)}. Record fewer steps."
        )
    write_atomically(path, content)
    return path


def operation_of(frames: Iterable[Mapping[str, Any]]) -> str:
    """Name the operation of a call stack, innermost frame first: the ATen operations from the outer to the inner one.

    A stack without C++ frames gives the innermost function's name. Nothing of a frame but such a name is kept.

    Example:
        >>> operation_of([
        ...     {"name": "at::detail::empty_cuda(c10::ArrayRef<long>)"},
        ...     {"name": "at::_ops::empty_memory_format::call(c10::ArrayRef<c10::SymInt>)"},
        ...     {"name": "at::_ops::mm::redispatch(c10::DispatchKeySet, at::Tensor const&)"},
        ...     {"name": "at::_ops::mm::call(at::Tensor const&, at::Tensor const&)"},
        ...     {"name": "forward", "filename": "/somewhere/linear.py"},
        ... ])
        'mm > empty_memory_format'
        >>> operation_of([{"name": "forward", "filename": "/somewhere/linear.py"}])
        'forward'
    """
    chain: list[str] = []
    fallback = ""
    for frame in frames:
        name = str(frame.get("name", ""))
        if not chain and _WORKSPACE.search(name):
            return "cuBLAS workspace"
        if (found := _OPERATION.search(name)) and (not chain or chain[-1] != found[1]):
            chain.append(found[1])
        if not fallback and _PLAIN_NAME.fullmatch(name):
            fallback = name
    return " > ".join(reversed(chain)) or fallback


def _pick(entry: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: _plain(entry[name]) for name in names if name in entry}


def _plain(value: Any) -> Any:
    """Numbers, plain words, and lists or dicts of them; nothing else is kept of a snapshot."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str) and _PLAIN_TEXT.fullmatch(value):
        return value
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(part) for key, part in value.items()}
    raise ValueError(f"{str(value)[:60]!r} is neither a number nor a plain word")


def _columns(events: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Events as columns; ``actions``, ``pools`` and ``labels`` are the values that ``action``, … point to.

    Requested frees are left out where completed ones are there: a replay reads those alone.
    """
    if any(event["action"] == "free_completed" for event in events):
        events = [event for event in events if event["action"] != "free_requested"]
    values: dict[str, dict[Any, int]] = {"action": {}, "pool": {}, "label": {}}
    columns: dict[str, list[Any]] = {name: [] for name in (*values, *EVENT_NUMBERS)}
    known: dict[int, str] = {}  # PyTorch hands out one list for all events of a stack
    for event in events:
        frames = event.get("frames") or ()
        if id(frames) not in known:
            known[id(frames)] = operation_of(frames)
        note = str(event.get("user_metadata") or "")
        label = (known[id(frames)], note if _PLAIN_TEXT.fullmatch(note) else "")
        pool = next((tuple(event[name]) for name in POOL_FIELDS if name in event), None)
        for name, value in (("action", _plain(event["action"])), ("pool", pool), ("label", label)):
            columns[name].append(values[name].setdefault(value, len(values[name])))
        for name in EVENT_NUMBERS:
            columns[name].append(int(event.get(name) or 0))
    return {**columns, **{f"{name}s": list(known_values) for name, known_values in values.items()}}
