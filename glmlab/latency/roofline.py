"""The floor under a decode step: no device makes a token faster than it can read what the token needs.

A token of one sequence reads every weight once (of the embedding table one row), reads the keys and values of all
tokens before it, and writes its own; each weight takes part in one multiplication and one addition. Bytes over
bandwidth and operations over peak rate are two times that run side by side; the floor is the larger one. With one
sequence that is nearly always the bytes.

Bandwidth and peak rate are a card's published figures (``data/gpus.csv``) or are measured on this machine.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import numpy as np
import pandas as pd
import torch

from glmlab.core.cards import find_card
from glmlab.core.units import MIB, mib
from glmlab.latency.measure import LatencyError
from glmlab.models.kv_cache import kv_cache_bytes
from glmlab.models.loading import build_skeleton
from glmlab.models.placement import cpu_threads, dtype_beside, find_device, predict_bytes

LARGE_BYTES = 256 * MIB
"""A block that outgrows the caches of CPUs and GPUs."""

_REPETITIONS = 7
_LEAST_S = 0.2  # long enough that other work on the machine does not slow every run
_ELEMENT_BYTES = 4  # of fp32, in which blocks are copied and summed
_MATRIX = 1024  # side of the square matrices whose product measures the peak rate


@dataclass(frozen=True)
class Rates:
    """How fast a device moves bytes and computes."""

    device: str
    bandwidth_bytes_per_s: float
    flops_per_s: float | None
    """Multiplications and additions a second; None if unknown."""
    source: str
    """Where the two figures come from."""


def card_rates(name: str) -> Rates:
    """Published figures of a card; the peak rate is that of fp16 matrix products.

    Raises:
        CardError: no such card.
        LatencyError: the card's bandwidth is not in data/gpus.csv.

    Example:
        >>> card_rates("RTX 4060 Laptop").bandwidth_bytes_per_s / 1e9
        256.0
    """
    card = find_card(name)
    if card.bandwidth_bytes_per_s is None:
        raise LatencyError(f"data/gpus.csv has no bandwidth of {card.name}. Add bandwidth_bytes_per_s and its source.")
    return Rates(card.name, card.bandwidth_bytes_per_s, card.fp16_flops_per_s, card.source)


def measure_rates(
    device: "str | torch.device" = "cpu", *, block_bytes: int = LARGE_BYTES, threads: int | None = None
) -> Rates:
    """Measure a device; the best of several runs counts, since a floor needs the most that it can do.

    The bandwidth is the better of a copy (read and written, as the STREAM benchmark and data sheets count) and of a
    sum, which only reads, as a decode step nearly does. The peak rate is that of the faster dtype of fp32 and bf16.

    Args:
        device: "cpu" or a CUDA device.
        block_bytes: bytes that are read at a time. The default outgrows the caches; a block as large as what one token
            reads includes them, as a small model does.
        threads: of the CPU, such as ``loaded.threads``; None: as many as torch is set to.

    Raises:
        GlmlabError: no such device on this machine, or a block without bytes.

    Example:
        >>> rates = measure_rates("cpu", block_bytes=2**20)
        >>> rates.bandwidth_bytes_per_s > 1e6 and rates.flops_per_s > 1e6
        True
    """
    device = find_device(str(device))
    if block_bytes < _ELEMENT_BYTES:
        raise LatencyError(f"block_bytes={block_bytes} moves nothing. Give at least {_ELEMENT_BYTES}, better some MiB.")
    source = torch.ones(block_bytes // _ELEMENT_BYTES, device=device)
    target = torch.empty_like(source)
    n_bytes = source.numel() * _ELEMENT_BYTES
    flops = []
    with cpu_threads(threads):
        copied = 2 * n_bytes / _fastest_s(lambda: target.copy_(source), device)
        read = n_bytes / _fastest_s(source.sum, device)
        for dtype in (torch.float32, torch.bfloat16):
            matrix = torch.ones(_MATRIX, _MATRIX, device=device, dtype=dtype)
            flops.append(2 * _MATRIX**3 / _fastest_s(partial(torch.matmul, matrix, matrix), device))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    how = f"measured: a block of {mib(block_bytes):.1f} MiB copied and read, a product of {_MATRIX} x {_MATRIX}"
    return Rates(name, max(copied, read), max(flops), how)


def _fastest_s(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest run; on a GPU between two CUDA events, so that launching does not count."""
    run()  # warm up
    seconds: list[float] = []
    while len(seconds) < _REPETITIONS or sum(seconds) < _LEAST_S:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
    return min(seconds)


