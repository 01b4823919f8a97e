"""Where a model goes and how small it must be: device, precision, and the memory that is free there."""

from typing import Any

import torch
from torch import nn

from glmlab.core.errors import GlmlabError
from glmlab.core.units import MIB, format_bytes
from glmlab.models.sizes import BLOCK_4BIT, FLOAT_PRECISIONS, predict_bytes, quantized_linears

WORKING_BYTES = 128 * MIB
"""Activations and loading buffers that a load needs beside the weights."""


class LoadError(GlmlabError):
    """A model cannot be loaded as asked; the text says what is wrong and what to ask for instead."""


def find_device(device: str) -> torch.device:
    """Return the device of a name: "cpu", "cuda", "cuda:1", or "auto" for the first GPU, else the CPU.

    Raises:
        LoadError: an unknown name, or a GPU that is not there.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise LoadError(f"device={device!r} is not known. Use 'auto', 'cpu', 'cuda' or 'cuda:0'.") from error
    if target.type not in ("cpu", "cuda"):
        raise LoadError(f"device={device!r} is not supported: the suite measures CUDA GPUs and the CPU.")
    if target.type == "cuda":
        n_gpus = torch.cuda.device_count()
        if not torch.cuda.is_available() or n_gpus == 0:
            raise LoadError(
                f"device={device!r}, but this PyTorch ({torch.__version__}) sees no CUDA GPU. Use device='cpu', or "
                "check the driver with nvidia-smi and install a CUDA build of PyTorch; 'glmlab doctor' tells more."
            )
        if (target.index or 0) >= n_gpus:
            raise LoadError(f"device={device!r}, but there are {n_gpus} GPUs: use cuda:0 to cuda:{n_gpus - 1}.")
        return torch.device("cuda", target.index or 0)
    return torch.device("cpu")


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
    if precision == "int4" and device.type == "cpu":
        return torch.float32
    return _half_dtype(config)


def _half_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None)  # a dict has none
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def free_bytes(device: torch.device) -> int:
    """Memory that a device has free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def precision_ladder(skeleton: nn.Module, device: torch.device) -> list[str]:
    """Precisions from the largest to the smallest that make sense on a device: fp32 on the CPU only, int4 where it can.

    Example:
        >>> from glmlab.models.checkpoints import find_config
        >>> from glmlab.models.loading import build_skeleton, load_config
        >>> skeleton = build_skeleton(load_config(find_config("embedded")))
        >>> precision_ladder(skeleton, torch.device("cpu"))
        ['fp32', 'bf16', 'int8', 'int4']
    """
    ladder = ["fp32", "bf16"] if device.type == "cpu" else [dtype_name(_half_dtype(skeleton.config))]
    return [*ladder, "int8"] if _misfits_for_4bit(skeleton) else [*ladder, "int8", "int4"]


def refuse_misfit(name: str, skeleton: nn.Module, precision: str) -> None:
    """Refuse int4 for a model whose layers bitsandbytes cannot cut into blocks; :class:`LoadError` names one."""
    if precision == "int4" and (misfits := _misfits_for_4bit(skeleton)):
        raise LoadError(
            f"{name} cannot be loaded in int4: {misfits[0]} input features, and bitsandbytes quantises in "
            f"blocks of {BLOCK_4BIT}. Use precision='int8'."
        )


def choose_precision(name: str, skeleton: nn.Module, asked: str, device: torch.device) -> str:
    """The asked precision, or for auto the first of the ladder that fits; refuses what does not fit.

    Raises:
        LoadError: int4 for a model that cannot have it; too little free memory, with what would fit.
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
        mend = (
            f"precision='{fitting[0]}' needs {format_bytes(need_bytes(fitting[0]))} and would fit."
            if fitting
            else f"No precision fits: {ladder[-1]} needs {format_bytes(need_bytes(ladder[-1]))}. Free memory, "
            "or use a smaller model."
        )
        raise LoadError(
            f"{name} in {chosen} needs {format_bytes(need_bytes(chosen))}, but {device} has "
            f"{format_bytes(available_bytes)} free. {mend}"
        )
    return chosen


def _misfits_for_4bit(skeleton: nn.Module) -> list[str]:
    return [
        f"{name} has {linear.in_features}"
        for name, linear in quantized_linears(skeleton)
        if linear.in_features % BLOCK_4BIT
    ]
