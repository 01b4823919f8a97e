"""Milliseconds a token, by the suite's own loop: against context length, and to the first token.

Every step of ``decode_steps`` ends with its token on the host, so that a GPU has finished what the clock counts. The
context is filled by one prefill of made-up tokens; the steps that follow read it as they would read a conversation.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import GenerationConfig

from glmlab.core.errors import GlmlabError
from glmlab.generation.decoding import DecodeStep, Keep, context_limit, decode_steps
from glmlab.latency.conditions import clocks, conditions
from glmlab.memory.probes import MemoryProbe
from glmlab.models.loading import LoadedModel

_WARM_UP_STEPS = 3  # decode steps that do not count: the first ones allocate, and choose kernels


class LatencyError(GlmlabError):
    """Nothing can be measured as asked; the text says why."""


class MeasurementCutError(LatencyError):
    """The device failed while it was being measured; ``measured`` holds the rows that were done by then."""

    def __init__(self, message: str, measured: pd.DataFrame) -> None:
        super().__init__(message)
        self.measured = measured


def measure_decode(loaded: LoadedModel, contexts: Sequence[int], *, tokens: int = 32) -> pd.DataFrame:
    """Time decode steps at several context lengths.

    Args:
        loaded: from ``load_model``; with ``compile=True`` compilation falls into the steps that do not count.
        contexts: tokens that are cached before the steps.
        tokens: decode steps that count at each length; they lengthen the context by as much.

    Returns:
        One row a context: context_tokens, token_ms (median), p10_ms, p90_ms, tokens; on a GPU sm_clock_mhz.
        ``attrs["conditions"]`` says what was measured on what.

    Raises:
        LatencyError: no contexts, one below 1 or beyond the model's limit, no tokens.
        MeasurementCutError: the device failed; has what was measured until then.

    Example:
        >>> from glmlab import load_model
        >>> table = measure_decode(load_model("embedded", precision="fp32", device="cpu"), [16, 64], tokens=4)
        >>> table["context_tokens"].tolist(), bool((table["p10_ms"] <= table["p90_ms"]).all())
        ([16, 64], True)
    """
    if tokens < 1:
        raise LatencyError(f"tokens={tokens}: at least one decode step has to be timed.")
    _check(loaded, "context", contexts, room=_WARM_UP_STEPS + tokens)

    def time_context(context: int) -> dict[str, Any]:
        steps = endless_steps(loaded, context, 1 + _WARM_UP_STEPS + tokens)
        for _ in range(1 + _WARM_UP_STEPS):
            next(steps)
        return {"context_tokens": context, **_summary("token_ms", [_next_s(steps) for _ in range(tokens)])}

    return _measure(loaded, contexts, time_context)


def measure_first_token(loaded: LoadedModel, prompts: Sequence[int], *, repetitions: int = 3) -> pd.DataFrame:
    """Time to the first token of prompts of several lengths: one prefill, and the choice of a token.

    Args:
        loaded: from ``load_model``.
        prompts: lengths in tokens.
        repetitions: prefills that count at each length, after one that does not.

    Returns:
        One row a length: prompt_tokens, first_token_ms (median), p10_ms, p90_ms, tokens (how many were timed).

    Raises:
        LatencyError, MeasurementCutError: as :func:`measure_decode`.

    Example:
        >>> from glmlab import load_model
        >>> table = measure_first_token(load_model("embedded", precision="fp32", device="cpu"), [8], repetitions=2)
        >>> table.columns.tolist()
        ['prompt_tokens', 'first_token_ms', 'p10_ms', 'p90_ms', 'tokens']
    """
    if repetitions < 1:
        raise LatencyError(f"repetitions={repetitions}: at least one prefill has to be timed.")
    _check(loaded, "prompt", prompts, room=0)

    def time_prompt(prompt: int) -> dict[str, Any]:
        seconds = [_next_s(endless_steps(loaded, prompt, 1)) for _ in range(1 + repetitions)]
        return {"prompt_tokens": prompt, **_summary("first_token_ms", seconds[1:])}

    return _measure(loaded, prompts, time_prompt)


def made_up_prompt(loaded: LoadedModel, tokens: int) -> list[int]:
    """Ids for a context of any length: what they say does not matter to the clock, that they differ might."""
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    return [int(token_id) for token_id in np.random.default_rng(0).integers(0, vocabulary, tokens)]


def endless_steps(loaded: LoadedModel, prompt: int, tokens: int) -> Iterator[DecodeStep]:
    """Greedy steps that keep nothing and meet no stop token."""
    never_ends = GenerationConfig(eos_token_id=[], pad_token_id=0)
    return decode_steps(
        loaded,
        made_up_prompt(loaded, prompt),
        max_new_tokens=tokens,
        generation_config=never_ends,
        keep=Keep(top_k=0),
    )


def _next_s(steps: Iterator[DecodeStep]) -> float:
    started = time.perf_counter()
    next(steps)
    return time.perf_counter() - started


def _summary(column: str, seconds: Sequence[float]) -> dict[str, Any]:
    p10, median, p90 = np.percentile(np.array(seconds) * 1e3, [10, 50, 90])
    return {column: median, "p10_ms": p10, "p90_ms": p90, "tokens": len(seconds)}


def _check(loaded: LoadedModel, what: str, lengths: Sequence[int], *, room: int) -> None:
    limit = context_limit(loaded.model.config)
    if not lengths:
        raise LatencyError(f"no {what} lengths to measure. Give at least one, such as [256, 1024].")
    if min(lengths) < 1:
        raise LatencyError(f"a {what} of {min(lengths)} tokens: lengths start at 1.")
    if max(lengths) + room > limit:
        raise LatencyError(
            f"a {what} of {max(lengths):,} tokens{f' and {room} decode steps' if room else ''} pass the model's limit "
            f"of {limit:,} tokens (max_position_embeddings). Measure up to {limit - room:,}."
        )


def _measure(loaded: LoadedModel, lengths: Sequence[int], time_one: Any) -> pd.DataFrame:
    """One row a length; the conditions as found before the first, a GPU's clock right after each."""
    rows: list[dict[str, Any]] = []
    found = conditions(loaded)
    probe = MemoryProbe.for_model(loaded.model)
    for length in lengths:
        with device_errors(f"at {length:,} tokens", lambda: _table(rows, found)):
            rows.append(time_one(length))
        if found["gpus"]:
            told = clocks(probe)
            rows[-1]["sm_clock_mhz"] = None if isinstance(told, str) else told[0]["sm_clock_mhz"]
    return _table(rows, found)


def _table(rows: list[dict[str, Any]], found: dict[str, Any]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    table.attrs["conditions"] = found
    return table


@contextmanager
def device_errors(where: str, measured: Any) -> Iterator[None]:
    """Turn a device that fails into one clear error that keeps what was measured.

    Args:
        where: in the measurement.
        measured: called for the table of what is done.

    Raises:
        MeasurementCutError: out of memory, or the device is gone.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        done = measured()
        raise MeasurementCutError(
            f"the device ran out of memory {where}; {len(done)} rows were measured before and are kept in this error's "
            "'measured'. Measure shorter contexts, or take a smaller precision.",
            done,
        ) from error
    except torch.AcceleratorError as error:
        done = measured()
        first = str(error).splitlines()[0]
        raise MeasurementCutError(
            f"the device failed {where} ({first}); {len(done)} rows were measured before and are kept in this error's "
            "'measured'. Check it with nvidia-smi, restart this process, and measure again.",
            done,
        ) from error
