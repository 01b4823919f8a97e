"""Where the time of one token goes, from torch.profiler; the parts add up to the whole, or the rest is "unexplained".

Forward hooks mark the linear layers, the head, attention and the norms while the profiler runs. Each operation that
PyTorch runs belongs to the innermost mark around it:

    weights                      products with the weights of linear layers (for int8 and int4 with what they unpack)
    attention                    scores, softmax and values; rotary embedding; joining keys and values to the cache
    head                         the product that gives the logits
    norms, activations, rest     every other operation of the forward pass
    Python and launching         the forward pass without its operations: on a CPU the gaps between them, on a GPU what
                                 its kernels leave idle
    sampling                     from logits to a token on the host, and the stop check
    unexplained                  the time of the step that none of these clocks saw

On a CPU an operation's time is its own; on a GPU it is the time of the kernels that it launched.

The profiler writes down every operation, which makes a small model several times slower. So only the operations' times
come from it, less what writing down the operations inside them cost (the whole slowdown, shared out evenly); the step
that they are parts of is one without the profiler. Of steps and of operations the fastest are taken, since whatever
else the machine does only adds to them.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pandas as pd
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from glmlab.generation.decoding import DecodeStep, context_limit
from glmlab.latency.conditions import conditions
from glmlab.latency.measure import LatencyError, device_errors, endless_steps
from glmlab.models.loading import LoadedModel
from glmlab.models.sizes import component_of

PARTS = (
    "weights",
    "attention",
    "head",
    "norms, activations, rest",
    "Python and launching",
    "sampling",
    "unexplained",
)
"""Parts of the time of one token, in the order of the table."""

_WARM_UP_STEPS = 3
_MARK = "glmlab: "
_REST = "norms, activations, rest"
_PASS = _MARK + _REST


def profile_token(loaded: LoadedModel, *, context: int = 64, tokens: int = 16) -> pd.DataFrame:
    """Measure where a decode step's time goes.

    Args:
        loaded: from ``load_model``, not compiled: a compiled pass has no layers left to mark.
        context: tokens that are cached before the steps.
        tokens: decode steps with and without the profiler, from which the fastest are taken.

    Returns:
        One row for each of :data:`PARTS`: part, ms, share. ``attrs`` has ``step_ms`` (the step that the parts add up
        to), ``profiled_step_ms`` (the same with the profiler), ``operations`` (how many PyTorch ran), ``conditions``.

    Raises:
        LatencyError: a compiled model, or more tokens than the context limit.
        MeasurementCutError: the device failed.

    Example:
        >>> from glmlab import load_model
        >>> table = profile_token(load_model("embedded", precision="fp32", device="cpu"), context=8, tokens=2)
        >>> bool(abs(table["ms"].sum() - table.attrs["step_ms"]) < 1e-9)
        True
    """
    if loaded.compiled is not None:
        raise LatencyError(
            "a compiled model cannot be taken apart by layers. Load it without compile=True to profile it."
        )
    needed, limit = context + 2 * (tokens + _WARM_UP_STEPS), context_limit(loaded.model.config)
    if context < 1 or tokens < 1 or needed > limit:
        raise LatencyError(
            f"context={context}, tokens={tokens}: both start at 1, and the {needed:,} tokens of the measurement must "
            f"not pass the model's limit of {limit:,} (max_position_embeddings)."
        )
    on_cuda = loaded.model.device.type == "cuda"
    with device_errors("while profiling", pd.DataFrame):
        steps = endless_steps(loaded, context, 1 + 2 * (tokens + _WARM_UP_STEPS))
        plain = [_timed(steps) for _ in range(1 + _WARM_UP_STEPS + tokens)][1 + _WARM_UP_STEPS :]
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        with _marks(loaded.model):
            for _ in range(_WARM_UP_STEPS):
                next(steps)
            profiler = profile(activities=activities, acc_events=True)
            with _quiet():
                profiler.start()
            profiled = [_timed(steps) for _ in range(tokens)]
            with _quiet():
                profiler.stop()
    elapsed_s, step = min(plain, key=lambda timed: timed[0])
    passes = _by_pass(profiler.events(), on_cuda=on_cuda)  # type: ignore[no-untyped-call]
    fastest = min(range(tokens), key=lambda i: profiled[i][1].forward_s)
    operations = _fastest_operations(passes, fastest)
    between_s = min(
        timed[1].forward_s - sum(operation.seconds for operation in each)
        for timed, each in zip(profiled, passes, strict=True)
    )
    profiled_s = between_s + sum(operation.seconds for operation in operations)
    slowdown_s = 0.0 if on_cuda else max(0.0, profiled_s - step.forward_s)

    seconds = dict.fromkeys(PARTS, 0.0)
    n_events = sum(operation.events for operation in operations)
    for part, operation_s, events in operations:
        seconds[part] += operation_s - slowdown_s * (events - 1) / n_events
    seconds["Python and launching"] = step.forward_s - sum(seconds.values())
    seconds["sampling"] = step.choose_s + step.stop_check_s
    seconds["unexplained"] = elapsed_s - step.forward_s - seconds["sampling"]
    table = pd.DataFrame({"part": PARTS, "ms": [seconds[part] * 1e3 for part in PARTS]})
    table["share"] = table["ms"] / (elapsed_s * 1e3)
    table.attrs["step_ms"] = elapsed_s * 1e3
    table.attrs["profiled_step_ms"] = profiled[fastest][0] * 1e3
    table.attrs["operations"] = len(operations)
    table.attrs["conditions"] = conditions(loaded)
    return table


def _timed(steps: Iterator[DecodeStep]) -> tuple[float, DecodeStep]:
    started = time.perf_counter()
    step = next(steps)
    return time.perf_counter() - started, step


class _Operation(NamedTuple):
    """One operation that the forward pass ran."""

    part: str
    seconds: float
    events: int
    """What the profiler wrote down for it: itself and the operations inside it."""


def _fastest_operations(passes: list[list[_Operation]], fastest: int) -> list[_Operation]:
    """Operations of the fastest pass, each as fast as it was in any pass that ran the same ones."""
    same = [each for each in passes if [op.part for op in each] == [op.part for op in passes[fastest]]]
    return [min(across, key=lambda operation: operation.seconds) for across in zip(*same, strict=True)]


def _by_pass(events: Any, *, on_cuda: bool) -> list[list[_Operation]]:
    """Operations of each forward pass, in the order of the passes; those within others are part of them."""
    inside: Counter[int] = Counter()
    passes: dict[int, list[Any]] = {}
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        above = list(_above(event))
        if event.name == _PASS:
            passes.setdefault(id(event), [])
        if not _is_operation(event) or not above or above[-1].name != _PASS:
            continue
        around = [operation for operation in above if _is_operation(operation)]
        inside[id(around[-1] if around else event)] += 1
        if not around:
            passes.setdefault(id(above[-1]), []).append(event)
    return [
        [
            _Operation(
                next(above.name for above in _above(event) if above.name.startswith(_MARK)).removeprefix(_MARK),
                (event.device_time_total if on_cuda else event.time_range.elapsed_us()) / 1e6,
                inside[id(event)],
            )
            for event in operations
        ]
        for operations in passes.values()
    ]


def _is_operation(event: Any) -> bool:
    """Whether an event is PyTorch's or bitsandbytes' operation on the host, not a mark, a kernel or a runtime call."""
    return event.device_type == DeviceType.CPU and "::" in event.name and not event.is_user_annotation


def _above(event: Any) -> Iterator[Any]:
    """The events around an event, from the innermost outwards."""
    while (event := event.cpu_parent) is not None:
        yield event


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the profiler's library writes to stderr when it starts and stops off the screen."""
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


@contextmanager
def _marks(model: Any) -> Iterator[None]:
    """Mark layers for the profiler while the context lasts."""
    handles = []
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if part := _part_of(name, module, model, head):
            enter, leave = _hooks(_MARK + part)
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _part_of(name: str, module: nn.Module, model: Any, head: nn.Module) -> str | None:
    """Part that a module's operations belong to; None for what belongs to the module around it."""
    if module is model:
        return _REST
    if module is head:
        return "head"
    if isinstance(module, nn.Linear):
        return "weights"
    last = name.rpartition(".")[2]
    return "attention" if component_of(name) == "attention" and "norm" not in last else None


def _hooks(mark: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Begin and end of a mark; calls may nest."""
    running: list[Any] = []

    def enter(*_: Any) -> None:
        running.append(record_function(mark))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    return enter, leave