def roofline(
    config: Any, rates: Rates, *, precision: str, contexts: Sequence[int], dtype: torch.dtype | None = None
) -> pd.DataFrame:
    """Compute the least time of a decode step at several context lengths; batch of one, nothing is measured.

    Bytes: the weights, and :func:`~glmlab.models.kv_cache.kv_cache_bytes`. Operations: ``2`` a weight of a linear
    layer, and ``4 * layers * heads * head_dim`` a cached token (scores, and the sum of values).

    Args:
        config: of the model (``load_config``, or ``loaded.model.config``).
        rates: of the device.
        precision: one of PRECISIONS.
        contexts: tokens that are cached before the step.
        dtype: of what is not quantised, and of keys and values; by default what a GPU would take.

    Returns:
        One row a context: context_tokens, weight_bytes, kv_read_bytes, kv_written_bytes, operations, memory_ms,
        compute_ms (NaN if the peak rate is unknown), floor_ms (the larger one), limited_by ("bytes" or "operations").

    Raises:
        LatencyError: an unknown precision, a context below 0, or rates that are not above 0.

    Example:
        >>> from glmlab.models.checkpoints import find_config
        >>> from glmlab.models.loading import load_config
        >>> config = load_config(find_config("chatglm3-6b"))
        >>> floor = roofline(config, card_rates("RTX 4090"), precision="fp16", contexts=[0, 8192])
        >>> floor["limited_by"].tolist(), floor["floor_ms"].round(1).tolist()
        (['bytes', 'bytes'], [11.9, 12.1])
    """
    _check(rates, contexts)
    skeleton = build_skeleton(config)
    dtype = dtype or dtype_beside(config, precision, torch.device("cuda"))
    linear_weights = sum(m.weight.numel() for m in skeleton.modules() if isinstance(m, torch.nn.Linear))
    token_kv_bytes = kv_cache_bytes(config, tokens=1, dtype_bytes=dtype.itemsize)
    heads_per_kv_head = config.num_attention_heads // config.num_key_value_heads  # that read the same keys and values
    table = pd.DataFrame({"context_tokens": contexts})
    table["weight_bytes"] = _weight_bytes(skeleton, precision, dtype)
    table["kv_read_bytes"] = token_kv_bytes * table["context_tokens"]
    table["kv_written_bytes"] = token_kv_bytes
    table["operations"] = 2 * linear_weights + 2 * heads_per_kv_head * table["kv_read_bytes"] // dtype.itemsize
    n_bytes = table[["weight_bytes", "kv_read_bytes", "kv_written_bytes"]].sum(axis="columns")
    table["memory_ms"] = n_bytes / rates.bandwidth_bytes_per_s * 1e3
    table["compute_ms"] = table["operations"] / (rates.flops_per_s or np.nan) * 1e3
    table["floor_ms"] = table[["memory_ms", "compute_ms"]].max(axis="columns")
    table["limited_by"] = np.where(table["compute_ms"] > table["memory_ms"], "operations", "bytes")
    return table


def _check(rates: Rates, contexts: Sequence[int]) -> None:
    if wrong := [context for context in contexts if not 0 <= context < inf]:
        raise LatencyError(f"context {wrong[0]} is no number of cached tokens. Give 0 or more.")
    if not all(0 < rate < inf for rate in (rates.bandwidth_bytes_per_s, rates.flops_per_s or 1.0)):
        raise LatencyError(
            f"the rates of {rates.device} ({rates.bandwidth_bytes_per_s} B/s, {rates.flops_per_s} operations/s) are "
            "not above 0. Measure them with measure_rates(), or give flops_per_s=None if it is unknown."
        )


def _weight_bytes(skeleton: Any, precision: str, dtype: torch.dtype) -> int:
    """Bytes of weights that one token reads: of the embedding table one row, or all of it if the head is tied to it."""
    sizes = predict_bytes(skeleton, precision, dtype)
    embedding = skeleton.get_input_embeddings().weight
    row_bytes = embedding.shape[1] * dtype.itemsize
    is_tied = skeleton.get_output_embeddings().weight is embedding
    return sum(sizes.values()) + int(row_bytes) - (0 if is_tied else sizes["embedding"])
