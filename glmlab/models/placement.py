"""Device and precision of a model: what fits there, bytes by component, random weights made in place.

bitsandbytes quantises every linear layer but the head:

    int8   one byte a weight; one fp32 scale a row                         (LLM.int8, row-wise absmax)
    int4   half a byte a weight; one fp32 scale per 64 weights, and per layer the 16 fp32 code values of nf4
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from glmlab.core.errors import GlmlabError
from glmlab.core.units import MIB, format_bytes

FLOAT_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions that are a dtype."""

PRECISIONS = (*FLOAT_PRECISIONS, "int8", "int4")
"""Every precision that a model can be loaded in."""

COMPONENTS = ("embedding", "attention", "MLP", "norms", "head", "quantisation state", "other")
"""Where a model's bytes can be; ``other`` holds rotary tables and whatever has no name among the rest."""

BLOCK_4BIT = 64
"""Weights that share one scale in int4."""

WORKING_BYTES = 128 * MIB
"""Activations and loading buffers that a load needs beside the weights."""

_NF4_CODE_BYTES = 16 * 4


# ----------------------------------------------------------------------------------------- device and precision


def find_device(device: str) -> torch.device:
    """Return the device of a name: "cpu", "cuda", "cuda:1", or "auto" for the first GPU, else the CPU.

    Raises:
        GlmlabError: an unknown name, or a GPU that is not there.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise GlmlabError(f"device={device!r} is not known. Use 'auto', 'cpu', 'cuda' or 'cuda:0'.") from error
    if target.type == "cpu":
        return torch.device("cpu")
    if target.type != "cuda":
        raise GlmlabError(f"device={device!r} is not supported: the suite measures CUDA GPUs and the CPU.")
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_gpus == 0:
        raise GlmlabError(
            f"device={device!r}, but this PyTorch ({torch.__version__}) sees no CUDA GPU. Use device='cpu', or "
            "check the driver with nvidia-smi and install a CUDA build of PyTorch; 'glmlab doctor' tells more."
        )
    if (target.index or 0) >= n_gpus:
        raise GlmlabError(f"device={device!r}, but there are {n_gpus} GPUs: use cuda:0 to cuda:{n_gpus - 1}.")
    return torch.device("cuda", target.index or 0)


def check_precision(precision: str, *, or_auto: bool = False) -> None:
    """GlmlabError for a precision that is not one of :data:`PRECISIONS`."""
    if precision not in PRECISIONS and not (or_auto and precision == "auto"):
        known = ", ".join(PRECISIONS) + (", or auto" if or_auto else "")
        raise GlmlabError(f"precision={precision!r} is not known. Use one of {known}.")


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a float dtype as a precision: fp32, bf16 or fp16."""
    return next(name for name, float_dtype in FLOAT_PRECISIONS.items() if float_dtype == dtype)


