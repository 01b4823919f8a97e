"""From a name to a checked local folder: the embedded model, a folder, or a hub id.

A checkpoint is checked before anything is read into memory: files present and whole, tensors in safetensors (never
pickle), a tokenizer beside them. Only headers are read, and nothing that came with it is executed.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from glmlab.core.resources import data_path
from glmlab.models.hub import (
    CheckpointError,
    FetchReport,
    download,
    fetch_command,
    fetched_with,
    find_cached,
    locate_config,
)

EMBEDDED = "embedded"
"""The name of the model that ships with the suite."""

_LFS_MARK = b"version https://git-lfs"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json", "vocab.txt")
_LONGEST_FILE_NAME = 255


# ------------------------------------------------------------------------------------------------------- names


def find_checkpoint(name: str) -> Path:
    """Return the checked folder of ``name``: "embedded", a folder, or a hub id (fetched where it is not cached).

    Raises:
        CheckpointError: no such folder or hub id, no network, a half-download, or a folder that fails
            :func:`check_checkpoint`.

    Example:
        >>> find_checkpoint("embedded").name
        'tiny-chatglm3'
    """
    command = ""  # that repairs it
    if name == EMBEDDED:
        folder = data_path("tiny-chatglm3")
    elif (folder := _local_path(name)).is_dir():
        command = fetched_with(folder)
    elif is_hub_id(name):
        folder = find_cached(name) or fetch(name).folder
        command = fetch_command(name)
    else:
        raise CheckpointError(
            f"{name!r} is neither 'embedded', nor an existing folder, nor a hub id such as 'zai-org/chatglm3-6b'. "
            + (
                "Its config is known here, its weights are not: give the hub id, or weights='random'."
                if name.lower() in known_configs()
                else "Check the spelling of the path."
            )
        )
    try:
        check_checkpoint(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error} This does: {command}" if command else str(error)) from error
    return folder


def fetch(model: str, *, hub: str = "huggingface", to: Path | None = None, with_source: bool = False) -> FetchReport:
    """Fetch a model's config, tokenizer and safetensors, or complete a half-download, and check every file.

    Endpoint, token, cache folder and offline mode are those of the hub's own client: HF_ENDPOINT, HF_TOKEN, HF_HOME and
    HF_HUB_OFFLINE, or MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN and MODELSCOPE_CACHE.

    Args:
        model: the hub's name of the model, such as "zai-org/chatglm3-6b" (on ModelScope "ZhipuAI/chatglm3-6b").
        hub: "huggingface" or "modelscope".
        to: folder to fetch into; by default the hub's cache, where :func:`~glmlab.load_model` finds Hugging Face's.
        with_source: fetch the model's Python files too, to read them. They are never executed.

    Raises:
        CheckpointError: no such hub or model, no access, no network and no whole copy here, a full or read-only disk, a
            folder that holds something else, files that are not what the hub's listing says, an unusable checkpoint.
    """
    if not is_hub_id(model):
        raise CheckpointError(f"{model!r} is not a hub id such as 'zai-org/chatglm3-6b'. Check the spelling.")
    report = download(model, hub=hub, to=to, with_source=with_source)
    check_checkpoint(report.folder)
    return report


def find_config(name: str) -> Path:
    """Return the config.json of ``name``: "embedded", a folder, a file, a model of ``data/configs``, or a hub id.

    A hub id such as "zai-org/chatglm3-6b" or a bare "chatglm3-6b" is looked up in ``data/configs`` by its last part
    first, so that the suite's models need no network.

    Raises:
        CheckpointError: nothing of that name, here or on the hub.

    Example:
        >>> find_config("zai-org/chatglm3-6b").name
        'chatglm3-6b.json'
    """
    path = _local_path(name)
    if name == EMBEDDED:
        return data_path("tiny-chatglm3", "config.json")
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(f"{name} has no config.json. Give the folder of a checkpoint, or a config.json.")
    if path.exists():
        return path / "config.json" if path.is_dir() else path
    known = known_configs()
    if found := known.get(name.rsplit("/", 1)[-1].lower()):
        return found
    if is_hub_id(name):
        return locate_config(name)
    raise CheckpointError(
        f"no config for {name!r}: it is no folder, no file, no hub id, and not in data/configs "
        f"({', '.join(sorted(known))})."
    )


def known_configs() -> dict[str, Path]:
    """Return the configs that ship with the suite, by file name and by the hub's name of the model, in lower case."""
    paths = sorted(data_path("configs").glob("*.json"))
    published = {json.loads(path.read_text())["_name_or_path"].rsplit("/", 1)[-1].lower(): path for path in paths}
    return {path.stem: path for path in paths} | published


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/model.

    Example:
        >>> is_hub_id("zai-org/chatglm3-6b"), is_hub_id("./folder"), is_hub_id("chatglm3-6b")
        (True, False, False)
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not name.startswith((".", "~", "/"))


def _local_path(name: str) -> Path:
    """The path that a name would be; refuses names that no file can have."""
    try:
        path = Path(name).expanduser()
        path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name[:80]!r} cannot be a file or folder ({error}). Check the path.") from error
    return path


# ------------------------------------------------------------------------------------------------------- files


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


def check_checkpoint(folder: Path) -> list[Path]:
    """Check that a folder has what loading needs, reading headers only; return its safetensors files.

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
    files = sorted({*weight_map.values()})
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{folder} is incomplete: the index names {file}, which is not there. Download that file again."
            )
        tensors = read_safetensors_header(folder / file)
        if absent := [name for name, shard in weight_map.items() if shard == file and name not in tensors]:
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
    return [folder / file for file in files]


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


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Read the header of a safetensors file: tensor name -> dtype and shape.

    Raises:
        CheckpointError: a Git-LFS pointer, a broken header, or a file shorter or longer than its header says.
    """
    _refuse_lfs_pointer(path)
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return {name: {"dtype": one.get_dtype(), "shape": one.get_shape()} for name, one in slices.items()}
    except SafetensorError as error:
        broken = (
            "its length is not what its header says" if "not fully covered" in str(error) else "its header is broken"
        )
        raise CheckpointError(f"{path} is not a whole safetensors file: {broken}. Download it again.") from error


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file, from the index, or from the one safetensors file."""
    index_file, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index_file.is_file():
        weight_map = read_config_json(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_file} has no weight_map. Download it again.")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file or len(file) > _LONGEST_FILE_NAME:
                raise CheckpointError(f"{index_file} names {file!r}, which is not a file of the folder. Do not use it.")
        return weight_map
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
