"""A Workload: what a forecast depends on, checked, with its config, card and turns resolved."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import Any

import numpy as np

from glmlab.allocator.program import EMPTY_CACHE
from glmlab.core.cards import Card
from glmlab.core.errors import GlmlabError
from glmlab.core.units import GIB, MIB
from glmlab.tracing.trace import FUSED_4BIT_ROWS, AllocationTrace, TraceSettings, TurnTokens

WARM_UP_SPARES_BYTES = int(1.2 * GIB)
"""What transformers' caching_allocator_warmup leaves of a card (modeling_utils.py)."""

DEFAULT_ARCHITECTURE = "ada"
DEFAULT_PROMPT = 8
"""Tokens of the prompt where only a context length is given: what "你好" becomes."""

CHOICES = {
    "precision": ("fp32", "bf16", "fp16", "int8", "int4"),
    "attention": ("sdpa", "eager"),
    "weights": ("checkpoint", "random"),
    "cache": ("dynamic", "static"),
    "keeps": ("logits",),
    "empty_cache": ("load", "turn"),
    "architecture": ("", "volta", "turing", "ampere", "ada", "hopper", "blackwell"),
}
"""Values of the fields that have only a few."""

Turns = str | Sequence[tuple[int, int]]
"""``"30:500,30:500"`` (prompt tokens:generated tokens of every turn), or pairs."""


class ForecastError(GlmlabError):
    """A workload that cannot run or be compared: says which field, turn or line, and why."""


@dataclass(frozen=True)
class Workload:
    """What runs: a model (or a recorded trace), how it runs, its turns, and the GPU.

    Raises:
        ForecastError: an unknown precision, attention, cache or architecture; a batch or turn below 1.

    Example:
        >>> Workload("chatglm3-6b", turns=parse_turns("8:100,30:200")).context_tokens
        336
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)  # of config.json; empty for a recorded trace
    recorded_trace: str = ""  # of data/traces; it has its own precision, attention and cache
    precision: str = "fp16"  # int8 and int4 are bitsandbytes'; int4 is nf4
    attention: str = "sdpa"
    weights: str = "checkpoint"  # as load_model's; "random" loads another way
    cache: str = "dynamic"
    static_tokens: int = 0  # length of a static cache; 0 = the context that the turns reach
    batch: int = 1
    turns: tuple[TurnTokens, ...] = (TurnTokens(DEFAULT_PROMPT, 100),)
    keeps: tuple[str, ...] = ()  # "logits": the caller holds those of the last step
    all_logits: bool = False  # the prefill computes logits of every token, not of the last alone
    architecture: str = ""  # of the GPU; "" = the card's, else DEFAULT_ARCHITECTURE
    card: Card | None = None
    cuda_context_mib: float | None = None  # None = the card's, else an assumption that the forecast names
    empty_cache: tuple[str, ...] = ()  # moments of torch.cuda.empty_cache(): after "load", after every "turn"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            given = getattr(self, name)
            for value in given if isinstance(given, tuple | list) else (given,):
                if value not in known:
                    raise ForecastError(f"{name}={value!r} is not known. Use one of {', '.join(filter(None, known))}.")
        if self.batch < 1:
            raise ForecastError(f"batch={self.batch}: at least one sequence is needed.")
        if self.static_tokens < 0:
            raise ForecastError(f"static_tokens={self.static_tokens}: give a length, or 0 for the turns' own.")
        if self.cuda_context_mib is not None and not 0 <= self.cuda_context_mib < inf:
            raise ForecastError(f"cuda_context_mib={self.cuda_context_mib}: give MiB from 0 on, or leave it out.")
        if not self.turns:
            raise ForecastError("a workload needs at least one turn, such as 8:100 (prompt tokens:generated tokens).")
        for number, (prompt, generated) in enumerate(self.turns, start=1):
            if prompt < 1 or generated < 1:
                raise ForecastError(f"turn {number} is {prompt}:{generated}; prompt and generated tokens start at 1.")

    @property
    def context_tokens(self) -> int:
        """Context length after the last turn; the last generated token of a turn is not fed."""
        return sum(prompt + generated - 1 for prompt, generated in self.turns)

    @property
    def gpu_architecture(self) -> str:
        """Architecture that the trace is made for."""
        return self.architecture or (self.card.architecture if self.card else DEFAULT_ARCHITECTURE)

    def trace_settings(self) -> TraceSettings:
        """What of the workload shapes its trace.

        Raises:
            ForecastError: a static cache that is shorter than the turns.
        """
        static_tokens = 0
        if self.cache == "static":
            static_tokens = self.static_tokens or self.context_tokens
            if static_tokens < self.context_tokens:
                raise ForecastError(
                    f"a static cache of {static_tokens} tokens cannot hold the {self.context_tokens} tokens of these "
                    "turns. Raise static_tokens, or leave it 0."
                )
        longest_prefill_rows = self.batch * max(turn.prompt for turn in self.turns)
        return TraceSettings(
            config=self.config,
            name=self.name,
            precision=self.precision,
            attention=self.attention,
            weights=self.weights,
            cache=self.cache,
            static_tokens=static_tokens,
            batch=self.batch,
            keeps=self.keeps,
            all_logits=self.all_logits,
            architecture=self.gpu_architecture,
            dequantise_4bit=self.precision == "int4" and longest_prefill_rows > FUSED_4BIT_ROWS,
            one_token_prompts=any(turn.prompt == 1 for turn in self.turns),
        )

    def prepare(self, trace: AllocationTrace) -> AllocationTrace:
        """The trace with the card's cap on the loader's warm-up block, and with the calls of empty_cache()."""
        program = trace.program
        sizes = program.sizes.copy()
        if trace.facts.warmup_size >= 0 and self.card:
            row = sizes[trace.facts.warmup_size]
            row[0] = max(min(int(row[0]), self.card.memory_mib * MIB - WARM_UP_SPARES_BYTES), 0) // 2 * 2
        moments = ["load" if name == "load" else "turn" if ".end" in name else "" for name in program.section_names]
        empties = np.array([moment in self.empty_cache for moment in moments])
        ends = program.section_start[1:][empties]  # the new events go before these
        start = program.section_start + np.concatenate([[0], np.cumsum(empties)])
        events = np.insert(program.events, ends, (EMPTY_CACHE, 0, 0, 0), axis=0)
        return replace(
            trace,
            program=replace(program, sizes=sizes, events=events, section_start=start),
            label_of_event=np.insert(trace.label_of_event, ends, -1),
            layer_of_event=np.insert(trace.layer_of_event, ends, -1),
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them; the card by its name."""
        return {**asdict(self), "turns": [list(turn) for turn in self.turns], "card": self.card and self.card.name}


