"""Safetensors files of a checkpoint as the unit of downloading and loading: cut into shards, read one by one."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from glmlab.models.checkpoint_files import CheckpointError, check_checkpoint
from glmlab.models.hub import RECORD


@dataclass(frozen=True)
class ShardRead:
    """One shard that was read onto a device."""

    name: str
    tensors: int
    n_bytes: int
    seconds: float


def reshard(source: Path, target: Path, shard_bytes: int) -> list[Path]:
    """Copy a checkpoint, its tensors cut into shards with an index, as hubs publish large models.

    Args:
        source: a checkpoint folder.
        target: a folder that is made.
        shard_bytes: bytes of tensors that a shard holds at most; a larger tensor has a shard of its own.

    Returns:
        The shards, in order.

    Raises:
        CheckpointError: the source is no whole checkpoint, or the target is there already.

    Example:
        >>> from tempfile import mkdtemp
        >>> from glmlab.models.checkpoints import find_checkpoint
        >>> shards = reshard(find_checkpoint("embedded"), Path(mkdtemp()) / "sharded", shard_bytes=2 * 2**20)
        >>> [shard.name for shard in shards][0]
        'model-00001-of-00003.safetensors'
    """
    files = check_checkpoint(source)
    if target.exists():
        raise CheckpointError(f"{target} is there already. Choose a new folder for the shards.")
    groups: list[dict[str, torch.Tensor]] = []
    room_bytes = 0
    for file in files:
        for name, tensor in load_file(file).items():
            if not groups or tensor.nbytes > room_bytes:
                groups.append({})
                room_bytes = shard_bytes
            groups[-1][name] = tensor
            room_bytes -= tensor.nbytes
    index = "model.safetensors.index.json"
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path not in files and path.name not in (index, RECORD):
            shutil.copy(path, target)
    shards = [target / f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    for shard, group in zip(shards, groups, strict=True):
        save_file(group, shard, metadata={"format": "pt"})
    weight_map = {name: shard.name for shard, group in zip(shards, groups, strict=True) for name in group}
    total_bytes = sum(tensor.nbytes for group in groups for tensor in group.values())
    document = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (target / index).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    check_checkpoint(target)
    return shards


def read_shards(folder: Path, device: str = "cpu") -> list[ShardRead]:
    """Read every shard of a checkpoint onto a device, one after the other, and time each.

    Raises:
        CheckpointError: the folder is no whole checkpoint.

    Example:
        >>> from glmlab.models.checkpoints import find_checkpoint
        >>> [(shard.name, shard.tensors) for shard in read_shards(find_checkpoint("embedded"))]
        [('model.safetensors', 31)]
    """
    reads = []
    for file in check_checkpoint(folder):
        started = time.perf_counter()
        # copied, because load_file only maps the file, and pages are read when they are touched
        tensors = [tensor.to(device, copy=True) for tensor in load_file(file).values()]
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        reads.append(ShardRead(file.name, len(tensors), sum(t.nbytes for t in tensors), time.perf_counter() - started))
    return reads
