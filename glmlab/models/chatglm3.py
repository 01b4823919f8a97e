"""Teaches transformers the checkpoints of ChatGLM2 and ChatGLM3 as they were published, without remote code.

The published architecture is the one that transformers calls GLM: the same blocks under other names. Three
differences remain, and this module is all of them:

* config.json uses its own field names                         -> :class:`ChatGLM3Config`
* the tensors have other names, and Q, K and V are one tensor  -> ``WEIGHT_MAPPING``
* RMSNorm multiplies by its weight before it casts             -> :class:`ChatGLM3RMSNorm`

and the tokenizer is a sentencepiece model with nine special tokens behind its pieces -> :class:`ChatGLMTokenizer`.

Importing this module registers all three with AutoConfig, AutoModelForCausalLM and AutoTokenizer, so that
``AutoModelForCausalLM.from_pretrained(folder)`` works on a folder as published. Nothing of the folder is executed.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GlmConfig, GlmForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming
from transformers.models.glm.modeling_glm import GlmRMSNorm
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from glmlab.core.errors import GlmlabError

MODEL_TYPE = "chatglm"


# ---------------------------------------------------------------------------------------------------- config

_RENAMED = {  # field of the published config.json -> field of GlmConfig
    "num_layers": "num_hidden_layers",
    "padded_vocab_size": "vocab_size",
    "ffn_hidden_size": "intermediate_size",
    "kv_channels": "head_dim",
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "multi_query_group_num": "num_key_value_heads",
    "add_qkv_bias": "attention_bias",
}
_REQUIRED = {  # field -> the only value that GlmForCausalLM's forward pass computes
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "pre_seq_len": None,
    "prefix_projection": False,
    "quantization_bit": 0,
    "rmsnorm": True,
}
_STATED = ("rmsnorm", "multi_query_attention", *_RENAMED)  # fields that a published config always states
_INERT = (  # fields without influence on what is computed
    "apply_query_key_layer_scaling",
    "attention_softmax_in_fp32",
    "auto_map",
    "bias_dropout_fusion",
    "classifier_dropout",
)
_FOREIGN = ("inner_hidden_size", "position_encoding_2d", "max_sequence_length")  # ChatGLM-6B of March 2023


@strict
class ChatGLM3Config(GlmConfig):
    """GlmConfig that also reads the published field names (``num_layers``, ``padded_vocab_size``, …).

    Raises:
        GlmlabError: the fields describe another architecture than ChatGLM2/3's (the first ChatGLM-6B,
            LayerNorm, attention without grouped keys and values, a pre-quantised checkpoint, …).

    Example:
        >>> from glmlab.core.resources import data_path
        >>> config = ChatGLM3Config.from_json_file(data_path("configs", "chatglm3-6b.json"))
        >>> config.num_hidden_layers, config.num_key_value_heads, config.vocab_size
        (28, 2, 65024)
    """

    model_type = MODEL_TYPE

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_other_architectures(kwargs)
        for name in (*_REQUIRED, *_INERT):
            kwargs.pop(name, None)
        for published_name, name in _RENAMED.items():
            if published_name in kwargs:
                setattr(self, name, kwargs.pop(published_name))
        rope_ratio = kwargs.pop("rope_ratio", 1)
        if not self.rope_parameters:  # type: ignore[has-type]
            self.rope_parameters = {
                "rope_type": "default",
                "rope_theta": 10000.0 * rope_ratio,
                "partial_rotary_factor": 0.5,
            }
        if self.eos_token_id is None:  # type: ignore[has-type]
            self.eos_token_id = 2  # else GlmConfig fills in the ids of GLM-4
        if self.pad_token_id is None or self.pad_token_id >= self.vocab_size:  # type: ignore[has-type]
            self.pad_token_id = 0  # GlmConfig's default is GLM-4's, beyond a smaller vocabulary
        super().__post_init__(**kwargs)


def _refuse_other_architectures(fields: dict[str, Any]) -> None:
    if foreign := [name for name in _FOREIGN if name in fields]:
        raise GlmlabError(
            f"config.json has {', '.join(foreign)}: this is the first ChatGLM-6B, not ChatGLM2 or ChatGLM3, "
            "whose blocks differ. Use a chatglm2-6b or chatglm3-6b checkpoint."
        )
    published = [name for name in (*_RENAMED, *_REQUIRED) if name in fields]
    missing = [name for name in _STATED if name not in fields]
    if published and missing:
        raise GlmlabError(
            f"config.json says {published[0]} but not {', '.join(missing)}: a ChatGLM2/3 config states all of "
            "them. Take config.json from the checkpoint's own repository."
        )
    for name, wanted in _REQUIRED.items():
        if fields.get(name, wanted) != wanted:
            raise GlmlabError(
                f"config.json says {name} = {fields[name]!r}, but ChatGLM3's forward pass has {name} = {wanted!r}: "
                "this is another architecture under model_type chatglm. Use an original, unquantised ChatGLM2 or "
                "ChatGLM3 checkpoint (precision='int4' quantises it on load)."
            )


# ----------------------------------------------------------------------------------------------------- model


class ChatGLM3RMSNorm(GlmRMSNorm):
    """RMSNorm in the published order: normalise and scale in fp32, then cast.

    GlmRMSNorm casts first and scales in the model's dtype; in bf16 and fp16 the two round differently.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:  # (batch, tokens, hidden)
        """Root-mean-square norm over the last axis; the dtype of the input is kept."""
        in_fp32 = hidden_states.to(torch.float32)
        variance = in_fp32.pow(2).mean(-1, keepdim=True)
        normed = in_fp32 * torch.rsqrt(variance + self.variance_epsilon)
        scaled: Tensor = self.weight * normed
        return scaled.to(hidden_states.dtype)


