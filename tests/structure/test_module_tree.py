"""Module trees add up to the LoadReport, fold equal layers, and carry shapes of a real decode step."""

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from glmlab import load_model
from glmlab.models.checkpoints import find_config
from glmlab.models.loading import build_skeleton, load_config
from glmlab.structure.graph import StructureError
from glmlab.structure.module_tree import decode_shapes, module_tree


def _row(tree, path):
    (row,) = [row for row in tree.rows if row.path == path]
    return row


class TestTotals:
    @pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
    def test_equal_the_load_report(self, precision):
        loaded = load_model("embedded", precision=precision, device="cpu")
        tree = module_tree(loaded)
        assert (tree.parameters, tree.total_bytes) == (loaded.report.parameters, loaded.report.total_bytes)
        assert sum(row.own_parameters for row in tree.rows) == tree.parameters
        assert sum(row.own_bytes for row in tree.rows) == tree.total_bytes

    @pytest.mark.parametrize("name", ["chatglm3-6b", "qwen2.5-7b", "llama-2-7b"])
    def test_of_large_models_from_their_skeletons(self, name):
        skeleton = build_skeleton(load_config(find_config(name)))
        tree = module_tree(skeleton)
        assert tree.parameters == sum(parameter.numel() for parameter in skeleton.parameters())
        layers = skeleton.config.num_hidden_layers
        folded = _row(tree, f"model.layers.0-{layers - 1}")
        assert folded.count == layers
        one = sum(p.numel() for p in skeleton.model.layers[0].parameters())
        assert folded.parameters == layers * one
        assert len(tree.rows) < 25

    def test_tied_weights_count_once(self):
        config = Qwen2Config(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True,
        )  # fmt: skip
        model = Qwen2ForCausalLM(config).eval()
        tree = module_tree(model)
        assert tree.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert (_row(tree, "lm_head").parameters, _row(tree, "model.embed_tokens").parameters) == (0, 64 * 16)

    def test_layers_that_differ_are_not_folded(self):
        config = Qwen2Config(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1,
        )  # fmt: skip
        model = Qwen2ForCausalLM(config).eval()
        model.model.layers[2].mlp.up_proj = nn.Linear(16, 32, bias=True)
        names = [row.attribute for row in module_tree(model).rows if row.class_name == "Qwen2DecoderLayer"]
        assert names == ["layers.0-1: 2 x", "layers.2", "layers.3"]


class TestShapes:
    def test_are_those_of_one_token(self, embedded):
        tree = module_tree(embedded)
        config = embedded.model.config
        assert _row(tree, "").output_shape == (1, 1, config.vocab_size)
        assert _row(tree, "model.layers.0-3").output_shape == (1, 1, config.hidden_size)
        assert _row(tree, "model.layers.0-3.self_attn.k_proj").output_shape == (
            1, 1, config.num_key_value_heads * config.head_dim,
        )  # fmt: skip
        assert _row(tree, "model.layers.0-3.mlp.gate_up_proj").output_shape == (1, 1, 2 * config.intermediate_size)

    def test_agree_between_the_model_and_its_skeleton(self, embedded):
        skeleton = build_skeleton(embedded.model.config)
        assert decode_shapes(skeleton, context_tokens=3) == decode_shapes(embedded.model, context_tokens=3)

    def test_leave_no_hooks_behind(self, embedded):
        before = [len(module._forward_hooks) for module in embedded.model.modules()]
        module_tree(embedded)
        assert [len(module._forward_hooks) for module in embedded.model.modules()] == before


class TestTables:
    def test_repr_is_the_table(self, embedded):
        lines = repr(module_tree(embedded)).splitlines()
        assert lines[0].split() == ["module", "parameters", "bytes", "share", "decode", "step"]
        assert lines[1].split()[:2] == ["ChatGLM3ForCausalLM", f"{embedded.report.parameters:,}"]
        assert "    layers.0-3: 4 x GlmDecoderLayer" in lines[4]
        assert len({len(line) for line in lines}) == 1

    def test_frame(self, embedded):
        table = module_tree(embedded).to_frame()
        assert table["own_bytes"].sum() == embedded.report.total_bytes
        assert table["share"].iloc[0] == 1
        assert table.loc[table["module"] == "lm_head", "output_shape"].tolist() == ["1 × 1 × 1792"]


class TestBadInput:
    @pytest.mark.parametrize("thing", [nn.Linear(1, 1), "embedded", torch.ones(1)])
    def test_what_is_no_language_model_is_refused(self, thing):
        with pytest.raises(StructureError, match="is not a causal language model. Give what load_model returns"):
            module_tree(thing)

    def test_no_cached_token_is_refused(self, embedded):
        with pytest.raises(StructureError, match="context_tokens=0: a decode step needs at least one cached token"):
            module_tree(embedded, context_tokens=0)
