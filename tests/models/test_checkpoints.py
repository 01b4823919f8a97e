"""A name becomes a checked folder, or one clear error."""

import json
import struct

import pytest
from hub_server import cut_into_shards

from glmlab.models.checkpoints import (
    check_checkpoint,
    find_checkpoint,
    find_config,
    known_configs,
    read_safetensors_header,
)
from glmlab.models.hub import CheckpointError

INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1018370\n"
LETTERS = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": "08"}}'
OVERLAP = json.dumps({key: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for key in "ab"}).encode()


@pytest.fixture
def sharded(checkpoint, tmp_path):
    cut_into_shards(checkpoint, tmp_path / "sharded")
    return tmp_path / "sharded"


# ------------------------------------------------------------------------------------------------------- names


def test_embedded_folders_and_shards_are_found(checkpoint, sharded):
    assert (find_checkpoint("embedded") / "config.json").is_file()
    assert find_checkpoint(str(checkpoint)) == checkpoint
    assert [path.name for path in check_checkpoint(sharded)] == SHARDS
    assert read_safetensors_header(checkpoint / "model.safetensors").keys() == {
        name for shard in SHARDS for name in read_safetensors_header(sharded / shard)
    }


@pytest.mark.parametrize("name", ["zai-org/chatglm3-6b", "THUDM/chatglm3-6b", "chatglm3-6b", "ChatGLM3-6B"])
def test_suite_models_have_their_config_here(name):
    assert find_config(name).stem == "chatglm3-6b"


def test_every_config_names_its_model():
    assert {"chatglm3-6b", "chatglm3-6b-32k", "chatglm2-6b", "glm-4-9b-chat-hf", "qwen2.5-7b", "llama-2-7b-hf"} <= set(
        known_configs()
    )


@pytest.mark.parametrize(
    ("find", "name", "message"),
    [
        (
            find_checkpoint,
            "no/such/folder",
            "'no/such/folder' is neither 'embedded', nor an existing folder, nor a hub",
        ),
        (find_checkpoint, "misspelt", "'misspelt' is neither 'embedded'.*Check the spelling of the path"),
        (find_checkpoint, "chatglm3-6b", "Its config is known here, its weights are not: give the hub id, or weights="),
        (find_config, "misspelt", r"no config for 'misspelt': .*chatglm2-6b, chatglm3-6b"),
        *(
            (find, name, r"cannot be a file or folder .* Check the path")
            for find in (find_checkpoint, find_config)
            for name in ("a" * 5000, "~no-such-user-here/model")
        ),
    ],
)
def test_unknown_names_are_refused(find, name, message):
    with pytest.raises(CheckpointError, match=message):
        find(name)


# ------------------------------------------------------------------------------------------------------- files


def _header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "has no config.json: it is not a checkpoint folder"),
        ("config.json", b"{", "config.json is not JSON"),
        ("config.json", b"[" * 100_000, "config.json is not JSON"),
        ("config.json", b'{"num_layers": ' + b"9" * 5000 + b"}", "config.json is not JSON"),
        ("config.json", b"[]", "config.json holds a JSON list, not an object"),
        ("config.json", POINTER, "config.json is a Git-LFS pointer, not the file itself. Run 'git lfs pull'"),
        ("model.safetensors", POINTER, "model.safetensors is a Git-LFS pointer"),
        ("tokenizer.model", POINTER, "tokenizer.model is a Git-LFS pointer"),
        ("tokenizer.model", None, "has no tokenizer"),
        ("model.safetensors", None, r"holds no weights \(\*.safetensors\)"),
        ("model.safetensors", b"", "is not a whole safetensors file: its header is broken"),
        ("model.safetensors", _header(b"not json.."), "is not a whole safetensors file: its header is broken"),
        ("model.safetensors", struct.pack("<Q", 2**60), "is not a whole safetensors file: its header is broken"),
        ("model.safetensors", _header(LETTERS, bytes(8)), "is not a whole safetensors file: its header is broken"),
        ("model.safetensors", _header(OVERLAP, bytes(8)), "is not a whole safetensors file: its header is broken"),
        (INDEX, b'{"weight_map": {}}', "has no weight_map. Download it again"),
        (
            INDEX,
            json.dumps({"weight_map": {"a": "a" * 5000}}).encode(),
            "names 'aaaa.*, which is not a file of the fol",
        ),
        (INDEX, b'{"weight_map": {"a": "../../x"}}', "names '../../x', which is not a file of the folder"),
    ],
)
def test_a_damaged_file_is_named(checkpoint, file, content, message):
    if content is None:
        (checkpoint / file).unlink()
    else:
        (checkpoint / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(checkpoint)


def test_a_file_of_another_length_than_its_header_says_is_named(checkpoint):
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    for changed in (content[:-100], content + b"more"):
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match="is not a whole safetensors file: its length is not what its header"):
            check_checkpoint(checkpoint)


def test_shards_that_do_not_belong_together_are_named(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["transformer.nowhere.weight"] = SHARDS[0]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"does not hold transformer.nowhere.weight, which the index says it does"
    ):
        check_checkpoint(sharded)
    (sharded / SHARDS[1]).unlink()
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointError, match=rf"has {SHARDS[0]} but neither model.safetensors nor {INDEX}"):
        check_checkpoint(sharded)


def test_pickles_are_refused(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"its weights as pickle only \(pytorch_model.bin\): reading them would exec"
    ):
        check_checkpoint(checkpoint)


def test_unreadable_files_are_named(checkpoint, monkeypatch):
    def refuse(self, *arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(CheckpointError, match=r"config.json cannot be read \(Permission denied\). Check its perm"):
        check_checkpoint(checkpoint)