class ChatGLM3ForCausalLM(GlmForCausalLM):
    """GlmForCausalLM that loads ChatGLM2/3's published tensors and computes what the published code computed."""

    config_class = ChatGLM3Config
    config: ChatGLM3Config
    _keys_to_ignore_on_load_unexpected = (r"rotary_pos_emb\.inv_freq$",)

    def __init__(self, config: ChatGLM3Config) -> None:
        super().__init__(config)
        for name, module in list(self.named_modules()):
            if type(module) is GlmRMSNorm:
                self.set_submodule(name, ChatGLM3RMSNorm(config.hidden_size, eps=config.rms_norm_eps))


WEIGHT_MAPPING = [
    WeightRenaming(r"^transformer\.embedding\.word_embeddings", "model.embed_tokens"),
    WeightRenaming(r"^transformer\.encoder\.final_layernorm", "model.norm"),
    WeightRenaming(r"^transformer\.output_layer", "lm_head"),
    WeightRenaming(r"^transformer\.encoder\.layers\.", "model.layers."),
    WeightRenaming(r"self_attention\.dense\.", "self_attn.o_proj."),
    WeightRenaming(r"mlp\.dense_h_to_4h\.", "mlp.gate_up_proj."),
    WeightRenaming(r"mlp\.dense_4h_to_h\.", "mlp.down_proj."),
    *(
        WeightConverter(
            f"self_attention.query_key_value.{kind}",
            [f"self_attn.{projection}_proj.{kind}" for projection in "qkv"],
            [Split(dim=0)],
        )
        for kind in ("weight", "bias")
    ),
]
"""Published tensor names -> GlmForCausalLM's; the fused query_key_value is split into its three projections."""


# ------------------------------------------------------------------------------------------------- tokenizer

SPECIAL_TOKENS = (  # directly behind the sentencepiece pieces, in this order
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)

# A role token, the metadata and a newline, then the text. The blank before a text is the dummy prefix that
# sentencepiece puts before every text that is encoded alone, as the published code encodes each of them.
CHAT_TEMPLATE = (
    "[gMASK]sop"
    "{%- for message in messages -%}"
    "{%- set text = message['content'] or '' -%}"
    "{%- set listed = message['tools'] if message['tools'] is defined"
    " else (tools if loop.first and message['role'] == 'system' else none) -%}"
    "{%- if message['role'] == 'system' and listed is not none -%}"
    "{%- set text = text + '\n' + (listed | tojson(indent=4)) -%}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + (message['metadata'] or '') + '\n' -}}"
    "{{- ' ' + text if text else '' -}}"
    "{%- endfor -%}"
    "{{- '<|assistant|>' if add_generation_prompt else '' -}}"
)


