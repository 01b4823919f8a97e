"""What the suite's own code costs: ratios of two ways to do one thing, and a few times.

A time alone says as much of the machine as of the code. So where there are two ways they take turns: whatever else the
machine does slows both alike, and the ratio of their medians counts. Forecasts and notebooks have nothing to be
compared with; their rows are seconds.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig

from glmlab.allocator.replay import StepReplayer
from glmlab.core.errors import GlmlabError
from glmlab.core.files import write_atomically
from glmlab.forecast.forecast import Forecast
from glmlab.forecast.workload import DEFAULT_PROMPT
from glmlab.generation.decoding import Keep, decode_steps
from glmlab.latency.polling import API, SUBPROCESS, measure_polling
from glmlab.memory.provenance import today
from glmlab.models.loading import LoadedModel, load_model
from glmlab.prompts.encoding import encode_chat
from glmlab.suite.notebooks import execute_notebooks, find_notebooks
from glmlab.tracing.cached import trace
from glmlab.tracing.trace import AllocationTrace, TurnTokens

REPLAY_STEPS = (8_192, 32_768, 131_072)
"""Decode steps of the replays in :func:`replay_table`."""

_PROMPT = "Tell me a long story about a fox."


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a ratio of speeds, or seconds."""

    key: str
    value: float | None  # speed of the first way over the second, or seconds; None where it cannot be measured here
    what: str
    unit: Literal["ratio", "s"] = "ratio"
    at_least: float | None = None  # the ratio that the suite promises
    first_ms: float | None = None  # median of the first way, a unit of work
    second_ms: float | None = None
    repetitions: int = 1
    reason: str = ""  # why there is no value


