"""Bytes of the KV cache: from a config alone, against what a cache really holds."""

import pytest
import torch
from transformers import DynamicCache

from glmlab import load_model
from glmlab.models.checkpoints import find_config, read_config_json
from glmlab.models.kv_cache import cache_dtype_bytes, kv_cache_bytes
from glmlab.models.loading import load_config


@pytest.mark.parametrize(
    ("name", "kib_per_token"),
    [("chatglm3-6b", 28), ("glm-4-9b-chat-hf", 40), ("qwen2.5-7b", 56), ("llama-2-7b", 512)],
)
def test_config_object_and_config_json_agree(name, kib_per_token):
    file = find_config(name)
    for config in (load_config(file), read_config_json(file)):
        assert kv_cache_bytes(config, tokens=1) == kib_per_token * 1024
        assert kv_cache_bytes(config, tokens=7, batch=3, dtype_bytes=4) == 2 * 21 * kib_per_token * 1024


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_is_what_a_cache_holds(precision):
    model = load_model("embedded", precision=precision, device="cpu").model
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.ones((2, 9), dtype=torch.long), past_key_values=cache)
    held_bytes = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    dtype_bytes = cache_dtype_bytes(model.config, precision, "cpu")
    assert held_bytes == kv_cache_bytes(model.config, tokens=9, batch=2, dtype_bytes=dtype_bytes)


def test_a_dict_has_a_dtype_too():
    config = read_config_json(find_config("chatglm3-6b"))
    assert [cache_dtype_bytes(config, precision) for precision in ("fp32", "bf16", "int8", "int4")] == [4, 2, 2, 2]