def _merges(
    sentencepiece: SentencePieceProcessor, reachable: dict[str, int]
) -> Iterator[tuple[float, int, int, str, str]]:
    """Every pair of pieces that makes a piece, with sentencepiece's priority (score, then ids)."""
    for piece, piece_id in reachable.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in reachable and right in reachable:
                yield -sentencepiece.get_score(piece_id), reachable[left], reachable[right], left, right


def build_tokenizer_backend(model_file: str | os.PathLike[str]) -> Tokenizer:
    """A ``tokenizers`` BPE with the ids, the offsets and the byte fallback of a sentencepiece BPE model.

    Raises:
        GlmlabError: the file is not a sentencepiece model.
    """
    try:
        sentencepiece = SentencePieceProcessor(model_file=os.fspath(model_file))
    except (OSError, RuntimeError) as error:
        raise GlmlabError(
            f"{model_file} is not a sentencepiece model ({str(error).splitlines()[0]}). "
            "Download tokenizer.model of the checkpoint again."
        ) from error
    n_pieces = sentencepiece.vocab_size()
    vocab = {sentencepiece.id_to_piece(piece_id): piece_id for piece_id in range(n_pieces)}
    reachable = {  # control and byte pieces must never come out of a merge of text
        piece: piece_id
        for piece, piece_id in vocab.items()
        if not (
            sentencepiece.is_control(piece_id)
            or sentencepiece.is_unknown(piece_id)
            or sentencepiece.is_byte(piece_id)
            or sentencepiece.is_unused(piece_id)
        )
    }
    merges = [(left, right) for *_, left, right in sorted(_merges(sentencepiece, reachable))]
    vocab.update({token: n_pieces + offset for offset, token in enumerate(SPECIAL_TOKENS)})

    backend = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>", *SPECIAL_TOKENS)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[gMASK] sop $A",
        pair="[gMASK] sop $A $B </s>",
        special_tokens=[(token, vocab[token]) for token in ("[gMASK]", "sop", "</s>")],
    )
    return backend


class ChatGLMTokenizer(TokenizersBackend):
    """ChatGLM2/3's tokenizer; the name is the one that published tokenizer_config.json files give.

    A role token or [gMASK] inside a text stays ordinary text: special ids come from the chat builder
    (:func:`glmlab.prompts.encoding.encode_chat`) or from the chat template, never from what a user typed.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012 (transformers' own)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(self, **kwargs: Any) -> None:
        # what published tokenizer_config.json files say of these does not describe the sentencepiece model
        for name in ("remove_space", "do_lower_case", "auto_map", "encode_special_tokens"):
            kwargs.pop(name, None)
        kwargs.update(unk_token="<unk>", pad_token="<unk>", eos_token="</s>", padding_side="left")
        kwargs.update(clean_up_tokenization_spaces=False, split_special_tokens=True)
        kwargs["chat_template"] = CHAT_TEMPLATE  # what a checkpoint brings may cut a chat into other pieces
        super().__init__(**kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Keyword arguments with the backend built from ``tokenizer.model`` (transformers' loading hook)."""
        vocab_file = kwargs.get("vocab_file")
        if vocab_file is not None and Path(vocab_file).is_file():
            kwargs.pop("tokenizer_file", None)
            kwargs["tokenizer_object"] = build_tokenizer_backend(vocab_file)
        return kwargs

    def apply_chat_template(self, *args: Any, tokenizer_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """As in transformers; the role tokens that the template writes become role ids."""
        return super().apply_chat_template(
            *args, tokenizer_kwargs={"split_special_tokens": False, **(tokenizer_kwargs or {})}, **kwargs
        )


def _register() -> None:
    AutoConfig.register(MODEL_TYPE, ChatGLM3Config)
    AutoModelForCausalLM.register(ChatGLM3Config, ChatGLM3ForCausalLM)
    AutoTokenizer.register(ChatGLM3Config, tokenizer_class=ChatGLMTokenizer)
    register_checkpoint_conversion_mapping(MODEL_TYPE, WEIGHT_MAPPING)


_register()
