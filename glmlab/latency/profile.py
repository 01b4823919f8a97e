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

The profiler writes down every operation, which makes a small model much slower. So only the operations' times come
from it; the step that they are parts of is one without it. On a CPU what it wrote down inside an operation has
lengthened that operation. Its price is measured: steps with marks and profiler against steps with marks alone, shared
out among all that was written down. An operation is that much shorter for each one inside it, but never shorter than
the innermost ones together, inside which nothing was written down. Of steps and of operations the fastest are taken,
since whatever else the machine does only adds to them.
"""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pandas as pd
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.hooks import RemovableHandle

from glmlab.generation.decoding import DecodeStep, context_limit
from glmlab.latency.conditions import conditions
from glmlab.latency.measure import LatencyError, device_errors, endless_steps
from glmlab.models.loading import LoadedModel
from glmlab.models.placement import component_of

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
        tokens: decode steps without marks, with marks, and with the profiler, from which the fastest are taken.

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
    needed, limit = context + 3 * (tokens + _WARM_UP_STEPS), context_limit(loaded.model.config)
    if context < 1 or tokens < 1 or needed > limit:
        raise LatencyError(
            f"context={context}, tokens={tokens}: both start at 1, and the {needed:,} tokens of the measurement must "
            f"not pass the model's limit of {limit:,} (max_position_embeddings)."
        )
    on_cuda = loaded.model.device.type == "cuda"
    with device_errors("while profiling", pd.DataFrame):
        steps = endless_steps(loaded, context, 1 + 3 * (tokens + _WARM_UP_STEPS))
        next(steps)
        plain = _timed_steps(steps, tokens)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        with _marks(loaded.model) as n_marks:
            marked = _timed_steps(steps, tokens)
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
    n_events = n_marks + sum(operation.events for operation in operations)
    slowdown_s = profiled[fastest][1].forward_s - min(timed.forward_s for _, timed in marked)
    event_s = 0.0 if on_cuda else max(0.0, slowdown_s) / n_events

    seconds = dict.fromkeys(PARTS, 0.0)
    for operation in operations:
        seconds[operation.part] += operation.without_writing(event_s)
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


def _timed_steps(steps: Iterator[DecodeStep], tokens: int) -> list[tuple[float, DecodeStep]]:
    """So many steps, after some that do not count."""
    return [_timed(steps) for _ in range(_WARM_UP_STEPS + tokens)][_WARM_UP_STEPS:]


class _Operation(NamedTuple):
    """One operation that the forward pass ran."""

    part: str
    seconds: float
    events: int
    """What the profiler wrote down for it: itself and the operations inside it."""
    innermost_s: float
    """Time of the operations inside it that have none inside themselves; its own if it is one."""

    def without_writing(self, event_s: float) -> float:
        """Its seconds without what it cost to write down the operations inside it."""
        return max(self.innermost_s, self.seconds - event_s * (self.events - 1))


def _fastest_operations(passes: list[list[_Operation]], fastest: int) -> list[_Operation]:
    """Operations of the fastest pass, each as fast as it was in any pass that ran the same ones."""
    same = [each for each in passes if [op.part for op in each] == [op.part for op in passes[fastest]]]
    return [min(across, key=lambda operation: operation.seconds) for across in zip(*same, strict=True)]


def _by_pass(events: Any, *, on_cuda: bool) -> list[list[_Operation]]:
    """Operations of each forward pass, in the order of the passes; those within others are part of them."""
    inside: dict[int, list[Any]] = defaultdict(list)  # of an operation: itself, and those within it
    around_others: set[int] = set()
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
        inside[id(around[-1] if around else event)].append(event)
        around_others.update(map(id, around))
        if not around:
            passes.setdefault(id(above[-1]), []).append(event)

    def seconds(event: Any) -> float:
        return float(event.device_time_total if on_cuda else event.time_range.elapsed_us()) / 1e6

    return [
        [
            _Operation(
                next(above.name for above in _above(event) if above.name.startswith(_MARK)).removeprefix(_MARK),
                seconds(event),
                len(inside[id(event)]),
                sum(seconds(each) for each in inside[id(event)] if id(each) not in around_others),
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
def _marks(model: Any) -> Iterator[int]:
    """Mark layers for the profiler while the context lasts; gives the number of marks in a pass."""
    handles: list[RemovableHandle] = []
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if part := _part_of(name, module, model, head):
            enter, leave = _hooks(_MARK + part)
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield len(handles) // 2
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
