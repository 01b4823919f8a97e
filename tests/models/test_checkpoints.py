"""A name becomes a checked folder, or one clear error."""

import json
import struct

import pytest
from glmlab.models.shards import reshard

from glmlab.core.units import MIB
from glmlab.models.checkpoints import (
    CheckpointError,
    check_checkpoint,
    find_checkpoint,
    find_config,
    known_configs,
    read_safetensors_header,
)

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1018370\n"


def _shard(folder) -> None:
    """Turn the one safetensors file of a checkpoint into two shards with an index."""
    shards = reshard(folder, folder / "sharded", 3 * MIB)
    assert len(shards) == 2
    for path in [*shards, folder / "sharded" / "model.safetensors.index.json"]:
        path.rename(folder / path.name)
    (folder / "model.safetensors").unlink()


def test_embedded_and_folder_are_checked_folders(checkpoint):
    assert (find_checkpoint("embedded") / "config.json").is_file()
    assert find_checkpoint(str(checkpoint)) == checkpoint


def test_shards_are_found_through_the_index(checkpoint):
    _shard(checkpoint)
    assert [path.name for path in check_checkpoint(checkpoint)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


@pytest.mark.parametrize("name", ["zai-org/chatglm3-6b", "THUDM/chatglm3-6b", "chatglm3-6b", "ChatGLM3-6B"])
def test_suite_models_have_their_config_here(name):
    assert find_config(name).stem == "chatglm3-6b"


def test_every_config_names_its_model():
    assert {"chatglm3-6b", "chatglm3-6b-32k", "chatglm2-6b", "glm-4-9b-chat-hf", "qwen2.5-7b", "llama-2-7b-hf"} <= set(
        known_configs()
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", "'no/such/folder' is neither 'embedded', nor an existing folder, nor a hub id"),
        ("misspelt", "'misspelt' is neither 'embedded'.*Check the spelling of the path"),
        ("chatglm3-6b", "Its config is known here, its weights are not: give the hub id, or weights='random'"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(name)


@pytest.mark.parametrize("name", ["a" * 5000, "~no-such-user-here/model"])
@pytest.mark.parametrize("find", [find_checkpoint, find_config])
def test_names_that_no_file_can_have_are_refused(name, find):
    with pytest.raises(CheckpointError, match=r"cannot be a file or folder .* Check the path"):
        find(name)


def test_unreadable_files_are_named(checkpoint, monkeypatch):
    def refuse(self, *arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(CheckpointError, match=r"config.json cannot be read \(Permission denied\). Check its perm"):
        check_checkpoint(checkpoint)


def test_unknown_config_lists_what_there_is():
    with pytest.raises(CheckpointError, match=r"no config for 'misspelt': .*chatglm2-6b, chatglm3-6b"):
        find_config("misspelt")


def test_hub_out_of_reach_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="nobody/nothing is not on this machine and the hub cannot be reached"):
        find_checkpoint("nobody/nothing")


def _missing_config(folder):
    (folder / "config.json").unlink()


def _broken_config(folder):
    (folder / "config.json").write_text("{")


def _lfs_config(folder):
    (folder / "config.json").write_text(POINTER)


def _lfs_weights(folder):
    (folder / "model.safetensors").write_text(POINTER)


def _lfs_tokenizer(folder):
    (folder / "tokenizer.model").write_text(POINTER)


def _truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _too_long(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")


def _broken_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10) + b"not json..")


def _header_beyond_end(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60))


def _empty_file(folder):
    (folder / "model.safetensors").write_bytes(b"")


def _config_of_many_brackets(folder):
    (folder / "config.json").write_text("[" * 100_000)


def _config_of_many_digits(folder):
    (folder / "config.json").write_text('{"num_layers": ' + "9" * 5000 + "}")


def _offsets_of_letters(folder):
    header = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": "08"}}'
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def _index_with_a_long_name(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "a" * 5000}}))


def _missing_shard(folder):
    _shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _index_of_another_download(folder):
    _shard(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["transformer.nowhere.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))


def _index_leaves_the_folder(folder):
    _shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))


def _pickle_only(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _no_tokenizer(folder):
    (folder / "tokenizer.model").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing_config, "has no config.json: it is not a checkpoint folder"),
        (_broken_config, "config.json is not JSON"),
        (_lfs_config, "config.json is a Git-LFS pointer, not the file itself. Run 'git lfs pull'"),
        (_lfs_weights, "model.safetensors is a Git-LFS pointer"),
        (_lfs_tokenizer, "tokenizer.model is a Git-LFS pointer"),
        (_truncated, r"model.safetensors is truncated: it has \d+ bytes, its header says \d+"),
        (_too_long, "model.safetensors is too long"),
        (_broken_header, "is not a whole safetensors file: its header is broken"),
        (_header_beyond_end, "is not a whole safetensors file: its header is broken"),
        (_config_of_many_brackets, "config.json is not JSON"),
        (_config_of_many_digits, "config.json is not JSON"),
        (_offsets_of_letters, "is not a whole safetensors file: its header is broken"),
        (_index_with_a_long_name, "names 'aaaa.*, which is not a file of the folder"),
        (_empty_file, "is not a whole safetensors file: its header is broken"),
        (_missing_shard, "is incomplete: the index names model-00002-of-00002.safetensors, which is not there"),
        (_index_of_another_download, "does not hold transformer.nowhere.weight, which the index says it does"),
        (_index_leaves_the_folder, "names '../../secret.safetensors', which is not a file of the folder"),
        (_pickle_only, r"holds its weights as pickle only \(pytorch_model.bin\): reading them would execute"),
        (_no_weights, r"holds no weights \(\*.safetensors\)"),
        (_no_tokenizer, "has no tokenizer"),
    ],
)
def test_a_damaged_checkpoint_is_named(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(checkpoint)


def test_header_tells_shapes(checkpoint):
    header = read_safetensors_header(checkpoint / "model.safetensors")
    assert header["transformer.encoder.final_layernorm.weight"]["dtype"] == "F16"
