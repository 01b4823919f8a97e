"""Where a CUDA device allocates differently from the meta device: one table, each entry with its source and its size.

The meta device runs PyTorch's operations by shape alone. A GPU differs where a kernel allocates memory of its own, or
where one kernel replaces several operations. :data:`EFFECTS` lists what is modelled, :data:`NOT_MODELLED` what is left
out, with an upper bound.
"""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glmlab.core.units import MIB
from glmlab.tracing.recorder import META, AllocationRecorder, Rule
from glmlab.tracing.trace import FUSED_4BIT_ROWS, TraceSettings

aten = torch.ops.aten
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Effect(NamedTuple):
    """One difference between the meta device and a GPU: what happens, how many bytes, where that is written."""

    what: str
    size: str
    source: str


EFFECTS: dict[str, Effect] = {
    "cublas-workspace": Effect(
        "the first matrix product takes cuBLAS's workspace and keeps it; cuBLASLt shares it",
        "8,519,680 B (4096 KiB x 2 + 16 KiB x 8); 32 MiB on Hopper and Blackwell",
        "aten/src/ATen/cuda/CublasHandlePool.cpp, default workspace; torch/backends/cuda/__init__.py, "
        "blas_workspace_size",
    ),
    "fused-attention": Effect(
        "scaled_dot_product_attention is one kernel: it writes its output (and, as flash attention, the logsumexp) and "
        "no matrix of scores; fp32, Volta and Turing with grouped heads fall back to the unfused form",
        "batch x heads x tokens x head_dim elements; logsumexp 4 B x batch x heads x tokens",
        "aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (choice), attention.cu (outputs)",
    ),
    "attention-mask": Effect(
        "memory-efficient attention reads a mask of the query's dtype whose rows are padded to 16 columns",
        "a bool mask becomes batch x tokens x context elements; the padded copy is counted at its most: 15 columns "
        "more",
        "aten/src/ATen/native/transformers/attention.cpp, convert_boolean_attn_mask and pad_bias",
    ),
    "softmax-dtype": Effect(
        "softmax of fp16 with dtype=float32 is one kernel that reads fp16",
        "no fp32 copy of its input",
        "aten/src/ATen/native/SoftMax.cpp, softmax(input, dim, dtype)",
    ),
    "bnb-int8": Effect(
        "bitsandbytes looks for outliers in a copy of the absolute values, and forms int32 products before it scales "
        "them; no activation is taken for an outlier",
        "one activation in fp16 and one mask; 4 B a product",
        "bitsandbytes/backends/cuda/ops.py, int8_vectorwise_quant, int8_linear_matmul, int8_mm_dequant",
    ),
    "bnb-4bit-dequantise": Effect(
        "a product of more than 256 rows dequantises the 4-bit weight first (below, a fused kernel reads it; the exact "
        "limit depends on the GPU, 8 to 512 rows)",
        "the weight in the dtype of the computation",
        "bitsandbytes/backends/cuda/ops.py, gemm_4bit and _dequant_linear_fallback",
    ),
}
"""Modelled."""

NOT_MODELLED: dict[str, Effect] = {
    "flash-split-kv": Effect(
        "flash attention of one query token over a long context sums up in parts that it keeps in fp32",
        "at most 128 x batch x heads x (head_dim + 1) x 4 B, freed within the operation",
        "aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, set_params_splitkv",
    ),
    "reduction-scratch": Effect(
        "sums, argmax, sort and cumsum over many elements take scratch memory inside the kernel",
        "some KiB; 8 B a sorted element and more for sort",
        "aten/src/ATen/native/cuda/Reduce.cuh, Sort.cpp, ScanKernels.cpp",
    ),
    "int8-outliers": Effect(
        "activations above 6.0 are multiplied in fp16, in columns that only the data tell",
        "2 B x (tokens + output features) an outlier column",
        "bitsandbytes/backends/default/ops.py, int8_mixed_scaled_mm",
    ),
    "loader-threads": Effect(
        "four threads load the shards of a model that is not quantised: the order of its tensors varies a little",
        "none: all of them fit into the loader's warm-up block",
        "transformers/core_model_loading.py, GLOBAL_WORKERS; modeling_utils.py, caching_allocator_warmup",
    ),
}
"""Left out."""

CUBLAS_WORKSPACE_BYTES = 8_519_680
CUBLAS_WORKSPACE_BYTES_HOPPER = 32 * MIB


