"""load_model: every precision, random weights, reports that add up, and one clear error for each bad input."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from glmlab import load_model
from glmlab.core.units import GIB
from glmlab.models import placement
from glmlab.models.checkpoints import CheckpointError, find_config
from glmlab.models.loading import LoadReport, build_skeleton, load_config
from glmlab.models.placement import (
    COMPONENTS,
    FLOAT_PRECISIONS,
    PRECISIONS,
    GlmlabError,
    component_of,
    measure_bytes,
    predict_bytes,
)


def _rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _configure(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("weights", ["checkpoint", "random"])
def test_every_precision_has_the_predicted_bytes(precision, weights):
    loaded = load_model("embedded", precision=precision, device="cpu", weights=weights)
    dtype = FLOAT_PRECISIONS[loaded.report.dtype]
    skeleton = build_skeleton(load_config(find_config("embedded")))
    assert loaded.report.bytes_by_component == predict_bytes(skeleton, precision, dtype)
    with torch.no_grad():
        assert loaded.model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    assert not any(parameter.is_meta for parameter in loaded.model.parameters())


def test_random_and_checkpoint_weights_take_the_same_memory():
    reports = [
        load_model("embedded", precision="int4", device="cpu", weights=weights).report
        for weights in ("checkpoint", "random")
    ]
    assert reports[0].bytes_by_component == reports[1].bytes_by_component
    assert [report.weights for report in reports] == ["checkpoint", "random"]


def test_sizes_of_chatglm3_6b():
    """6,243,584,000 parameters; 11.63 GiB in fp16 (two bytes a weight, and the rotary tables)."""
    skeleton = build_skeleton(load_config(find_config("chatglm3-6b")))
    assert sum(parameter.numel() for parameter in skeleton.parameters()) == 6_243_584_000
    sizes = predict_bytes(skeleton, "fp16", torch.float16)
    assert tuple(sizes) == COMPONENTS
    assert sum(sizes.values()) - sizes["other"] == 2 * 6_243_584_000
    assert round(sum(sizes.values()) / GIB, 2) == 11.63


@pytest.mark.parametrize("name", ["chatglm3-6b", "glm-4-9b-chat-hf", "qwen2.5-7b", "llama-2-7b"])
def test_no_weight_of_a_known_model_is_without_a_component(name):
    skeleton = build_skeleton(load_config(find_config(name)))
    others = {path for path, _ in skeleton.named_parameters() if component_of(path.rpartition(".")[0]) == "other"}
    assert others == set()


def test_tied_weights_count_once(tmp_path):
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    assert sum(measure_bytes(model).values()) == sum(predict_bytes(model, "fp32", torch.float32).values())
    assert measure_bytes(model)["head"] == 0


def test_int8_keeps_its_bytes_when_the_scales_move_in_the_first_forward_pass():
    loaded = load_model("embedded", precision="int8", device="cpu")
    with torch.no_grad():
        loaded.model(torch.tensor([[5, 6, 7]]))
    assert measure_bytes(loaded.model) == loaded.report.bytes_by_component


@pytest.mark.parametrize(
    ("config_class", "model_class"), [(Qwen2Config, Qwen2ForCausalLM), (LlamaConfig, LlamaForCausalLM)]
)
def test_other_families_load_with_the_same_call(tmp_path, embedded, config_class, model_class):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = model_class(config)
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=embedded.tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), precision="fp32", device="cpu")
    assert type(loaded.model) is model_class
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, model.eval()(ids).logits)


class TestReport:
    def test_components_add_up(self, embedded):
        report = embedded.report
        assert report.total_bytes == sum(
            tensor.numel() * tensor.element_size()
            for tensor in {*embedded.model.parameters(), *embedded.model.buffers()}
        )

    def test_repr_is_the_table(self, embedded):
        lines = repr(embedded).splitlines()
        assert lines[0] == "embedded"
        assert lines[1].split() == ["embedding", *lines[1].split()[1:]]
        assert any(line.startswith("parameters") and f"{embedded.report.parameters:,}" in line for line in lines)

    def test_html_is_escaped(self, embedded):
        fields = {name: getattr(embedded.report, name) for name in LoadReport.__dataclass_fields__}
        html = LoadReport(**{**fields, "name": "<img src=x onerror=alert(1)>"})._repr_html_()
        assert "<img" not in html
        assert "&lt;img src=x onerror=alert(1)&gt;" in html

    def test_a_folder_is_named_without_its_path(self, checkpoint):
        assert load_model(str(checkpoint), device="cpu").report.name == "checkpoint"


def test_chat_stops_at_the_next_role(embedded):
    stops = embedded.tokenizer.convert_tokens_to_ids(["</s>", "<|user|>", "<|observation|>"])
    assert embedded.model.generation_config.eos_token_id == stops


def test_random_weights_of_a_model_without_tokenizer_borrow_the_embedded_one(tmp_path):
    config = json.loads(find_config("embedded").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(tmp_path), weights="random", device="cpu")
    assert loaded.report.tokenizer == "the embedded model's, standing in"


class TestBadInput:
    def refuse(self, message, name="embedded", error=GlmlabError, **arguments):
        with pytest.raises(error, match=message):
            load_model(name, **{"device": "cpu", **arguments})

    def test_unknown_precision(self):
        self.refuse("precision='int3' is not known. Use one of fp32, bf16, fp16, int8, int4, or auto", precision="int3")

    def test_unknown_weights(self):
        self.refuse("weights='zeros' is not known. Use 'checkpoint' or 'random'", weights="zeros")

    def test_unknown_device(self):
        self.refuse("device='gpu' is not known", device="gpu")
        self.refuse("device='mps' is not supported", device="mps")

    def test_gpu_where_there_is_none(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        self.refuse("sees no CUDA GPU. Use device='cpu', or check the driver with nvidia-smi", device="cuda")

    def test_gpu_that_is_not_there(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        self.refuse("device='cuda:5', but there are 2 GPUs: use cuda:0 to cuda:1", device="cuda:5")

    def test_missing_tensor(self, checkpoint):
        _rewrite(checkpoint, lambda tensors: tensors.pop("transformer.output_layer.weight"))
        self.refuse("checkpoint lacks lm_head.weight", str(checkpoint))

    def test_missing_fused_tensor(self, checkpoint):
        name = "transformer.encoder.layers.0.self_attention.query_key_value.bias"
        _rewrite(checkpoint, lambda tensors: tensors.pop(name))
        self.refuse(r"lacks model.layers.0.self_attn.k_proj.bias, .*q_proj.bias, .*v_proj.bias", str(checkpoint))

    def test_unexpected_tensor(self, checkpoint):
        _rewrite(checkpoint, lambda tensors: tensors.update({"transformer.extra.weight": torch.zeros(2)}))
        self.refuse("has tensors that no part of the model takes: transformer.extra.weight", str(checkpoint))

    @pytest.mark.parametrize(
        "name",
        [
            "transformer.output_layer.weight",
            "transformer.encoder.layers.0.self_attention.query_key_value.weight",
            "transformer.encoder.layers.1.mlp.dense_h_to_4h.weight",
        ],
    )
    @pytest.mark.parametrize("precision", ["fp32", "int8"])
    def test_mis_shaped_tensor(self, checkpoint, name, precision):
        _rewrite(checkpoint, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
        self.refuse("checkpoint (does not fit its own config.json|has tensors of the wrong shape|cannot be converted)",
                    str(checkpoint), precision=precision)  # fmt: skip

    def test_inv_freq_of_old_checkpoints_is_ignored(self, checkpoint):
        extra = {"transformer.rotary_pos_emb.inv_freq": torch.zeros(16)}
        _rewrite(checkpoint, lambda tensors: tensors.update(extra))
        assert load_model(str(checkpoint), device="cpu").report.parameters > 0

    def test_model_type_that_transformers_does_not_know(self, checkpoint):
        _configure(checkpoint, model_type="made-up", auto_map={"AutoConfig": "evil.Config"})
        (checkpoint / "evil.py").write_text("raise SystemExit('executed')")
        self.refuse("model_type 'made-up', which transformers .* does not know; the checkpoint's own code is never "
                    "executed", str(checkpoint), CheckpointError)  # fmt: skip

    def test_model_that_generates_no_text(self, checkpoint):
        (checkpoint / "config.json").write_text(json.dumps({"model_type": "vit"}))
        self.refuse("describes a vit model, which is not a causal language model", str(checkpoint), CheckpointError)

    def test_config_with_a_value_of_the_wrong_kind(self, checkpoint):
        _configure(checkpoint, hidden_size="many")
        self.refuse("config.json is not a usable chatglm config", str(checkpoint), CheckpointError)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": ["chatglm"]}, r"model_type \['chatglm'\], which transformers .* does not know"),
            ({"num_layers": 10**9}, r"num_hidden_layers = 1000000000, which no model has \(1 to 1000\)"),
            ({"num_layers": 0}, "num_hidden_layers = 0, which no model has"),
            ({"hidden_size": -64}, "hidden_size = -64, which no model has"),
            ({"num_attention_heads": 0}, "num_attention_heads = 0, which no model has"),
            ({"padded_vocab_size": 0}, "vocab_size = 0, which no model has"),
            ({"kv_channels": -32}, "no chatglm model can be built from this config.json"),
            ({"hidden_act": "evil"}, "no chatglm model can be built from this config.json .*evil"),
            ({"torch_dtype": "load"}, "no chatglm model can be built from this config.json"),
            ({"quantization_config": {"quant_method": "gptq"}}, "its tensors are quantised already. Use the unquantis"),
        ],
    )
    @pytest.mark.parametrize("weights", ["checkpoint", "random"])
    def test_config_of_no_model(self, checkpoint, changes, message, weights):
        _configure(checkpoint, **changes)
        self.refuse(message, str(checkpoint), CheckpointError, weights=weights)

    @pytest.mark.parametrize(
        "changes",
        [
            {"attn_implementation": "somebody/kernel"},
            {"_attn_implementation": "flash_attention_2"},
            {"text_config": {"attn_implementation": "somebody/kernel"}},
            {"experts_implementation": "somebody/kernel"},
        ],
    )
    def test_config_that_names_code_of_others(self, checkpoint, changes):
        _configure(checkpoint, **changes)
        self.refuse("names code outside PyTorch, and the suite runs none", str(checkpoint), CheckpointError)

    def test_config_fields_that_change_outputs_only_are_overruled(self, checkpoint):
        _configure(checkpoint, return_dict=False, output_hidden_states="all", num_labels=10**9)
        config = load_model(str(checkpoint), device="cpu").model.config
        assert config.return_dict
        assert not config.output_hidden_states

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("tokenizer_config.json", "null", "the tokenizer of .* cannot be read"),
            ("tokenizer_config.json", '{"tokenizer_class": 5}', "the tokenizer of .* cannot be read"),
            ("special_tokens_map.json", "[]", "the tokenizer of .* cannot be read"),
            ("generation_config.json", "null", "cannot be loaded .* fetch the weights, config.json and generation_"),
            ("generation_config.json", '{"max_new_tokens": "many"}', "cannot be loaded .*TypeError"),
        ],
    )
    def test_hand_edited_side_files(self, checkpoint, file, content, message):
        (checkpoint / file).write_text(content)
        self.refuse(message, str(checkpoint))

    def test_overlapping_tensors(self, checkpoint):
        entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        header = json.dumps({"a": entry, "b": entry}).encode()
        content = struct.pack("<Q", len(header)) + header + bytes(8)
        (checkpoint / "model.safetensors").write_bytes(content)
        self.refuse("cannot be loaded .*SafetensorError", str(checkpoint))

    def test_int4_on_odd_dimensions(self, tmp_path):
        fields = json.loads(find_config("embedded").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**fields, "ffn_hidden_size": 200}))
        self.refuse(
            r"cannot be loaded in int4: model.layers.0.mlp.down_proj has 200 input features, .* blocks of 64. "
            "Use precision='int8'",
            str(tmp_path), precision="int4", weights="random",
        )  # fmt: skip

    def test_broken_tokenizer(self, checkpoint):
        (checkpoint / "tokenizer.model").write_bytes(b"not a sentencepiece model")
        with pytest.raises(Exception, match=r"tokenizer.model is not a sentencepiece model"):
            load_model(str(checkpoint), device="cpu")

    def test_too_little_memory_names_what_fits(self, monkeypatch):
        monkeypatch.setattr(placement, "free_bytes", lambda device: 7 * GIB)
        self.refuse(
            r"chatglm3-6b in fp16 needs 11\.\d\d GiB, but cpu has 7.00 GiB free. precision='int8' needs 6\.\d\d GiB "
            "and would fit",
            "chatglm3-6b", precision="fp16", weights="random",
        )  # fmt: skip

    def test_too_little_memory_for_any_precision(self, monkeypatch):
        monkeypatch.setattr(placement, "free_bytes", lambda device: 1 * GIB)
        self.refuse(r"No precision fits: int4 needs \d\.\d\d GiB. Free memory, or use a smaller model",
                    "chatglm3-6b", weights="random")  # fmt: skip


@pytest.mark.parametrize(("free_gib", "chosen"), [(30, "fp32"), (20, "bf16"), (8, "int8"), (5.3, "int4")])
def test_auto_takes_the_largest_precision_that_fits(monkeypatch, free_gib, chosen):
    monkeypatch.setattr(placement, "free_bytes", lambda device: int(free_gib * GIB))
    skeleton = build_skeleton(load_config(find_config("chatglm3-6b")))
    assert placement.choose_precision("chatglm3-6b", skeleton, "auto", torch.device("cpu")) == chosen


def test_attention_is_chosen_when_loading() -> None:
    for weights in ("checkpoint", "random"):
        for attention in ("eager", "sdpa"):
            loaded = load_model(precision="fp32", device="cpu", weights=weights, attention=attention)  # type: ignore[arg-type]
            assert loaded.report.attention == loaded.model.config._attn_implementation == attention
    with pytest.raises(GlmlabError, match=r"attention='flash' is not known\. Use 'sdpa' or 'eager'"):
        load_model(attention="flash")
