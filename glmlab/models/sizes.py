"""Bytes of a model by component: predicted from its skeleton for a precision, or measured on a loaded model.

Quantisation by bitsandbytes replaces every linear layer but the head:

    int8   one byte a weight; one fp32 scale a row                         (LLM.int8, row-wise absmax)
    int4   half a byte a weight; one fp32 scale per 64 weights, and per layer the 16 fp32 code values of nf4
"""

import torch
from torch import nn

from glmlab.core.errors import GlmlabError

FLOAT_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions that are a dtype."""

PRECISIONS = (*FLOAT_PRECISIONS, "int8", "int4")
"""Every precision that a model can be loaded in."""

COMPONENTS = ("embedding", "attention", "MLP", "norms", "head", "quantisation state", "other")
"""Where a model's bytes can be; ``other`` holds rotary tables and whatever has no name among the rest."""

BLOCK_4BIT = 64
"""Weights that share one scale in int4."""

_NF4_CODE_BYTES = 16 * 4


def component_of(module_name: str) -> str:
    """Name the component that a module's own parameters belong to, from its path in the module tree.

    Example:
        >>> component_of("model.layers.0.self_attn.q_proj"), component_of("model.norm"), component_of("lm_head")
        ('attention', 'norms', 'head')
    """
    parts = module_name.lower().split(".")
    if "norm" in parts[-1] or parts[-1].startswith("ln_"):
        return "norms"
    for part in parts:
        if "attn" in part or "attention" in part:
            return "attention"
        if part in ("mlp", "feed_forward", "ffn"):
            return "MLP"
    if "emb" in parts[-1] or parts[-1] in ("wte", "wpe"):
        return "other" if "rotary" in parts[-1] else "embedding"
    return "head" if "head" in parts[-1] else "other"


def quantized_linears(skeleton: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers that int8 and int4 quantise: all but the head."""
    head = skeleton.get_output_embeddings()  # type: ignore[operator]
    return [
        (name, module)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]


def predict_bytes(skeleton: nn.Module, precision: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by component of a model that is not loaded.

    Args:
        skeleton: the model on the meta device.
        precision: one of :data:`PRECISIONS`.
        dtype: dtype of everything that is not quantised.

    Raises:
        GlmlabError: an unknown precision.

    Example:
        >>> from glmlab.models.checkpoints import find_config
        >>> from glmlab.models.loading import build_skeleton, load_config
        >>> skeleton = build_skeleton(load_config(find_config("chatglm3-6b")))
        >>> predict_bytes(skeleton, "fp16", torch.float16)["attention"]
        1996746752
    """
    if precision not in PRECISIONS:
        raise GlmlabError(f"precision {precision!r} is not known. Use one of {', '.join(PRECISIONS)}.")
    quantized = {} if precision in FLOAT_PRECISIONS else dict(quantized_linears(skeleton))
    sizes = dict.fromkeys(COMPONENTS, 0)
    seen: set[int] = set()
    for name, module in skeleton.named_modules():
        for key, tensor in own_tensors(module):
            if id(tensor) in seen:  # tied weights are stored once
                continue
            seen.add(id(tensor))
            if name in quantized and key == "weight":
                weight_bytes, state_bytes = _quantized_bytes(quantized[name], precision)
                sizes[component_of(name)] += weight_bytes
                sizes["quantisation state"] += state_bytes
            else:
                is_weight = key in module._parameters
                sizes[component_of(name)] += tensor.numel() * (dtype.itemsize if is_weight else tensor.element_size())
    return sizes


def measure_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes by component of a loaded model, from the tensors that it holds.

    Example:
        >>> from glmlab import load_model
        >>> sum(measure_bytes(load_model("embedded", precision="fp32", device="cpu").model).values()) > 9_000_000
        True
    """
    sizes = dict.fromkeys(COMPONENTS, 0)
    seen: set[int] = set()
    for name, module in model.named_modules():
        for _, tensor in own_tensors(module):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            sizes[component_of(name)] += tensor.numel() * tensor.element_size()
            sizes["quantisation state"] += sum(
                state.numel() * state.element_size() for state in quantisation_state_of(module, tensor)
            )
    return sizes


def own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the parameters and buffers of a module itself, by name, without those of its children."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(name, tensor) for name, tensor in own if tensor is not None]


def _quantized_bytes(linear: nn.Linear, precision: str) -> tuple[int, int]:
    """Bytes of the quantised weight and of its quantisation state."""
    weights = linear.in_features * linear.out_features
    if precision == "int8":
        return weights, 4 * linear.out_features
    return weights // 2, 4 * (weights // BLOCK_4BIT) + _NF4_CODE_BYTES


def quantisation_state_of(module: nn.Module, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return what bitsandbytes keeps beside a quantised weight: absmax and code (int4), row scales (int8).

    The row scales of int8 move from the weight to the module's ``state`` in the first forward pass.
    """
    if (state := getattr(tensor, "quant_state", None)) is not None:
        return [state.absmax, state.code]
    if tensor is not getattr(module, "weight", None):  # a bias has none, but its module does
        return []
    row_scales = [getattr(owner, "SCB", None) for owner in (tensor, getattr(module, "state", None))]
    return [scales for scales in row_scales if isinstance(scales, torch.Tensor)][:1]
