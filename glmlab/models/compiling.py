"""Decode steps through torch.compile: one token at a time, over a cache of fixed length.

In eager mode Python launches several hundred small operations a token. torch.compile traces the forward pass once,
fuses neighbours and writes C++ (CPU) or Triton kernels (CUDA, replayed as one CUDA graph). That pays where shapes
repeat: decode steps are compiled, prefills are not, and keys and values lie in a StaticCache, whose tensors keep shape
and address while tokens are added.

The first cache length costs a compilation, the second one makes the length a variable: a model is compiled twice at
most (once more if a model of another class is built meanwhile). A static cache is read in its whole length, filled or
not, so on a CPU it grows by :data:`CACHE_STEP_TOKENS` at a time. On CUDA every length is one more CUDA graph to record
and to keep in memory; there it doubles.

With a static cache transformers repeats keys and values for every query head that shares them, as CUDA's kernels want
it. PyTorch's CPU kernel takes shared heads, so there the compiled pass does not repeat them.

Where compiling fails, decoding goes on in eager mode, and a :class:`CompileWarning` says so once.
"""

import contextlib
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from glmlab.core.resources import environment_variable

CACHE_STEP_TOKENS = 256
"""Length of the shortest static cache; longer ones are multiples of it, on CUDA powers of two."""

_SHARED_HEADS = "TRANSFORMERS_SDPA_FORCE_GQA"  # transformers' switch: "1" hands shared heads to sdpa as they are

_RECOMPILE_LIMIT = 64  # dynamo's own, 8, counts all models of one class together


class CompileWarning(UserWarning):
    """torch.compile cannot be used here; the text says why. Decoding goes on in eager mode."""


@dataclass
class Compilation:
    """How compiling went; part of the :class:`~glmlab.models.loading.LoadReport`."""

    seconds: float = 0.0
    """Of the first compilation, with the steps that set it off."""
    failure: str | None = None
    """Why decode steps run in eager mode; None while they are compiled."""

    def __str__(self) -> str:
        if self.failure is None:
            return f"decode steps, {self.seconds:.1f} s"
        return f"no, eager mode ({self.failure.partition(':')[0]})"


class CompiledForward:
    """A model's decode steps, compiled; from the first failure on in eager mode.

    Making one compiles: two decode steps run on a static cache of :data:`CACHE_STEP_TOKENS`.

    Args:
        model: a causal language model of transformers, in eval mode.

    Example:
        >>> from glmlab import load_model
        >>> load_model("embedded", precision="fp32", device="cpu").compiled is None  # unless asked: compile=True
        True
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.compilation = Compilation()
        self._on_cuda = model.device.type == "cuda"
        torch._dynamo.config.recompile_limit = max(_RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
        self._forward: Any = torch.compile(
            model.forward,
            fullgraph=True,  # part of a model left in eager mode would be a silent fallback
            mode="reduce-overhead" if self._on_cuda else None,
        )
        started = time.perf_counter()
        self._try_out()
        self.compilation.seconds = time.perf_counter() - started

    def __call__(self, **inputs: Any) -> Any:
        """One decode step: what ``model(**inputs)`` returns; read its tensors before the next call."""
        if self.compilation.failure is None:
            if self._on_cuda:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            try:
                with contextlib.nullcontext() if self._on_cuda else environment_variable(_SHARED_HEADS, "1"):
                    return self._forward(**inputs)
            except torch._dynamo.exc.TorchDynamoException as error:  # compiling precedes running: nothing is done
                self._give_up(_cause(error))
        return self._model(**inputs)

    def _try_out(self) -> None:
        """Compile for the shortest cache, so that the report knows whether it works."""
        cache = StaticCache(config=self._model.config, max_cache_len=CACHE_STEP_TOKENS)
        if kinds := sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not StaticLayer}):
            self._give_up(f"this model keeps keys and values in layers of kind {', '.join(kinds)}, not in full")
            return
        token = torch.zeros((1, 1), dtype=torch.long, device=self._model.device)
        positions = [torch.full_like(token, position) for position in (1, 2)]
        with torch.no_grad():
            self._model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        with torch.inference_mode():  # as decode_steps calls it; another mode would be compiled anew
            for position in positions:
                self(
                    input_ids=token,
                    position_ids=position,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                    return_dict=True,
                )

    def _give_up(self, why: str) -> None:
        self.compilation.failure = why
        warnings.warn(
            f"torch.compile cannot be used here: {why}. Decode steps run in eager mode, with the same tokens. "
            "compile=True needs a C++ compiler on a CPU (g++, clang or MSVC) and Triton on a GPU.",
            CompileWarning,
            stacklevel=2,
        )


def static_cache_tokens(tokens: int, limit: int, device: torch.device) -> int:
    """Length of a static cache for so many tokens: a multiple of 256, on CUDA a power of two, within the model's limit.

    Example:
        >>> [static_cache_tokens(2049, 8192, torch.device(kind)) for kind in ("cpu", "cuda")]
        [2304, 4096]
        >>> static_cache_tokens(257, 300, torch.device("cpu"))
        300
    """
    steps = -(-max(tokens, 1) // CACHE_STEP_TOKENS)
    if device.type == "cuda":
        steps = 1 << (steps - 1).bit_length()
    return min(steps * CACHE_STEP_TOKENS, max(limit, tokens))


def make_room(cache: StaticCache, tokens: int, limit: int, device: torch.device) -> None:
    """Lengthen a static cache in place until it holds so many tokens, at most ``limit``; what is cached stays."""
    for layer in cache.layers:
        if layer.max_cache_len >= tokens:
            continue
        layer.max_cache_len = static_cache_tokens(tokens, limit, device)
        if layer.is_initialized:
            keys, values = layer.keys, layer.values
            layer.lazy_initialization(keys, values)
            layer.keys[:, :, : keys.shape[2]] = keys
            layer.values[:, :, : values.shape[2]] = values


def _cause(error: BaseException) -> str:
    """First line of the innermost error: dynamo wraps what a backend raised."""
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}".removesuffix(".")
