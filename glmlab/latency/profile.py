"""Where the time of one token goes, from torch.profiler; what no clock saw is "unexplained".

Forward hooks mark attention, the linear layers and the head while the profiler runs. Each operation that PyTorch runs
belongs to the innermost mark around it:

    weights                      products with the weights of linear layers (for int8 and int4 with what they unpack)
    attention                    scores, softmax and values; rotary embedding; joining keys and values to the cache
    head                         the product that gives the logits
    norms, activations, rest     every other operation of the forward pass
    Python and launching         the forward pass without its operations: on a CPU the gaps between them, on a GPU the
                                 time in which it idles
    sampling                     from logits to a token on the host, and the stop check
    unexplained                  what the decode loop's own clocks did not see of the step

On a CPU an operation's time is its own; on a GPU it is the time of the kernels that it launched.

Profiling makes a small model much slower, so only the operations' times come from it; the step that they are parts of
runs without it. On a CPU each record that the profiler writes lengthens the operation around it, by a price that is
measured on a tiny operation and taken off. Of steps and operations the fastest count, since other work of the machine
only adds to them.
"""

import os
import sys
import time
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from glmlab.generation.decoding import DecodeStep
from glmlab.generation.preparation import context_limit
from glmlab.latency.measure import WARM_UP_STEPS, LatencyError, conditions, device_errors, endless_steps
from glmlab.models.loading import LoadedModel
from glmlab.models.module_paths import follow_modules
from glmlab.models.placement import component_of

_MARK = "glmlab: "
_REST = "norms, activations, rest"
_PASS = _MARK + _REST

PARTS = ("weights", "attention", "head", _REST, "Python and launching", "sampling", "unexplained")
"""Parts of the time of one token, in the order of the table."""


def profile_token(loaded: LoadedModel, *, context: int = 64, tokens: int = 16) -> pd.DataFrame:
    """Measure where a decode step's time goes.

    Args:
        loaded: from ``load_model``, not compiled: a compiled pass has no layers left to mark.
        context: tokens that are cached before the steps.
        tokens: decode steps without the profiler, and with it; the fastest count.

    Returns:
        One row for each of :data:`PARTS`: part, ms, share. ``attrs`` has ``step_ms`` (the sum of the parts),
        ``profiled_step_ms`` (with the profiler), ``operations`` (how many PyTorch ran), ``conditions``.

    Raises:
        LatencyError: a compiled model, more tokens than the context limit, or the device failed.

    Example:
        >>> from glmlab import load_model
        >>> table = profile_token(load_model("embedded", precision="fp32", device="cpu"), context=8, tokens=2)
        >>> table["part"].tolist()[:3], table.attrs["operations"] > 200
        (['weights', 'attention', 'head'], True)
    """
    if loaded.compiled is not None:
        raise LatencyError("a compiled model cannot be taken apart by layers. Load it without compile=True.")
    needed, limit = context + 2 * (tokens + WARM_UP_STEPS), context_limit(loaded.model.config)
    if context < 1 or tokens < 1 or needed > limit:
        raise LatencyError(
            f"context={context}, tokens={tokens}: both start at 1, and the {needed:,} tokens of the measurement must "
            f"not pass the model's limit of {limit:,} (max_position_embeddings)."
        )
    with device_errors("while profiling", pd.DataFrame):
        plain, profiled, passes = _run_steps(loaded, context, tokens)
    elapsed_s, step = min(plain, key=lambda timed: timed[0])
    fastest = min(range(tokens), key=lambda index: profiled[index][1].forward_s)
    operations = _fastest_operations(passes, fastest)
    seconds = dict.fromkeys(PARTS, 0.0)
    for part, operation_s in operations:
        seconds[part] += operation_s
    seconds["Python and launching"] = step.forward_s - sum(seconds.values())
    seconds["sampling"] = step.choose_s + step.stop_check_s
    seconds["unexplained"] = elapsed_s - step.forward_s - seconds["sampling"]
    table = pd.DataFrame({"part": PARTS, "ms": [seconds[part] * 1e3 for part in PARTS]})
    table["share"] = table["ms"] / (elapsed_s * 1e3)
    table.attrs = {
        "step_ms": elapsed_s * 1e3,
        "profiled_step_ms": profiled[fastest][0] * 1e3,
        "operations": len(operations),
        "conditions": conditions(loaded),
    }
    return table


