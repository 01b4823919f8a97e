"""What the suite's own code costs: ratios of two ways to do one thing, measured side by side in one run.

A time alone says as much of the machine as of the code. Here the ways take turns, so that whatever else the machine
does meets all of them alike, and only the ratio of their medians counts.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from glmlab.errors import GlmlabError
from glmlab.generation.decoding import Keep, decode_steps
from glmlab.generation.prompts import encode_chat
from glmlab.models.loading import load_model

_PROMPT = "Tell me a long story about a fox."


@dataclass(frozen=True, slots=True)
class Ratio:
    """How fast one way is against another."""

    key: str
    value: float
    """Speed of the first against the second; 1 is as fast."""
    at_least: float
    """What the suite promises."""
    what: str
    first_ms: float
    """Median of the first way, a unit of work."""
    second_ms: float
    repetitions: int


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


def decode_ratios(repetitions: int, *, tokens: int = 64) -> list[Ratio]:
    """Tokens per second of ``decode_steps`` against ``model.generate()``: embedded model, greedy, one thread.

    Args:
        repetitions: rounds in which each way generates once.
        tokens: tokens a generation.

    Raises:
        GlmlabError: the two did not generate the same ids.
    """
    loaded = load_model("embedded", precision="fp32", device="cpu")
    prompt = encode_chat(loaded.tokenizer, [{"role": "user", "content": _PROMPT}])
    ids = torch.tensor([prompt])
    config = GenerationConfig(
        max_new_tokens=tokens, eos_token_id=loaded.model.generation_config.eos_token_id, pad_token_id=0
    )

    def generate() -> list[int]:
        generated = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return list(generated[0, len(prompt) :].tolist())

    def steps(keep: Keep) -> list[int]:
        return [
            step.token_id
            for step in decode_steps(loaded, prompt, max_new_tokens=tokens, generation_config=config, keep=keep)
        ]

    ways: dict[str, Callable[[], list[int]]] = {
        "generate": generate,
        "default": lambda: steps(Keep()),
        "full logits": lambda: steps(Keep(logits=True)),
    }
    generated = generate()
    if any(way() != generated for way in ways.values()):
        raise GlmlabError("decode_steps and generate() give different tokens: nothing to compare. Please report this.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = take_turns(ways, repetitions)
    finally:
        torch.set_num_threads(threads)
    ms = {name: statistics.median(values) / len(generated) * 1e3 for name, values in seconds.items()}
    what = "tokens/s of decode_steps against model.generate()"
    return [
        Ratio(key, ms["generate"] / ms[way], at_least, f"{what}, {way}", ms[way], ms["generate"], repetitions)
        for key, way, at_least in (
            ("decode_over_generate", "default", 1.0),
            ("decode_full_logits_over_generate", "full logits", 0.9),
        )
    ]


BENCHMARKS: tuple[Callable[[int], Sequence[Ratio]], ...] = (decode_ratios,)
"""Each takes the number of repetitions."""


def run_benchmarks(repetitions: int, out: Path) -> list[Ratio]:
    """Run all benchmarks and write their ratios, with what they were measured on, to a JSON file.

    Raises:
        GlmlabError: fewer than one repetition, or a benchmark that cannot be run.
    """
    if repetitions < 1:
        raise GlmlabError(f"{repetitions} repetitions measure nothing. Ask for at least 1.")
    ratios = [ratio for benchmark in BENCHMARKS for ratio in benchmark(repetitions)]
    out.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "ratios": {ratio.key: asdict(ratio) for ratio in ratios},
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return ratios


def format_ratios(ratios: Iterable[Ratio]) -> str:
    """One line a ratio.

    Example:
        >>> print(format_ratios([Ratio("a_over_b", 1.204, 1.0, "speed of a against b", 2.5, 3.01, 9)]))
        key       ratio  at least     ms  against ms  what
        a_over_b   1.20      1.00  2.500       3.010  speed of a against b
    """
    rows = [("key", "ratio", "at least", "ms", "against ms", "what")]
    for ratio in ratios:
        figures = (f"{ratio.value:.2f}", f"{ratio.at_least:.2f}", f"{ratio.first_ms:.3f}", f"{ratio.second_ms:.3f}")
        rows.append((ratio.key, *figures, ratio.what))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for key, *numbers, what in rows:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([key.ljust(widths[0]), *cells, what]))
    return "\n".join(lines)