def resolve_model(model: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and config of a hub id, folder, config.json, name of ``data/configs``, or of a config's fields.

    Raises:
        CheckpointError: no such model.
    """
    if isinstance(model, Mapping):
        config, name = dict(model), str(model.get("_name_or_path") or model.get("model_type") or "model")
    else:
        from glmlab.models.checkpoints import find_config, read_config_json

        config = read_config_json(find_config(model))
        name = str(config.get("_name_or_path") or model)
    return name.rsplit("/", 1)[-1], config


def beyond_limit(name: str, tokens: int, limit: int) -> str:
    """Says that a context is longer than the model is made for (0: not stated); "" where it is not.

    Example:
        >>> beyond_limit("llama-2-7b", 5000, 4096)
        "the turns reach 5,000 tokens, but llama-2-7b is made for 4,096 (its config's max_position_embeddings)."
    """
    if not limit or tokens <= limit:
        return ""
    return (
        f"the turns reach {tokens:,} tokens, but {name} is made for {limit:,} (its config's max_position_embeddings)."
    )


def parse_turns(turns: Turns | None, tokens: int | None = None) -> tuple[TurnTokens, ...]:
    """Turns of a text or of pairs; ``tokens`` instead stands for one turn that reaches this context length.

    Raises:
        ForecastError: both are given, or a part of the text is not ``prompt:generated``.

    Example:
        >>> parse_turns("8:418,26:259")
        (TurnTokens(prompt=8, generated=418), TurnTokens(prompt=26, generated=259))
        >>> parse_turns(None, tokens=1000)
        (TurnTokens(prompt=8, generated=993),)
    """
    if turns is not None and tokens is not None:
        raise ForecastError("give either turns or tokens, not both: tokens stands for one turn of that context length.")
    if tokens is not None:
        if tokens < 1:
            raise ForecastError(f"tokens={tokens}: a context has at least one token.")
        prompt = min(DEFAULT_PROMPT, tokens)
        return (TurnTokens(prompt, tokens - prompt + 1),)
    if turns is None:
        return (TurnTokens(DEFAULT_PROMPT, 100),)
    if not isinstance(turns, str):
        return tuple(TurnTokens(int(prompt), int(generated)) for prompt, generated in turns)
    parsed = []
    for part in turns.split(","):
        prompt_text, colon, generated_text = part.strip().partition(":")
        if not (colon and prompt_text.isdecimal() and generated_text.isdecimal()):
            raise ForecastError(
                f"turns: {part.strip()!r} is not prompt:generated. Write tokens such as 30:500, several joined by "
                "commas."
            )
        parsed.append(TurnTokens(int(prompt_text), int(generated_text)))
    return tuple(parsed)