class DeviceRules:
    """The effects as rules of a recorder, for one GPU architecture."""

    def __init__(self, settings: TraceSettings) -> None:
        self.settings = settings
        self.workspace: int | None = None  # number of the workspace's allocation, once there is one
        self.functions: dict[str, Rule] = {"scaled_dot_product_attention": self._attention, "softmax": _softmax}
        """Rules by function of torch.nn.functional."""
        products = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
        self.operations: dict[Any, Rule] = dict.fromkeys(products, self._matmul)
        """Rules by ATen operation."""
        if settings.precision in ("int8", "int4"):
            import bitsandbytes  # noqa: F401 - takes a second or two, and registers the operations below

            library = torch.ops.bitsandbytes
            self.operations |= {
                library.int8_vectorwise_quant.default: _int8_quantise,
                library.int8_mixed_scaled_mm.default: _int8_product,
                library.gemm_4bit.default: self._product_4bit,
            }

    def begin_process(self, recorder: AllocationRecorder) -> None:
        """What follows stands for a fresh process: cuBLAS has no workspace yet."""
        if self.workspace is not None:
            recorder.free(self.workspace)
            self.workspace = None

    def _matmul(self, recorder: AllocationRecorder, func: Any, args: Args, kwargs: Kwargs) -> Any:
        if self.workspace is None and not recorder.paused and args[0].device.type == "meta":
            is_large = self.settings.architecture in ("hopper", "blackwell")
            n_bytes = CUBLAS_WORKSPACE_BYTES_HOPPER if is_large else CUBLAS_WORKSPACE_BYTES
            self.workspace = recorder.allocate(n_bytes, "cuBLAS workspace")
            recorder.owners[self.workspace] = "workspace"
        return NotImplemented

    def _attention(self, recorder: AllocationRecorder, func: Any, args: Args, kwargs: Kwargs) -> Any:
        """Output (batch, heads, tokens, head_dim), laid out as (batch, tokens, heads, head_dim)."""
        query, key = args[:2]
        if query.device.type != "meta":
            return NotImplemented
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        backend = self._backend(query, key, mask, bool(kwargs.get("enable_gqa", False)))
        if backend == "math":
            return NotImplemented
        batch, heads, tokens, head_dim = query.shape
        if heads % key.shape[1] or key.shape[0] != batch or key.shape[-1] != head_dim:
            raise ValueError(f"attention of {heads} query heads of {head_dim} over {key.shape[1]} of {key.shape[-1]}")
        if backend == "efficient" and mask is not None:
            mask = _efficient_mask(mask, query.dtype)
        output = torch.empty(batch, tokens, heads, head_dim, dtype=query.dtype, device=META)
        if backend == "flash":
            torch.empty(batch, heads, tokens, dtype=torch.float32, device=META)  # logsumexp, freed at once
        return output.transpose(1, 2)

    def _backend(self, query: Tensor, key: Tensor, mask: Tensor | None, grouped: bool) -> str:
        is_half = query.dtype in (torch.float16, torch.bfloat16)
        has_flash = self.settings.architecture not in ("volta", "turing")
        if has_flash and is_half and mask is None and query.shape[-1] <= 256:
            return "flash"
        return "math" if grouped and query.shape[1] != key.shape[1] else "efficient"

    def _product_4bit(self, recorder: AllocationRecorder, func: Any, args: Args, kwargs: Kwargs) -> Any:
        source, _, (out_features, in_features) = args[:3]
        rows = source.numel() // in_features
        # a trace holds for prompts of any length: the settings say whether its prefills dequantise
        is_prefill = rows > self.settings.batch
        dequantises = self.settings.dequantise_4bit if is_prefill else rows > FUSED_4BIT_ROWS
        if dequantises:
            weight = torch.empty(out_features, in_features, dtype=source.dtype, device=META)
            recorder.see(weight, "dequantize_4bit")
        output = torch.empty(*source.shape[:-1], out_features, dtype=source.dtype, device=META)
        recorder.see(output, "gemm_4bit")
        return output


def _int8_quantise(recorder: AllocationRecorder, func: Any, args: Args, kwargs: Kwargs) -> Any:
    source = args[0]
    threshold = kwargs.get("threshold", args[1] if len(args) > 1 else 0.0)
    scales = torch.empty(prod(source.shape[:-1]), dtype=torch.float32, device=META)
    recorder.see(scales, "int8_vectorwise_quant scales")
    rows = torch.empty(source.shape, dtype=torch.int8, device=META)
    recorder.see(rows, "int8_vectorwise_quant")
    if threshold == 0.0:
        return rows, scales, None
    n = source.numel()
    recorder.temporary("int8_vectorwise_quant outliers", n * source.element_size(), n)
    return rows, scales, torch.empty(0, dtype=torch.int64, device=META)


def _int8_product(recorder: AllocationRecorder, func: Any, args: Args, kwargs: Kwargs) -> Any:
    source, rows, weight = args[:3]
    shape = (*rows.shape[:-1], weight.shape[0])
    products = torch.empty(shape, dtype=torch.int32, device=META)
    recorder.see(products, "int8_linear_matmul")
    scaled = output = torch.empty(shape, dtype=torch.float16, device=META)
    recorder.see(scaled, "int8_mm_dequant")
    if source.dtype != scaled.dtype:
        output = torch.empty(shape, dtype=source.dtype, device=META)
        recorder.see(output, "int8_mm_dequant")
    return output, torch.empty(0, dtype=source.dtype, device=META)


def _softmax(recorder: AllocationRecorder, func: Any, args: Args, kwargs: Kwargs) -> Any:
    source = args[0]
    if source.device.type == "meta" and source.dtype == torch.float16 and kwargs.get("dtype") == torch.float32:
        return torch.empty(source.shape, dtype=torch.float32, device=META)
    return NotImplemented


def _efficient_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as memory-efficient attention reads it; its padding is counted at its most."""
    if mask.dtype == torch.bool:
        mask = torch.empty(mask.shape, dtype=dtype, device=META)
    return torch.empty(*mask.shape[:-1], mask.shape[-1] + 15, dtype=mask.dtype, device=META)
