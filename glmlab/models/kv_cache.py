"""How many bytes the KV cache takes: the one home of the formula."""

from typing import Any

_NAMES = {  # field -> its names in transformers' configs and in ChatGLM's published config.json
    "layers": ("num_hidden_layers", "num_layers"),
    "kv_heads": ("num_key_value_heads", "multi_query_group_num", "num_attention_heads"),
    "head_dim": ("head_dim", "kv_channels"),
}


def kv_cache_bytes(config: Any, *, tokens: int, batch: int = 1, dtype_bytes: int = 2) -> int:
    """Bytes that keys and values hold once ``tokens`` are cached (payload: no rounding, no copies during growth).

    ``2 * layers * kv_heads * head_dim * dtype_bytes * batch * tokens``

    Args:
        config: transformers' config object, or a dict as in config.json, with ChatGLM's own field names too.
        tokens: context length.
        batch: sequences at a time.
        dtype_bytes: bytes of one number; :func:`cache_dtype_bytes` knows them for a precision.

    Example:
        >>> from glmlab.models.checkpoints import find_config
        >>> from glmlab.models.loading import load_config
        >>> kv_cache_bytes(load_config(find_config("chatglm3-6b")), tokens=1)  # 28 layers, 2 KV heads of 128, 16 bits
        28672
    """
    layers, kv_heads = _field(config, "layers"), _field(config, "kv_heads")
    head_dim = _field(config, "head_dim") or _value(config, "hidden_size") // _value(config, "num_attention_heads")
    return int(2 * layers * kv_heads * head_dim * dtype_bytes * batch * tokens)


def cache_dtype_bytes(config: Any, precision: str, device: str = "cuda") -> int:
    """Bytes of one number of the KV cache: keys and values have the dtype in which the model computes.

    Example:
        >>> from glmlab.models.checkpoints import find_config
        >>> from glmlab.models.loading import load_config
        >>> config = load_config(find_config("chatglm3-6b"))
        >>> [cache_dtype_bytes(config, precision) for precision in ("fp32", "fp16", "int4")]
        [4, 2, 2]
    """
    import torch

    from glmlab.models.placement import dtype_beside

    return dtype_beside(config, precision, torch.device(device)).itemsize


def _field(config: Any, field: str) -> Any:
    return next((value for name in _NAMES[field] if (value := _value(config, name)) is not None), None)


def _value(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)
