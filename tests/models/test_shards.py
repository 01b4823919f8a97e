"""A checkpoint cut into shards is the same checkpoint, and its shards are read one by one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from glmlab import load_model
from glmlab.models.checkpoint_files import CheckpointError, check_checkpoint
from glmlab.models.checkpoints import find_checkpoint
from glmlab.models.shards import read_shards, reshard


@pytest.fixture
def whole():
    return find_checkpoint("embedded")


def test_shards_hold_every_tensor_once_in_order(whole, tmp_path):
    shards = reshard(whole, tmp_path / "to", 10**6)
    assert check_checkpoint(tmp_path / "to") == shards
    tensors = load_file(whole / "model.safetensors")
    pieces = [load_file(shard) for shard in shards]
    assert [name for piece in pieces for name in piece] == list(tensors)
    assert all(torch.equal(tensors[name], tensor) for piece in pieces for name, tensor in piece.items())
    assert all(sum(tensor.nbytes for tensor in piece.values()) <= 10**6 for piece in pieces)
    index = json.loads((tmp_path / "to" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_the_model_is_the_same(whole, tmp_path, embedded):
    reshard(whole, tmp_path / "to", 10**6)
    loaded = load_model(str(tmp_path / "to"), precision="fp32", device="cpu")
    expected = embedded.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())


def test_shards_can_be_cut_again_and_joined(whole, tmp_path):
    reshard(whole, tmp_path / "six", 10**6)
    assert len(reshard(tmp_path / "six", tmp_path / "one", 10**9)) == 1
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "README.md", "config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json",
        "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_tensor_that_is_larger_than_a_shard_has_its_own(whole, tmp_path):
    assert len(reshard(whole, tmp_path / "to", 1)) == len(load_file(whole / "model.safetensors"))


def test_reads_tell_tensors_and_bytes(whole, tmp_path):
    shards = reshard(whole, tmp_path / "to", 10**6)
    reads = read_shards(tmp_path / "to")
    assert [read.name for read in reads] == [shard.name for shard in shards]
    assert sum(read.tensors for read in reads) == 31
    assert sum(read.n_bytes for read in reads) == 4_922_752
    assert all(read.seconds > 0 for read in reads)


def test_a_folder_that_is_there_is_left_alone(whole, tmp_path):
    with pytest.raises(CheckpointError, match="is there already. Choose a new folder for the shards"):
        reshard(whole, tmp_path, 10**6)
