"""Milliseconds a token, by the suite's own loop: against context length, and to the first token.

Every step of ``decode_steps`` ends with its token on the host, so a GPU has finished what the clock counts. One prefill
of random tokens fills the context; the timed steps read it as they would read a conversation.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import GenerationConfig

from glmlab.core.errors import GlmlabError
from glmlab.generation.decoding import DecodeStep, Keep, decode_steps
from glmlab.generation.preparation import context_limit
from glmlab.memory.probes import MemoryProbe, ProbeError
from glmlab.memory.provenance import run_provenance
from glmlab.models.loading import LoadedModel

WARM_UP_STEPS = 3
"""Decode steps that do not count: the first ones allocate memory and choose kernels."""

_CONDITIONS = (
    "model", "precision", "dtype", "attention", "compiled", "device", "driver", "os", "versions", "date",
)  # fmt: skip


class LatencyError(GlmlabError):
    """Nothing can be measured as asked, or the device failed; ``measured`` holds the rows that were done by then."""

    def __init__(self, message: str, measured: pd.DataFrame | None = None) -> None:
        super().__init__(message)
        self.measured = pd.DataFrame() if measured is None else measured


def conditions(loaded: LoadedModel) -> dict[str, Any]:
    """What a measured time depends on beside the code: the provenance of every table of this package.

    Returns:
        model, precision, dtype, attention, compiled, device, driver, os, versions, date, gpus (their clocks now, in
        MHz and °C); on a CPU also threads and cpu. What the machine does not tell is None.

    Example:
        >>> from glmlab import load_model
        >>> found = conditions(load_model("embedded", precision="fp32", device="cpu"))
        >>> found["dtype"], found["gpus"], found["driver"]
        ('fp32', [], None)
    """
    probe = MemoryProbe.for_model(loaded.model)
    provenance = run_provenance(loaded.report, probe)
    found = {name: provenance[name] for name in _CONDITIONS}
    if not provenance["gpus"]:
        found["threads"] = loaded.threads or torch.get_num_threads()
        found["cpu"] = torch.backends.cpu.get_cpu_capability()
    return {**found, "gpus": clocks(probe)}


def clocks(probe: MemoryProbe) -> list[dict[str, Any]] | str:
    """SM clock and temperature of each GPU now; the reason if the driver no longer answers."""
    try:
        return probe.clocks()
    except ProbeError as error:
        return f"not read: {error}"


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
        LatencyError: no contexts, one below 1 or beyond the model's limit, no tokens; or the device failed, with what
            was measured until then.

    Example:
        >>> from glmlab import load_model
        >>> table = measure_decode(load_model("embedded", precision="fp32", device="cpu"), [16, 64], tokens=4)
        >>> table["context_tokens"].tolist(), bool((table["p10_ms"] <= table["p90_ms"]).all())
        ([16, 64], True)
    """
    if tokens < 1:
        raise LatencyError(f"tokens={tokens}: at least one decode step has to be timed.")
    _check(loaded, "context", contexts, steps=WARM_UP_STEPS + tokens)

    def seconds(context: int) -> list[float]:
        steps = endless_steps(loaded, context, 1 + WARM_UP_STEPS + tokens)
        return [_next_s(steps) for _ in range(1 + WARM_UP_STEPS + tokens)][1 + WARM_UP_STEPS :]

    return _measure(loaded, ("context_tokens", "token_ms"), contexts, seconds)


def measure_first_token(loaded: LoadedModel, prompts: Sequence[int], *, repetitions: int = 3) -> pd.DataFrame:
    """Time to the first token of prompts of several lengths: one prefill, and the choice of a token.

    Args:
        loaded: from ``load_model``.
        prompts: lengths in tokens.
        repetitions: prefills that count at each length, after one that does not.

    Returns:
        One row a length: prompt_tokens, first_token_ms (median), p10_ms, p90_ms, tokens (how many were timed).

    Raises:
        LatencyError: as :func:`measure_decode`.

    Example:
        >>> from glmlab import load_model
        >>> table = measure_first_token(load_model("embedded", precision="fp32", device="cpu"), [8], repetitions=2)
        >>> table.columns.tolist()
        ['prompt_tokens', 'first_token_ms', 'p10_ms', 'p90_ms', 'tokens']
    """
    if repetitions < 1:
        raise LatencyError(f"repetitions={repetitions}: at least one prefill has to be timed.")
    _check(loaded, "prompt", prompts, steps=0)

    def seconds(prompt: int) -> list[float]:
        return [_next_s(endless_steps(loaded, prompt, 1)) for _ in range(1 + repetitions)][1:]

    return _measure(loaded, ("prompt_tokens", "first_token_ms"), prompts, seconds)


def endless_steps(loaded: LoadedModel, prompt: int, tokens: int) -> Iterator[DecodeStep]:
    """Greedy steps behind a prompt of random ids, which keep nothing and meet no stop token."""
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    return decode_steps(
        loaded,
        np.random.default_rng(0).integers(0, vocabulary, prompt).tolist(),
        max_new_tokens=tokens,
        generation_config=GenerationConfig(pad_token_id=0),
        keep=Keep(top_k=0),
        stops=False,
    )


def _next_s(steps: Iterator[DecodeStep]) -> float:
    started = time.perf_counter()
    next(steps)
    return time.perf_counter() - started


def _check(loaded: LoadedModel, what: str, lengths: Sequence[int], *, steps: int) -> None:
    limit = context_limit(loaded.model.config)
    if not lengths:
        raise LatencyError(f"no {what} lengths to measure. Give at least one, such as [256, 1024].")
    if min(lengths) < 1:
        raise LatencyError(f"a {what} of {min(lengths)} tokens: lengths start at 1.")
    if max(lengths) + steps > limit:
        and_steps = f" and {steps} decode steps" if steps else ""
        raise LatencyError(
            f"a {what} of {max(lengths):,} tokens{and_steps} pass the model's limit of {limit:,} tokens "
            f"(max_position_embeddings). Measure up to {limit - steps:,}."
        )


def _measure(
    loaded: LoadedModel, names: tuple[str, str], lengths: Sequence[int], seconds: Callable[[int], list[float]]
) -> pd.DataFrame:
    """One row a length; the conditions as found before the first, a GPU's clock right after each."""
    rows: list[dict[str, Any]] = []
    found = conditions(loaded)
    probe = MemoryProbe.for_model(loaded.model)

    def table() -> pd.DataFrame:
        done = pd.DataFrame(rows)
        done.attrs["conditions"] = found
        return done

    for length in lengths:
        with device_errors(f"at {length:,} tokens", table):
            p10, median, p90 = np.percentile(np.array(timed := seconds(length)) * 1e3, [10, 50, 90])
        row = {names[0]: length, names[1]: median, "p10_ms": p10, "p90_ms": p90, "tokens": len(timed)}
        if found["gpus"]:
            read = clocks(probe)
            row["sm_clock_mhz"] = None if isinstance(read, str) else read[0]["sm_clock_mhz"]
        rows.append(row)
    return table()


@contextmanager
def device_errors(where: str, measured: Callable[[], pd.DataFrame]) -> Iterator[None]:
    """Turn the failure of a device into a :class:`LatencyError` that keeps what was measured."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            what, advice = f"ran out of memory {where}", "Measure shorter contexts, or take a smaller precision."
        else:
            what = f"failed {where} ({str(error).splitlines()[0]})"
            advice = "Check it with nvidia-smi, restart this process, and measure again."
        done = measured()
        kept = f"{len(done)} rows were measured before and are kept in this error's 'measured'"
        raise LatencyError(f"the device {what}; {kept}. {advice}", done) from error
