"""From a name to a checked local folder: the embedded model, a folder, or a Hugging Face id.

A checkpoint is checked before anything is read into memory: files present and whole, tensors in safetensors (never
pickle), a tokenizer beside them. Nothing that came with it is executed.
"""

import json
from pathlib import Path

from glmlab.core.resources import data_path
from glmlab.models.checkpoint_files import CheckpointError, check_checkpoint
from glmlab.models.hub import is_hub_id, locate, locate_config, mending_command, refuse_half_download

EMBEDDED = "embedded"
"""The name of the model that ships with the suite."""


def find_checkpoint(name: str) -> Path:
    """Return the checked folder of ``name``: "embedded", a folder, or a hub id (fetched where it is not cached).

    Raises:
        CheckpointError: no such folder or hub id, no network, a half-download, or a folder that fails
            :func:`~glmlab.models.checkpoint_files.check_checkpoint`.

    Example:
        >>> find_checkpoint("embedded").name
        'tiny-chatglm3'
    """
    if name == EMBEDDED:
        folder = data_path("tiny-chatglm3")
    elif (path := _local_path(name)).is_dir():
        folder = path
        refuse_half_download(folder)
    elif is_hub_id(name):
        folder = locate(name)
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
        command = mending_command(name, folder)
        raise CheckpointError(f"{error} This does: {command}" if command else str(error)) from error
    return folder


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
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{name} has no config.json. Give the folder of a checkpoint, or a config.json.")
        return path / "config.json"
    known = known_configs()
    key = name.rsplit("/", 1)[-1].lower()
    if key in known:
        return known[key]
    if is_hub_id(name):
        return locate_config(name)
    raise CheckpointError(
        f"no config for {name!r}: it is no folder, no file, no hub id, and not in data/configs "
        f"({', '.join(sorted(known))})."
    )


def known_configs() -> dict[str, Path]:
    """Return the configs that ship with the suite, by lower-case model name (with and without the hub's suffix)."""
    known = {}
    for path in sorted(data_path("configs").glob("*.json")):
        published_name = json.loads(path.read_text())["_name_or_path"].rsplit("/", 1)[-1].lower()
        known.update({path.stem: path, published_name: path})
    return known


def _local_path(name: str) -> Path:
    """The path that a name would be; refuses names that no file can have."""
    try:
        path = Path(name).expanduser()
        path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name[:80]!r} cannot be a file or folder ({error}). Check the path.") from error
    return path