_Timed = tuple[float, DecodeStep]
"""A step, and how long its caller waited for it."""

_Operation = tuple[str, float]
"""The part that an operation belongs to, and its seconds."""


def _run_steps(
    loaded: LoadedModel, context: int, tokens: int
) -> tuple[list[_Timed], list[_Timed], list[list[_Operation]]]:
    """Timed steps without the profiler, with it, and the operations of each of the latter."""
    steps = endless_steps(loaded, context, 1 + 2 * (tokens + WARM_UP_STEPS))

    def timed_steps() -> list[_Timed]:
        timed = []
        for _ in range(WARM_UP_STEPS + tokens):
            started = time.perf_counter()
            step = next(steps)
            timed.append((time.perf_counter() - started, step))
        return timed[WARM_UP_STEPS:]

    next(steps)
    plain = timed_steps()
    on_cuda = loaded.model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    profiler = profile(activities=activities, acc_events=True)
    unrecorded_s = _tiny_operation_s()
    with _marks(loaded.model):
        with _quiet():
            profiler.start()
        profiled = timed_steps()
        record_s = (_tiny_operation_s() - unrecorded_s) / _TINY_RECORDS
        with _quiet():
            profiler.stop()
    events = profiler.events()  # type: ignore[no-untyped-call]
    return plain, profiled, _passes(events, record_s=max(0.0, record_s), on_cuda=on_cuda)[WARM_UP_STEPS:]


_TINY_RECORDS = 3  # aten::t, aten::transpose, aten::as_strided


def _tiny_operation_s() -> float:
    """Seconds of an operation that does next to nothing, for which the profiler writes ``_TINY_RECORDS`` records."""
    return min(timeit.repeat(torch.ones(1, 1).t, number=20, repeat=20)) / 20


@contextmanager
def _marks(model: Any) -> Iterator[None]:
    """Mark the parts of a forward pass for the profiler while the context lasts."""
    head = model.get_output_embeddings()
    parts = {
        name: part for name, module in model.named_modules() if (part := _part_of(name, module, is_head=module is head))
    }
    running: list[Any] = []

    def enter(path: str) -> None:
        running.append(record_function(_MARK + parts[path]))
        running[-1].__enter__()

    def leave(_: str) -> None:
        running.pop().__exit__(None, None, None)

    with follow_modules([(name, model.get_submodule(name)) for name in parts], enter, leave):
        yield


def _part_of(name: str, module: nn.Module, *, is_head: bool) -> str | None:
    """Part that a module's operations belong to; None if they belong to that of the module around it."""
    if not name:
        return _REST
    if is_head:
        return "head"
    if isinstance(module, nn.Linear):
        return "weights"
    return "attention" if component_of(name) == "attention" and "norm" not in name.rpartition(".")[2] else None


def _passes(events: Any, *, record_s: float, on_cuda: bool) -> list[list[_Operation]]:
    """Outermost operations of each forward pass, without the time that records inside them took."""

    def operations(event: Any, part: str) -> Iterator[_Operation]:
        for child in event.cpu_children:
            if child.name.startswith(_MARK):
                yield from operations(child, child.name.removeprefix(_MARK))
            elif "::" not in child.name:  # such as an autograd function
                yield from operations(child, part)
            elif on_cuda:
                yield part, child.device_time_total / 1e6
            else:
                yield part, max(0.0, child.time_range.elapsed_us() / 1e6 - record_s * _records_inside(child))

    passes = [event for event in events if event.name == _PASS and event.device_type == DeviceType.CPU]
    return [list(operations(event, _REST)) for event in passes]


def _records_inside(event: Any) -> int:
    return sum(1 + _records_inside(child) for child in event.cpu_children)


def _fastest_operations(passes: list[list[_Operation]], fastest: int) -> list[_Operation]:
    """Operations of the fastest pass, each as fast as in any pass that ran the same ones."""
    same = [each for each in passes if [part for part, _ in each] == [part for part, _ in passes[fastest]]]
    return [min(across) for across in zip(*same, strict=True)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the profiler's C++ library writes to stderr when it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
