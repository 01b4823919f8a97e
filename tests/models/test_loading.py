"""load_model: every precision, random weights, reports that add up, and one clear error for each bad input."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from glmlab import GlmlabError, decode_steps, load_model
from glmlab.core.units import GIB
from glmlab.models import placement
from glmlab.models.checkpoints import find_config
from glmlab.models.hub import CheckpointError
from glmlab.models.loading import build_skeleton, load_config
from glmlab.models.placement import (
    COMPONENTS,
    FLOAT_PRECISIONS,
    PRECISIONS,
    component_of,
    cpu_threads,
    measure_bytes,
    predict_bytes,
)

IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def chatglm3_skeleton():
    return build_skeleton(load_config(find_config("chatglm3-6b")))


def _rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _configure(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


# -------------------------------------------------------------------------------------------------- bytes, report


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("weights", ["checkpoint", "random"])
def test_every_precision_has_the_predicted_bytes(precision, weights):
    loaded = load_model("embedded", precision=precision, device="cpu", weights=weights)
    skeleton = build_skeleton(load_config(find_config("embedded")))
    assert loaded.report.weights == weights
    assert loaded.report.bytes_by_component == predict_bytes(skeleton, precision, FLOAT_PRECISIONS[loaded.report.dtype])
    with torch.no_grad():
        assert loaded.model(IDS).logits.isfinite().all()
    if precision == "int8":  # its scales move in the first pass
        assert measure_bytes(loaded.model) == loaded.report.bytes_by_component
    assert not any(parameter.is_meta for parameter in loaded.model.parameters())


def test_sizes_of_chatglm3_6b(chatglm3_skeleton):
    """6,243,584,000 parameters; 11.63 GiB in fp16 (two bytes a weight, and the rotary tables)."""
    assert sum(parameter.numel() for parameter in chatglm3_skeleton.parameters()) == 6_243_584_000
    sizes = predict_bytes(chatglm3_skeleton, "fp16", torch.float16)
    assert tuple(sizes) == COMPONENTS
    assert sum(sizes.values()) - sizes["other"] == 2 * 6_243_584_000
    assert round(sum(sizes.values()) / GIB, 2) == 11.63


@pytest.mark.parametrize("name", ["chatglm3-6b", "glm-4-9b-chat-hf", "qwen2.5-7b", "llama-2-7b"])
def test_no_weight_of_a_known_model_is_without_a_component(name):
    skeleton = build_skeleton(load_config(find_config(name)))
    others = {path for path, _ in skeleton.named_parameters() if component_of(path.rpartition(".")[0]) == "other"}
    assert others == set()


def test_tied_weights_count_once():
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    assert sum(measure_bytes(model).values()) == sum(predict_bytes(model, "fp32", torch.float32).values())
    assert measure_bytes(model)["head"] == 0


def test_the_report_is_a_table_that_adds_up(embedded, checkpoint):
    report, lines = embedded.report, repr(embedded).splitlines()
    tensors = {*embedded.model.parameters(), *embedded.model.buffers()}
    assert report.total_bytes == sum(tensor.nbytes for tensor in tensors)
    assert (lines[0], lines[1].split()[0]) == ("embedded", "embedding")
    assert any(line.startswith("parameters") and f"{report.parameters:,}" in line for line in lines)
    html = replace(report, name="<img src=x onerror=alert(1)>")._repr_html_()
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    assert "<img" not in html
    assert load_model(str(checkpoint), device="cpu").report.name == "checkpoint"  # without its path


# ------------------------------------------------------------------------------------------------------ what comes


@pytest.mark.parametrize(
    ("config_class", "model_class"), [(Qwen2Config, Qwen2ForCausalLM), (LlamaConfig, LlamaForCausalLM)]
)
def test_other_families_load_with_the_same_call(tmp_path, embedded, config_class, model_class):
    config = config_class(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = model_class(config)
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=embedded.tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), precision="fp32", device="cpu")
    assert type(loaded.model) is model_class
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, model.eval()(IDS).logits)


def test_chat_stops_at_the_next_role(embedded):
    stops = embedded.tokenizer.convert_tokens_to_ids(["</s>", "<|user|>", "<|observation|>"])
    assert embedded.model.generation_config.eos_token_id == stops


def test_random_weights_of_a_model_without_tokenizer_borrow_the_embedded_one(tmp_path):
    (tmp_path / "config.json").write_bytes(find_config("embedded").read_bytes())
    loaded = load_model(str(tmp_path), weights="random", device="cpu")
    assert loaded.report.tokenizer == "the embedded model's, standing in"


def test_attention_is_chosen_when_loading():
    for weights, attention in (("checkpoint", "eager"), ("checkpoint", "sdpa"), ("random", "eager")):
        loaded = load_model(precision="fp32", device="cpu", weights=weights, attention=attention)
        assert loaded.report.attention == loaded.model.config._attn_implementation == attention


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_random_weights_are_the_same_each_time_and_leave_the_process_as_it_was(precision):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with cpu_threads(2):
        first, second = (
            load_model("embedded", precision=precision, device="cpu", weights="random").model for _ in range(2)
        )
        assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))


def test_a_small_model_decodes_on_one_cpu_thread():
    with cpu_threads(2):
        loaded = load_model("embedded", device="cpu")
        threads = []
        loaded.model.register_forward_hook(lambda *_: threads.append(torch.get_num_threads()))
        list(decode_steps(loaded, [5, 6, 7], max_new_tokens=2))
        assert torch.get_num_threads() == 2
    assert (threads, loaded.report.device) == ([1, 1], "cpu, 1 thread")


@pytest.mark.parametrize(("free_gib", "chosen"), [(30, "fp32"), (20, "bf16"), (8, "int8"), (5.3, "int4")])
def test_auto_takes_the_largest_precision_that_fits(monkeypatch, chatglm3_skeleton, free_gib, chosen):
    monkeypatch.setattr(placement, "free_bytes", lambda device: int(free_gib * GIB))
    assert placement.choose_precision("chatglm3-6b", chatglm3_skeleton, "auto", torch.device("cpu")) == chosen


# -------------------------------------------------------------------------------------------------------- refusals


def _refused(message, name="embedded", **arguments):
    with pytest.raises(GlmlabError, match=message) as caught:
        load_model(name, **{"device": "cpu", **arguments})
    return caught.type


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int3"}, "precision='int3' is not known. Use one of fp32, bf16, fp16, int8, int4, or auto"),
        ({"weights": "zeros"}, "weights='zeros' is not known. Use 'checkpoint' or 'random'"),
        ({"attention": "flash"}, "attention='flash' is not known. Use 'sdpa' or 'eager'"),
        ({"device": "gpu"}, "device='gpu' is not known"),
        ({"device": "mps"}, "device='mps' is not supported"),
    ],
)
def test_unknown_arguments(arguments, message):
    _refused(message, **arguments)


def test_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _refused("sees no CUDA GPU. Use device='cpu', or check the driver with nvidia-smi", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    _refused("device='cuda:5', but there are 2 GPUs: use cuda:0 to cuda:1", device="cuda:5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("transformer.output_layer.weight"), "checkpoint lacks lm_head.weight"),
        (
            lambda tensors: tensors.pop("transformer.encoder.layers.0.self_attention.query_key_value.bias"),
            r"lacks model.layers.0.self_attn.k_proj.bias, .*q_proj.bias, .*v_proj.bias",
        ),
        (
            lambda tensors: tensors.update({"transformer.extra.weight": torch.zeros(2)}),
            "has tensors that no part of the model takes: transformer.extra.weight",
        ),
    ],
)
def test_tensors_that_are_missing_or_too_many(checkpoint, change, message):
    _rewrite(checkpoint, change)
    assert _refused(message, str(checkpoint)) is CheckpointError


@pytest.mark.parametrize(
    "name", ["output_layer.weight", "encoder.layers.0.self_attention.query_key_value.weight",
             "encoder.layers.1.mlp.dense_h_to_4h.weight"],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_mis_shaped_tensor(checkpoint, name, precision):
    name = f"transformer.{name}"
    _rewrite(checkpoint, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    message = "checkpoint (does not fit its own config.json|has tensors of the wrong shape|cannot be converted)"
    _refused(message, str(checkpoint), precision=precision)


def test_inv_freq_of_old_checkpoints_is_ignored(checkpoint):
    extra = {"transformer.rotary_pos_emb.inv_freq": torch.zeros(16)}
    _rewrite(checkpoint, lambda tensors: tensors.update(extra))
    assert load_model(str(checkpoint), device="cpu").report.parameters > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": ["chatglm"]}, r"model_type \['chatglm'\], which transformers .* does not know"),
        ({"hidden_size": "many"}, "config.json is not a usable chatglm config"),
        ({"num_layers": 10**9}, r"num_hidden_layers = 1000000000, which no model has \(1 to 1000\)"),
        ({"num_layers": 0}, "num_hidden_layers = 0, which no model has"),
        ({"hidden_size": -64}, "hidden_size = -64, which no model has"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0, which no model has"),
        ({"padded_vocab_size": 0}, "vocab_size = 0, which no model has"),
        ({"kv_channels": -32}, "no chatglm model can be built from this config.json"),
        ({"hidden_act": "evil"}, "no chatglm model can be built from this config.json .*evil"),
        ({"torch_dtype": "load"}, "no chatglm model can be built from this config.json"),
        ({"quantization_config": {"quant_method": "gptq"}}, "its tensors are quantised already. Use the unquantised"),
        ({"attn_implementation": "somebody/kernel"}, "names code outside PyTorch, and the suite runs none"),
        ({"_attn_implementation": "flash_attention_2"}, "names code outside PyTorch, and the suite runs none"),
        ({"text_config": {"attn_implementation": "somebody/kernel"}}, "names code outside PyTorch, and the suite runs"),
        ({"experts_implementation": "somebody/kernel"}, "names code outside PyTorch, and the suite runs none"),
    ],
)
@pytest.mark.parametrize("weights", ["checkpoint", "random"])
def test_config_of_no_model(checkpoint, changes, message, weights):
    _configure(checkpoint, **changes)
    assert _refused(message, str(checkpoint), weights=weights) is CheckpointError


def test_code_of_a_checkpoint_is_not_run(checkpoint):
    _configure(checkpoint, model_type="made-up", auto_map={"AutoConfig": "evil.Config"})
    (checkpoint / "evil.py").write_text("raise SystemExit('executed')")
    _refused("model_type 'made-up', which transformers .* does not know; the checkpoint's own code is never executed",
             str(checkpoint))  # fmt: skip


def test_model_that_generates_no_text():
    with pytest.raises(CheckpointError, match="describes a vit model, which is not a causal language model"):
        load_config({"model_type": "vit"})


def test_config_fields_that_change_outputs_only_are_overruled(checkpoint):
    _configure(checkpoint, return_dict=False, output_hidden_states="all", num_labels=10**9)
    config = load_model(str(checkpoint), device="cpu").model.config
    assert config.return_dict
    assert not config.output_hidden_states


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", b"null", "the tokenizer of .* cannot be read"),
        ("tokenizer_config.json", b'{"tokenizer_class": 5}', "the tokenizer of .* cannot be read"),
        ("special_tokens_map.json", b"[]", "the tokenizer of .* cannot be read"),
        ("tokenizer.model", b"not a sentencepiece model", "tokenizer.model is not a sentencepiece model"),
        ("generation_config.json", b"null", "cannot be loaded .* fetch the weights, config.json and generation_"),
        ("generation_config.json", b'{"max_new_tokens": "many"}', "cannot be loaded .*TypeError"),
    ],
)
def test_damaged_side_files(checkpoint, file, content, message):
    (checkpoint / file).write_bytes(content)
    _refused(message, str(checkpoint))


def test_int4_on_odd_dimensions(checkpoint):
    _configure(checkpoint, ffn_hidden_size=200)
    message = (
        r"cannot be loaded in int4: model.layers.0.mlp.down_proj has 200 input features, .* blocks of 64. "
        "Use precision='int8'"
    )
    _refused(message, str(checkpoint), precision="int4", weights="random")


@pytest.mark.parametrize(
    ("free_gib", "precision", "message"),
    [
        (
            7,
            "fp16",
            r"in fp16 needs 11\.\d\d GiB, but cpu has 7.00 GiB free. precision='int8' needs 6\.\d\d GiB and would",
        ),
        (1, "auto", r"No precision fits: int4 needs \d\.\d\d GiB. Free memory, or use a smaller model"),
    ],
)
def test_too_little_memory_names_what_fits(monkeypatch, free_gib, precision, message):
    monkeypatch.setattr(placement, "free_bytes", lambda device: free_gib * GIB)
    _refused(message, "chatglm3-6b", precision=precision, weights="random")
