"""ChatGLM3 in transformers: numbers, ids and refusals against what the published code gives."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from glmlab.core.errors import GlmlabError
from glmlab.core.resources import data_path
from glmlab.models.chatglm3 import (
    SPECIAL_TOKENS,
    ChatGLM3Config,
    ChatGLM3ForCausalLM,
    ChatGLM3RMSNorm,
    ChatGLMTokenizer,
    build_tokenizer_backend,
)
from glmlab.models.loading import load_config


@pytest.fixture(scope="module")
def reference(shared_data: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint in the original naming, and what the original code computes from it in fp32."""
    folder = shared_data / "reference-checkpoint"
    with np.load(folder / "expected.npz", allow_pickle=False) as arrays:
        return folder, {name: torch.tensor(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="module")
def published_tokenizer(shared_data: Path) -> tuple[ChatGLMTokenizer, SentencePieceProcessor]:
    model_file = shared_data / "chatglm3-tokenizer" / "tokenizer.model"
    backend = build_tokenizer_backend(model_file)
    return ChatGLMTokenizer(tokenizer_object=backend), SentencePieceProcessor(model_file=str(model_file))


def _load(folder: Path, attention: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


# Recorded logits were computed by another processor: its order of additions differs, by some 5e-6 in fp32.
TOLERANCE = 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
class TestAgainstTheOriginalCode:
    def test_prefill(self, reference, attention):
        folder, expected = reference
        with torch.no_grad():
            logits = _load(folder, attention)(expected["input_ids"]).logits
        assert (logits - expected["prefill_logits"]).abs().max() <= TOLERANCE

    def test_cached_decode(self, reference, attention):
        folder, expected = reference
        ids = expected["input_ids"]
        model = _load(folder, attention)
        steps = []
        with torch.no_grad():
            cache = model(ids[:, :40], use_cache=True).past_key_values
            for position in range(40, ids.shape[1]):
                outputs = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
                steps.append(outputs.logits[:, -1])
        assert (torch.stack(steps, 1) - expected["decode_logits_from_40"]).abs().max() <= TOLERANCE

    def test_left_padded_batch(self, reference, attention):
        folder, expected = reference
        mask = expected["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            model = _load(folder, attention)
            logits = model(expected["input_ids"], attention_mask=mask, position_ids=positions).logits
        difference = (logits - expected["left_padded_logits"]).abs().amax(-1)
        assert (difference * mask).max() <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_scales_before_it_casts(dtype):
    norm = ChatGLM3RMSNorm(64, eps=1e-5).to(dtype)
    norm.weight.data.normal_(1.0, 0.3)
    hidden = torch.randn(5, 64, dtype=dtype)
    in_fp32 = hidden.float()
    rms = torch.rsqrt(in_fp32.pow(2).mean(-1, keepdim=True) + 1e-5)
    original_order = (norm.weight.float() * (in_fp32 * rms)).to(dtype)
    cast_first = norm.weight * (in_fp32 * rms).to(dtype)
    assert torch.equal(norm(hidden), original_order)
    assert not torch.equal(norm(hidden), cast_first)


def test_every_norm_of_the_model_is_the_published_one(embedded):
    norms = [module for name, module in embedded.model.named_modules() if name.endswith("norm")]
    assert len(norms) == 2 * embedded.model.config.num_hidden_layers + 1
    assert all(type(norm) is ChatGLM3RMSNorm for norm in norms)


def test_a_folder_as_published_needs_no_remote_code(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "ChatGLMTokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}})
    )
    (checkpoint / "evil.py").write_text("raise SystemExit('executed')")
    assert isinstance(AutoConfig.from_pretrained(checkpoint), ChatGLM3Config)
    assert isinstance(AutoTokenizer.from_pretrained(checkpoint), ChatGLMTokenizer)
    assert isinstance(AutoModelForCausalLM.from_pretrained(checkpoint), ChatGLM3ForCausalLM)


def test_saving_and_loading_keeps_weights_and_published_names(embedded, tmp_path):
    embedded.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, tensor in embedded.model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


class TestConfig:
    def published(self, **changes: Any) -> dict[str, Any]:
        fields = json.loads(data_path("configs", "chatglm3-6b.json").read_text())
        return {**fields, **changes}

    def test_published_names_become_transformers_names(self):
        config = ChatGLM3Config(**self.published(rope_ratio=50))
        assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (28, 2, 128)
        assert (config.max_position_embeddings, config.eos_token_id) == (8192, 2)
        assert config.rope_parameters["rope_theta"] == 500_000.0
        assert config.rope_parameters["partial_rotary_factor"] == 0.5

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            *(
                ({field: value}, f"config.json says {field} = {value!r}, but ChatGLM3's forward pass has")
                for field, value in {
                    "rmsnorm": False, "multi_query_attention": False, "post_layer_norm": False, "add_bias_linear": True,
                    "quantization_bit": 4, "pre_seq_len": 128, "apply_residual_connection_post_layernorm": True,
                }.items()
            ),
            ({"inner_hidden_size": 16384, "position_encoding_2d": True}, "this is the first ChatGLM-6B"),
            ({"kv_channels": None}, "but not kv_channels: a ChatGLM2/3 config states all of them"),
        ],
    )  # fmt: skip
    def test_another_architecture_is_refused(self, changes, message):
        fields = self.published(**changes)
        if fields["kv_channels"] is None:
            del fields["kv_channels"]
        with pytest.raises(GlmlabError, match=message):
            load_config(fields)


class TestTokenizer:
    def test_special_tokens_follow_the_pieces(self, embedded):
        tokenizer = embedded.tokenizer
        first = len(tokenizer) - len(SPECIAL_TOKENS)
        assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(first, len(tokenizer)))

    def test_plain_text_as_the_original(self, published_tokenizer, shared_data):
        golden = json.loads((shared_data / "chatglm3-tokenizer" / "golden.json").read_text())
        for example in golden["plain"]:
            assert published_tokenizer[0](example["text"])["input_ids"] == example["ids"]

    def test_ids_equal_sentencepiece_on_random_unicode(self, published_tokenizer):
        tokenizer, sentencepiece = published_tokenizer
        rng = random.Random(0)
        ranges = [(32, 126), (0x4E00, 0x9FFF), (1, 0xD7FF), (0xE000, 0x10FFFF), (32, 32), (10, 10)]
        texts = [
            "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randrange(1, 40))) for _ in range(3000)
        ]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert ids == sentencepiece.encode(texts)

    def test_offsets_tile_the_text(self, embedded):
        text = "Hello 👋 世界 <|user|>"
        encoding = embedded.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        covered = "".join(
            text[start:end]
            for (start, end), before in zip(
                encoding["offset_mapping"], [(0, 0), *encoding["offset_mapping"]], strict=False
            )
            if (start, end) != before
        )
        assert covered == text

    def test_padding_is_on_the_left(self, embedded):
        batch = embedded.tokenizer(["a", "a longer text"], padding=True)
        assert batch["attention_mask"][0][0] == 0
        assert batch["attention_mask"][0][-1] == 1

    def test_saved_tokenizer_loads_again(self, embedded, tmp_path):
        embedded.tokenizer.save_pretrained(tmp_path)
        shutil.copy(data_path("tiny-chatglm3", "config.json"), tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        text = "你好 <|assistant|> [gMASK]"
        assert again(text)["input_ids"] == embedded.tokenizer(text)["input_ids"]
