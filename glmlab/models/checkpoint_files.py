"""The files of a checkpoint folder: config.json, safetensors and tokenizer, held against what loading needs.

Only headers are read, and nothing is executed: weights as pickle are refused.
"""

import json
import struct
from pathlib import Path
from typing import Any

from glmlab.core.errors import GlmlabError

_LFS_MARK = b"version https://git-lfs"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json", "vocab.txt")
_LONGEST_FILE_NAME = 255


class CheckpointError(GlmlabError):
    """A checkpoint cannot be used; the text names the file or the name, what is wrong, and the mend."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


def check_checkpoint(folder: Path) -> list[Path]:
    """Hold a folder against what loading needs, reading headers only; return its safetensors files.

    Raises:
        CheckpointError: config.json or tokenizer missing, a Git-LFS pointer in place of a file, pickle weights only, a
            shard of the index missing, a safetensors file truncated or with a broken header, a tensor that is not in
            the shard that the index names.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a checkpoint folder. Check the path.")
    read_config_json(config_file)
    weight_map = _weight_map(folder)
    for file in sorted({*weight_map.values()}):
        path = folder / file
        if not path.is_file():
            raise CheckpointError(
                f"{folder} is incomplete: the index names {file}, which is not there. Download that file again."
            )
        tensors = read_safetensors_header(path)
        absent = [name for name, shard in weight_map.items() if shard == file and name not in tensors]
        if absent:
            raise CheckpointError(
                f"{file} does not hold {absent[0]}, which the index says it does. "
                "Index and shard come from different downloads: fetch both again."
            )
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}). "
            "Copy the tokenizer files of the same model into it."
        )
    for file in _TOKENIZER_FILES:
        if (folder / file).is_file():
            _refuse_lfs_pointer(folder / file)
    return [folder / file for file in sorted({*weight_map.values()})]


def read_config_json(path: Path) -> dict[str, Any]:
    """Read a config.json; :class:`CheckpointError` when it is a Git-LFS pointer, not JSON, or no object."""
    _refuse_lfs_pointer(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Download it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a JSON {type(config).__name__}, not an object. Download it again.")
    return config


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Read the header of a safetensors file: tensor name -> dtype, shape, data_offsets.

    Format: 8 bytes little-endian header length, the header as JSON, then the tensors' bytes.

    Raises:
        CheckpointError: a Git-LFS pointer, a broken header, or a file shorter or longer than its header says.
    """
    _refuse_lfs_pointer(path)
    size_bytes = path.stat().st_size
    broken = CheckpointError(f"{path} is not a whole safetensors file: its header is broken. Download it again.")
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise broken
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > size_bytes - 8:
            raise broken
        try:
            header = json.loads(file.read(header_bytes))
            header.pop("__metadata__", None)
            ends = [tensor["data_offsets"][1] for tensor in header.values()]
            if not all(isinstance(end, int) for end in ends):
                raise broken
            data_bytes = max(ends, default=0)
        except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise broken from error
    if size_bytes != 8 + header_bytes + data_bytes:
        said_bytes = 8 + header_bytes + data_bytes
        raise CheckpointError(
            f"{path} is {'truncated' if size_bytes < said_bytes else 'too long'}: it has {size_bytes} bytes, "
            f"its header says {said_bytes}. Download it again."
        )
    return dict(header)


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file, from the index, or from the one safetensors file."""
    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        weight_map = read_config_json(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_file} has no weight_map. Download it again.")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file or len(file) > _LONGEST_FILE_NAME:
                raise CheckpointError(f"{index_file} names {file!r}, which is not a file of the folder. Do not use it.")
        return weight_map
    single = folder / "model.safetensors"
    if single.is_file():
        return dict.fromkeys(read_safetensors_header(single), single.name)
    if loose := sorted(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has {loose[0].name} but neither model.safetensors nor model.safetensors.index.json. "
            "Download the index too."
        )
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} holds its weights as pickle only ({pickles[0]}): reading them would execute what they contain. "
            "Use a revision of the checkpoint with .safetensors files."
        )
    raise CheckpointError(f"{folder} holds no weights (*.safetensors). Download them, or load with weights='random'.")


def _refuse_lfs_pointer(path: Path) -> None:
    try:
        with path.open("rb") as file:
            beginning = file.read(len(_LFS_MARK))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error
    if beginning == _LFS_MARK:
        raise CheckpointError(
            f"{path} is a Git-LFS pointer, not the file itself. Run 'git lfs pull' in the folder, "
            "or download the file from the hub's page."
        )
