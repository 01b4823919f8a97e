"""Module trees add up to the LoadReport, fold equal layers, and carry shapes of a real decode step."""

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from glmlab import load_model
from glmlab.models.checkpoints import find_config
from glmlab.models.loading import build_skeleton, load_config
from glmlab.structure.graph import StructureError
from glmlab.structure.module_tree import module_tree

TINY = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def _row(tree, path):
    return tree.table.set_index("module").loc[path]


class TestTotals:
    @pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
    def test_equal_the_load_report(self, precision):
        loaded = load_model("embedded", precision=precision, device="cpu")
        tree = module_tree(loaded)
        assert (tree.parameters, tree.total_bytes) == (loaded.report.parameters, loaded.report.total_bytes)
        assert tree.table["own_parameters"].sum() == tree.parameters
        assert tree.table["own_bytes"].sum() == tree.total_bytes

    @pytest.mark.parametrize("name", ["chatglm3-6b", "qwen2.5-7b", "llama-2-7b"])
    def test_of_large_models_from_their_skeletons(self, name):
        skeleton = build_skeleton(load_config(find_config(name)))
        tree = module_tree(skeleton)
        assert tree.parameters == sum(parameter.numel() for parameter in skeleton.parameters())
        layers = skeleton.config.num_hidden_layers
        folded = _row(tree, f"model.layers.0-{layers - 1}")
        assert folded["count"] == layers
        one = sum(p.numel() for p in skeleton.model.layers[0].parameters())
        assert folded.parameters == layers * one
        assert len(tree.table) < 25

    def test_tied_weights_count_once(self):
        model = Qwen2ForCausalLM(Qwen2Config(**TINY, num_hidden_layers=2, tie_word_embeddings=True)).eval()
        tree = module_tree(model)
        assert tree.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert (_row(tree, "lm_head").parameters, _row(tree, "model.embed_tokens").parameters) == (0, 64 * 16)

    def test_layers_that_differ_are_not_folded(self):
        model = Qwen2ForCausalLM(Qwen2Config(**TINY, num_hidden_layers=4)).eval()
        model.model.layers[2].mlp.up_proj = nn.Linear(16, 32, bias=True)
        table = module_tree(model).table
        assert table.loc[table["class"] == "Qwen2DecoderLayer", "label"].tolist() == [
            "layers.0-1: 2 x Qwen2DecoderLayer", "layers.2: Qwen2DecoderLayer", "layers.3: Qwen2DecoderLayer",
        ]  # fmt: skip


class TestShapes:
    def test_are_those_of_one_token(self, embedded):
        config = embedded.model.config
        tree = module_tree(embedded)
        for path, size in (
            ("", config.vocab_size),
            ("model.layers.0-3", config.hidden_size),
            ("model.layers.0-3.self_attn.k_proj", config.num_key_value_heads * config.head_dim),
            ("model.layers.0-3.mlp.gate_up_proj", 2 * config.intermediate_size),
        ):
            assert _row(tree, path).output_shape == f"1 × 1 × {size}"

    def test_agree_between_the_model_and_its_skeleton(self, embedded):
        skeleton, model = module_tree(build_skeleton(embedded.model.config)), module_tree(embedded)
        assert skeleton.table["output_shape"].tolist() == model.table["output_shape"].tolist()

    def test_leave_no_hooks_behind(self, embedded):
        before = [len(module._forward_hooks) for module in embedded.model.modules()]
        module_tree(embedded)
        assert [len(module._forward_hooks) for module in embedded.model.modules()] == before


def test_repr_is_the_tree(embedded):
    lines = repr(module_tree(embedded)).splitlines()
    assert lines[0].split() == ["module", "parameters", "bytes", "share", "decode", "step"]
    assert lines[1].split()[:2] == ["ChatGLM3ForCausalLM", f"{embedded.report.parameters:,}"]
    assert "    layers.0-3: 4 x GlmDecoderLayer" in lines[4]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("thing", [nn.Linear(1, 1), "embedded", torch.ones(1)])
def test_what_is_no_language_model_is_refused(thing):
    with pytest.raises(StructureError, match="is not a causal language model. Give what load_model returns"):
        module_tree(thing)