def dtype_beside(config: Any, precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of everything that is not quantised.

    Beside quantised layers it is the checkpoint's own half precision, but fp32 beside int4 on a CPU, whose kernels
    compute in fp32 anyway; LLM.int8 takes half precision inputs only.
    """
    if precision in FLOAT_PRECISIONS:
        return FLOAT_PRECISIONS[precision]
    return torch.float32 if precision == "int4" and device.type == "cpu" else _half_dtype(config)


def _half_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None)  # a dict has none
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def precision_ladder(skeleton: nn.Module, device: torch.device) -> list[str]:
    """Precisions from the largest to the smallest that make sense on a device; fp32 on the CPU only."""
    ladder = ["fp32", "bf16"] if device.type == "cpu" else [dtype_name(_half_dtype(skeleton.config))]
    return [*ladder, "int8"] if _misfits_for_4bit(skeleton) else [*ladder, "int8", "int4"]


def refuse_misfit(name: str, skeleton: nn.Module, precision: str) -> None:
    """GlmlabError for int4 of a model whose layers bitsandbytes cannot cut into blocks; it names one."""
    if precision == "int4" and (misfits := _misfits_for_4bit(skeleton)):
        raise GlmlabError(
            f"{name} cannot be loaded in int4: {misfits[0]} input features, and bitsandbytes quantises in "
            f"blocks of {BLOCK_4BIT}. Use precision='int8'."
        )


def _misfits_for_4bit(skeleton: nn.Module) -> list[str]:
    linears = quantized_linears(skeleton)
    return [f"{name} has {linear.in_features}" for name, linear in linears if linear.in_features % BLOCK_4BIT]


def choose_precision(name: str, skeleton: nn.Module, asked: str, device: torch.device) -> str:
    """Return the asked precision, or for "auto" the first of the ladder that fits; refuse what does not fit.

    Raises:
        GlmlabError: int4 for a model that cannot have it; too little free memory, with what would fit.
    """
    refuse_misfit(name, skeleton, asked)
    ladder = precision_ladder(skeleton, device)
    available_bytes = free_bytes(device)

    def need_bytes(precision: str) -> int:
        weights = predict_bytes(skeleton, precision, dtype_beside(skeleton.config, precision, device))
        return sum(weights.values()) + WORKING_BYTES

    fitting = [precision for precision in ladder if need_bytes(precision) <= available_bytes]
    chosen = (fitting[0] if fitting else ladder[-1]) if asked == "auto" else asked
    if need_bytes(chosen) > available_bytes:
        instead = (
            f"precision='{fitting[0]}' needs {format_bytes(need_bytes(fitting[0]))} and would fit."
            if fitting
            else f"No precision fits: {ladder[-1]} needs {format_bytes(need_bytes(ladder[-1]))}. Free memory, "
            "or use a smaller model."
        )
        raise GlmlabError(
            f"{name} in {chosen} needs {format_bytes(need_bytes(chosen))}, but {device} has "
            f"{format_bytes(available_bytes)} free. {instead}"
        )
    return chosen


def free_bytes(device: torch.device) -> int:
    """Memory that a device has free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use so many CPU threads while the context lasts; None changes nothing."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------ bytes by component


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
    modules = skeleton.named_modules()
    return [(name, module) for name, module in modules if isinstance(module, nn.Linear) and module is not head]


def predict_bytes(skeleton: nn.Module, precision: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by component of a model that is not loaded.

    Args:
        skeleton: the model on the meta device.
        precision: one of :data:`PRECISIONS`.
        dtype: dtype of everything that is not quantised.

    Example:
        >>> from glmlab.models.checkpoints import find_config
        >>> from glmlab.models.loading import build_skeleton, load_config
        >>> skeleton = build_skeleton(load_config(find_config("chatglm3-6b")))
        >>> predict_bytes(skeleton, "fp16", torch.float16)["attention"]
        1996746752
    """
    check_precision(precision)
    quantized = {} if precision in FLOAT_PRECISIONS else dict(quantized_linears(skeleton))
    sizes = dict.fromkeys(COMPONENTS, 0)
    for name, module, key, tensor in _stored_tensors(skeleton):
        n_bytes = tensor.numel() * (dtype.itemsize if key in module._parameters else tensor.element_size())
        if name in quantized and key == "weight":
            n_bytes = tensor.numel() if precision == "int8" else tensor.numel() // 2
            scales = tensor.shape[0] if precision == "int8" else tensor.numel() // BLOCK_4BIT
            sizes["quantisation state"] += 4 * scales + (0 if precision == "int8" else _NF4_CODE_BYTES)
        sizes[component_of(name)] += n_bytes
    return sizes


def measure_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes by component of a loaded model, from the tensors that it holds.

    Example:
        >>> from glmlab import load_model
        >>> sum(measure_bytes(load_model("embedded", precision="fp32", device="cpu").model).values()) > 9_000_000
        True
    """
    sizes = dict.fromkeys(COMPONENTS, 0)
    for name, module, _, tensor in _stored_tensors(model):
        sizes[component_of(name)] += tensor.nbytes
        sizes["quantisation state"] += sum(state.nbytes for state in quantisation_state_of(module, tensor))
    return sizes


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """(module's path, module, key, tensor) of every tensor; tied weights are stored once."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        for key, tensor in own_tensors(module):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, module, key, tensor


def own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the parameters and buffers of a module itself, by name, without those of its children."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


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


# ------------------------------------------------------------------------------------ quantising, random weights


def quantization_config_of(precision: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return how bitsandbytes quantises for a precision; None for one that is a dtype."""
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if precision == "int4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return None


def build_random(config: Any, precision: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a model with random weights in a precision, built from the config straight on the device."""
    if precision in FLOAT_PRECISIONS:
        return build_random_float(config, dtype, device)
    return fill_random_quantised(quantised_skeleton(config, precision, dtype), config, dtype, device)


def build_random_float(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a model with random weights in a float precision, every tensor made on the device."""
    with _seeded(device), device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def quantised_skeleton(config: Any, precision: str, dtype: torch.dtype) -> Any:
    """Return the model on the meta device, its linear layers but the head replaced by those of bitsandbytes."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    kept = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    replace_with_bnb_linear(
        model, modules_to_not_convert=kept, quantization_config=quantization_config_of(precision, dtype)
    )
    return model


def fill_random_quantised(model: Any, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Give a :func:`quantised_skeleton` random weights on the device, one layer in 16 bits at a time."""
    import bitsandbytes

    with _seeded(device):
        for module in list(model.modules()):
            for key, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                if values.ndim == 1:
                    values.fill_(1.0)  # norms and biases of one, so that nothing becomes NaN
                else:
                    values.normal_(0.0, config.initializer_range)
                if isinstance(parameter, bitsandbytes.nn.Params4bit):
                    module._parameters[key] = bitsandbytes.nn.Params4bit(
                        values, requires_grad=False, quant_type="nf4", compress_statistics=False, module=module
                    ).to(device)
                elif isinstance(parameter, bitsandbytes.nn.Int8Params):
                    module._parameters[key] = quantised_int8(values)
                else:
                    module._parameters[key] = nn.Parameter(values, requires_grad=False)
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # rotary tables are computed, not loaded
            with device:
                model.set_submodule(name, type(module)(config=config))
    model.tie_weights()
    return model.eval()


def quantised_int8(weight: torch.Tensor) -> Any:
    """Quantise a weight where it lies; ``Int8Params.to`` would do so only on the way from the CPU to a GPU."""
    import bitsandbytes

    rows, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.to(torch.float16))
    return bitsandbytes.nn.Int8Params(rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scales)


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers each time; the caller's generator goes on where it was."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
    generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    before = generator.get_state()
    generator.manual_seed(0)
    try:
        yield
    finally:
        generator.set_state(before)
