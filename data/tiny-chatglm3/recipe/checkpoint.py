"""The embedded model as a module to train, and as the files of an original ChatGLM3 checkpoint."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM

CONFIG = {  # field names and order of the published config.json
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 512,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 192,
    "kv_channels": 64,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 4,
    "original_rope": True,
    "padded_vocab_size": 1792,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.30.2",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENIZER_CONFIG = {  # as published
    "name_or_path": "THUDM/chatglm3-6b",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}
_RENAMED = {  # transformers' GLM -> the published name
    "model.embed_tokens.": "transformer.embedding.word_embeddings.",
    "model.norm.": "transformer.encoder.final_layernorm.",
    "lm_head.": "transformer.output_layer.",
    "model.layers.": "transformer.encoder.layers.",
    "self_attn.o_proj.": "self_attention.dense.",
    "self_attn.": "self_attention.",
    "mlp.gate_up_proj.": "mlp.dense_h_to_4h.",
    "mlp.down_proj.": "mlp.dense_4h_to_h.",
}


def new_model(seed: int) -> GlmForCausalLM:
    """An untrained model of CONFIG's shape in fp32: transformers' GLM, which computes what ChatGLM3 computes."""
    torch.manual_seed(seed)
    model = GlmForCausalLM(
        GlmConfig(
            vocab_size=CONFIG["padded_vocab_size"],
            hidden_size=CONFIG["hidden_size"],
            intermediate_size=CONFIG["ffn_hidden_size"],
            num_hidden_layers=CONFIG["num_layers"],
            num_attention_heads=CONFIG["num_attention_heads"],
            num_key_value_heads=CONFIG["multi_query_group_num"],
            head_dim=CONFIG["kv_channels"],
            rms_norm_eps=CONFIG["layernorm_epsilon"],
            max_position_embeddings=CONFIG["seq_length"],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            attention_bias=CONFIG["add_qkv_bias"],
            attention_dropout=0.0,
            pad_token_id=CONFIG["pad_token_id"],
            eos_token_id=CONFIG["eos_token_id"],
            bos_token_id=1,
            attn_implementation="sdpa",
        )
    )
    # At transformers' 0.02 the layers' outputs drown the token, and copying is learned very late.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    return model


def _published_name(name: str) -> str:
    for ours, published in _RENAMED.items():
        name = name.replace(ours, published)
    return name


def published_tensors(model: GlmForCausalLM) -> dict[str, Tensor]:
    """The model's weights in fp16 under the published names, Q, K and V fused along the output axis."""
    tensors: dict[str, Tensor] = {}
    fused: dict[str, list[Tensor]] = {}
    for name, weight in model.state_dict().items():
        name = _published_name(name)
        weight = weight.to(torch.float16)
        for part in ("q_proj", "k_proj", "v_proj"):  # the order in which state_dict lists them and ChatGLM3 fuses them
            if part in name:
                fused.setdefault(name.replace(part, "query_key_value"), []).append(weight)
                break
        else:
            tensors[name] = weight.contiguous()
    return tensors | {name: torch.cat(parts) for name, parts in fused.items()}


def load_weights(model: GlmForCausalLM, folder: Path) -> None:
    """Put the weights of a saved checkpoint into a model of :func:`new_model`."""
    saved = load_file(folder / "model.safetensors")
    heads, groups, size = (CONFIG[name] for name in ("num_attention_heads", "multi_query_group_num", "kv_channels"))
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        published = _published_name(name)
        for part, first, count in (("q", 0, heads), ("k", heads, groups), ("v", heads + groups, groups)):
            if f"{part}_proj" in published:
                fused = saved[published.replace(f"{part}_proj", "query_key_value")]
                state[name] = fused[first * size : (first + count) * size]
                break
        else:
            state[name] = saved[published]
    model.load_state_dict(state)


def save_checkpoint(model: GlmForCausalLM, tokenizer_model: bytes, folder: Path) -> None:
    """Write config.json, model.safetensors, tokenizer.model and tokenizer_config.json."""
    save_file(published_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # readable by all, as the other files
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