def take_turns(ways: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of every call, the ways in turn: a b c, b c a, c a b, …, after one uncounted round.

    Example:
        >>> seconds = take_turns({"a": lambda: None, "b": lambda: None}, repetitions=3)
        >>> {name: len(values) for name, values in seconds.items()}
        {'a': 3, 'b': 3}
    """
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(-1, repetitions):
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            ways[name]()
            elapsed = time.perf_counter() - started
            if repetition >= 0:
                seconds[name].append(elapsed)
    return seconds


def decode_rows(repetitions: int, *, tokens: int = 64) -> list[Row]:
    """Tokens per second of ``decode_steps`` against ``model.generate()``, and compiled against eager.

    Embedded model, fp32, greedy, one thread.

    Args:
        repetitions: rounds in which each way generates once.
        tokens: tokens a generation.

    Raises:
        GlmlabError: two ways did not generate the same ids.
    """
    loaded = load_model("embedded", precision="fp32", device="cpu")
    compiled = load_model("embedded", precision="fp32", device="cpu", compile=True)
    ways = _decoding_ways(loaded, compiled, tokens)
    generated = ways["generate"]()
    if any(way() != generated for way in ways.values()):
        raise GlmlabError("decode_steps and generate() give different tokens: nothing to compare. Please report this.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = take_turns(ways, repetitions)
    finally:
        torch.set_num_threads(threads)
    ms = {name: statistics.median(values) / len(generated) * 1e3 for name, values in seconds.items()}

    def row(key: str, way: str, against: str, at_least: float, what: str) -> Row:
        ratio = ms[against] / ms[way]
        return Row(key, ratio, f"tokens/s of {what}", "ratio", at_least, ms[way], ms[against], repetitions)

    rows = [
        row("decode_over_generate", "default", "generate", 1.0, "decode_steps against model.generate()"),
        row(
            "decode_full_logits_over_generate", "full logits", "generate", 0.9, "decode_steps with all logits, likewise"
        ),
        row("compiled_over_eager", "compiled", "eager", 1.0, "load_model(compile=True) against eager"),
    ]
    compilation = compiled.report.compilation
    if compilation is not None and compilation.failure is not None:
        rows[-1] = Row("compiled_over_eager", None, rows[-1].what, reason=compilation.failure)
    return rows


def _decoding_ways(loaded: LoadedModel, compiled: LoadedModel, tokens: int) -> dict[str, Callable[[], list[int]]]:
    """Ways to generate the same ids."""
    prompt = encode_chat(loaded.tokenizer, [{"role": "user", "content": _PROMPT}])
    ids = torch.tensor([prompt])
    config = GenerationConfig(
        max_new_tokens=tokens, eos_token_id=loaded.model.generation_config.eos_token_id, pad_token_id=0
    )

    def generate() -> list[int]:
        generated = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return list(generated[0, len(prompt) :].tolist())

    def steps(keep: Keep, model: LoadedModel = loaded) -> list[int]:
        run = decode_steps(model, prompt, max_new_tokens=tokens, generation_config=config, keep=keep)
        return [step.token_id for step in run]

    return {
        "generate": generate,
        "default": lambda: steps(Keep()),
        "full logits": lambda: steps(Keep(logits=True)),
        "eager": lambda: steps(Keep(top_k=0)),
        "compiled": lambda: steps(Keep(top_k=0), compiled),
    }


def forecast_rows(*, steps: int = 32_768) -> list[Row]:
    """Seconds of a forecast of ChatGLM3-6B-32K over its whole context: the replay, and the trace that it needs once."""
    settings = Forecast.of("chatglm3-6b-32k", tokens=steps).workload.trace_settings()
    started = time.perf_counter()
    traced = trace(settings, refresh=True)
    trace_s = time.perf_counter() - started
    (speed,) = measure_replay(traced, steps=[steps - DEFAULT_PROMPT + 1], prompt=DEFAULT_PROMPT)
    return [
        Row("forecast_32k_replay_s", speed.seconds, f"replay of {steps:,} tokens, CPU time of one core", "s"),
        Row("forecast_32k_trace_s", trace_s, "trace of the model, cached afterwards", "s"),
    ]


def polling_rows(repetitions: int) -> list[Row]:
    """Readings per second of gpustat's Python API against its command, where there is a driver to answer."""
    key, what = "gpustat_api_over_subprocess", "readings/s of gpustat.new_query() against a gpustat --json process"
    rounds = min(repetitions, 5)
    table = measure_polling(repetitions=rounds).set_index("way")
    api, process = (table.loc[way].to_dict() for way in (API, SUBPROCESS))
    if silent := api["outcome"] or process["outcome"]:
        reason = f"no answer from an NVIDIA driver on this machine ({silent})"
        return [Row(key, None, what, reason=reason)]
    api_ms, process_ms = float(api["poll_ms"]), float(process["poll_ms"])
    return [Row(key, process_ms / api_ms, what, "ratio", 1.0, api_ms, process_ms, rounds)]


def notebook_rows(folder: Path) -> list[Row]:
    """Seconds that all notebooks of a folder take, each from a fresh kernel."""
    with TemporaryDirectory() as copies:
        executed = list(execute_notebooks(find_notebooks(folder, []), Path(copies), {}))
    seconds = sum(each.seconds for each in executed)
    return [Row("notebooks_s", seconds, f"{len(executed)} notebooks, one after the other", "s")]


def run_benchmarks(repetitions: int, out: Path, *, notebooks: Path = Path("notebooks")) -> list[Row]:
    """Run all benchmarks and write their values, and what they were measured on, to a JSON file.

    Args:
        repetitions: rounds of the ratios; what is measured in seconds runs once.
        out: the .json: every key with its value (null where it cannot be measured here), and the rows in full.
        notebooks: the folder of the notebooks.

    Raises:
        GlmlabError: fewer than one repetition, a place that cannot be written, or a benchmark that cannot be run.
    """
    if repetitions < 1:
        raise GlmlabError(f"{repetitions} repetitions measure nothing. Ask for at least 1.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # said before the minutes of measuring, not after
        raise GlmlabError(f"{out.parent} cannot be made a folder ({error.strerror}). Give another --out.") from error
    if out.is_dir():
        raise GlmlabError(f"{out} is a folder. Let --out name a .json file.")
    rows = [*decode_rows(repetitions), *forecast_rows(), *polling_rows(repetitions), *notebook_rows(notebooks)]
    record = {
        **{row.key: row.value for row in rows},
        "rows": [asdict(row) for row in rows],
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "date": today(),
    }
    write_atomically(out, json.dumps(record, indent=2) + "\n")
    return rows


def format_rows(rows: Iterable[Row]) -> str:
    """One line a row; "x" marks a ratio, "s" seconds, and a value that is missing has its reason.

    Example:
        >>> ratio = Row("a_over_b", 1.204, "speed of a", at_least=1.0, first_ms=2.5, second_ms=3.01)
        >>> missing = Row("d_over_e", None, "speed of d", reason="no d")
        >>> print(format_rows([ratio, Row("c_s", 31.0, "all of c", "s"), missing]))
        key        value  at least     ms  against ms  what
        a_over_b  1.20 x      1.00  2.500       3.010  speed of a
        c_s       31.0 s                               all of c
        d_over_e       -                               speed of d: no d
    """
    lines: list[tuple[str, ...]] = [("key", "value", "at least", "ms", "against ms", "what")]
    for row in rows:
        shown = "-" if row.value is None else f"{row.value:.2f} x" if row.unit == "ratio" else f"{row.value:.1f} s"
        at_least = "" if row.at_least is None else f"{row.at_least:.2f}"
        times = ["" if ms is None else f"{ms:.3f}" for ms in (row.first_ms, row.second_ms)]
        lines.append((row.key, shown, at_least, *times, f"{row.what}: {row.reason}" if row.reason else row.what))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    texts = []
    for key, *numbers, what in lines:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        texts.append("  ".join([key.ljust(widths[0]), *cells, what]))
    return "\n".join(texts)


class ReplaySpeed(NamedTuple):
    """One replay of a single turn from a short prompt; CPU seconds of one core, compilation not counted."""

    steps: int
    events: int
    seconds: float


def measure_replay(trace: AllocationTrace, *, steps: Sequence[int], prompt: int = 8) -> list[ReplaySpeed]:
    """Replay one turn of each number of decode steps; compiles first, so that compilation is not measured.

    Example:
        >>> from glmlab.tracing.trace import load_recorded
        >>> speed = measure_replay(load_recorded("chatglm3-6b-original-int4"), steps=[50])[0]
        >>> speed.steps, speed.events > 50 * 2900
        (50, True)
    """
    lengths = np.diff(trace.program.section_start)
    StepReplayer(trace.program).run(trace.schedule([TurnTokens(prompt, 4)]))
    speeds = []
    for n_steps in steps:
        schedule = trace.schedule([TurnTokens(prompt, n_steps)])
        begin = time.process_time()
        StepReplayer(trace.program).run(schedule)
        seconds = time.process_time() - begin
        speeds.append(ReplaySpeed(n_steps, int(lengths[schedule[:, 1]].sum()), seconds))
    return speeds


def replay_table(attention: str, steps: Sequence[int] = REPLAY_STEPS) -> str:
    """How fast ChatGLM3-6B in fp16 is replayed: nanoseconds an event, and how the time grows with the steps."""
    speeds = measure_replay(Forecast.of("chatglm3-6b", attention=attention).trace, steps=steps)
    lines = [
        f"replay of ChatGLM3-6B, fp16, {attention}, one answer:",
        "  steps       events  seconds  ns/event  growth",
    ]
    lines += [
        f"{speed.steps:7} {speed.events:12} {speed.seconds:8.2f} {speed.seconds / speed.events * 1e9:9.1f} "
        f"{speed.seconds / speeds[0].seconds:7.2f}"
        for speed in speeds
    ]
    return "\n".join(lines)
