"""A Workload: everything that a forecast depends on, and where its model's config comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Literal

from glmlab.core.cards import find_card
from glmlab.core.errors import GlmlabError
from glmlab.tracing.trace import TraceSettings, Turn, load_recorded

Attention = Literal["sdpa", "eager"]
CacheKind = Literal["dynamic", "static"]
Keeps = Literal["logits", "previous cache"]

EmptyCache = Literal["load", "turn"]

ATTENTIONS = ("sdpa", "eager")
CACHES = ("dynamic", "static")
WEIGHTS = ("checkpoint", "random")
KEEPS = ("logits", "previous cache")
EMPTY_CACHE_MOMENTS = ("load", "turn")
ARCHITECTURES = ("volta", "turing", "ampere", "ada", "hopper", "blackwell")
DEFAULT_ARCHITECTURE = "ada"
DEFAULT_PROMPT = 8
"""Tokens of the prompt where only a length of context is asked for: what "你好" becomes."""


class WorkloadError(GlmlabError):
    """A workload that no GPU could run or that cannot be told from its description: says which field and why."""


@dataclass(frozen=True)
class Workload:
    """What a run depends on: model, precision, attention, cache, batch, turns, what the caller keeps, GPU.

    Make one with :meth:`of` (a model) or :meth:`recorded` (a trace of ``data/traces``).

    Raises:
        WorkloadError: an unknown precision, attention, cache, architecture or card; a batch or turn below 1.

    Example:
        >>> workload = Workload.of("chatglm3-6b", precision="fp16", turns="8:100,30:200")
        >>> workload.turns[1].generated, workload.context_tokens
        (200, 336)
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)  # the fields of config.json; {} for a recorded trace
    recorded_trace: str = ""
    precision: str = "fp16"  # fp32, fp16, bf16, int8 or int4 (bitsandbytes; int4 is nf4)
    attention: Attention = "sdpa"
    weights: Literal["checkpoint", "random"] = "checkpoint"  # as load_model's; each is loaded another way
    cache: CacheKind = "dynamic"
    static_tokens: int = 0  # length of a static cache; 0 = the context that the turns reach
    batch: int = 1
    turns: tuple[Turn, ...] = (Turn(DEFAULT_PROMPT, 100),)
    keeps: tuple[Keeps, ...] = ()  # what the caller holds on to between steps and turns
    all_logits: bool = False  # the prefill computes logits of every token, not of the last alone
    architecture: str = ""  # of the GPU; "" = the card's, else DEFAULT_ARCHITECTURE
    card: str = ""  # a name of data/gpus.csv
    cuda_context_mib: float | None = None  # None = the card's, else an assumption that the forecast names
    empty_cache: tuple[EmptyCache, ...] = ()  # moments of torch.cuda.empty_cache(): after "load", after every "turn"
    without_effects: tuple[str, ...] = ()  # entries of device_effects.EFFECTS that are switched off

    def __post_init__(self) -> None:
        if not self.recorded_trace:  # a recorded trace needs no torch
            from glmlab.models.sizes import PRECISIONS

            _one_of("precision", self.precision, PRECISIONS)
        _one_of("attention", self.attention, ATTENTIONS)
        _one_of("cache", self.cache, CACHES)
        _one_of("weights", self.weights, WEIGHTS)
        for kept in self.keeps:
            _one_of("keeps", kept, KEEPS)
        for moment in self.empty_cache:
            _one_of("empty_cache", moment, EMPTY_CACHE_MOMENTS)
        if self.architecture:
            _one_of("architecture", self.architecture, ARCHITECTURES)
        if self.card:
            find_card(self.card)
        if self.batch < 1:
            raise WorkloadError(f"batch={self.batch}: at least one sequence is needed.")
        if self.static_tokens < 0:
            raise WorkloadError(f"static_tokens={self.static_tokens}: give a length, or 0 for the turns' own.")
        if self.cuda_context_mib is not None and not 0 <= self.cuda_context_mib < inf:
            raise WorkloadError(f"cuda_context_mib={self.cuda_context_mib}: give MiB from 0 on, or leave it out.")
        if not self.turns:
            raise WorkloadError("a workload needs at least one turn, such as 8:100 (prompt tokens:generated tokens).")
        for number, (prompt, generated) in enumerate(self.turns, start=1):
            if prompt < 1 or generated < 1:
                raise WorkloadError(f"turn {number} is {prompt}:{generated}; prompt and generated tokens start at 1.")

    @classmethod
    def of(
        cls,
        model: str | Mapping[str, Any],
        *,
        turns: str | Sequence[tuple[int, int]] | None = None,
        tokens: int | None = None,
        **fields: Any,
    ) -> "Workload":
        """Workload of a model.

        Args:
            model: hub id, folder, config.json, a name of ``data/configs``, or the fields of a config.json.
            turns: ``"30:500,30:500"`` (prompt tokens:generated tokens) or pairs.
            tokens: instead of turns: one turn that reaches this context length.
            fields: the other fields of :class:`Workload`.

        Raises:
            WorkloadError: both or neither readable; turns that do not parse.
            CheckpointError: no such model.
        """
        if isinstance(model, Mapping):
            config, name = dict(model), str(model.get("_name_or_path") or model.get("model_type") or "model")
        else:
            from glmlab.models.checkpoint_files import read_config_json
            from glmlab.models.checkpoints import find_config

            path = find_config(model)
            config = read_config_json(path)
            name = str(config.get("_name_or_path") or model)
        return cls(
            name=name.rsplit("/", 1)[-1],
            config=config,
            turns=_turns(turns, tokens),
            **fields,
        )

    @classmethod
    def recorded(
        cls,
        trace: str,
        *,
        turns: str | Sequence[tuple[int, int]] | None = None,
        tokens: int | None = None,
        **fields: Any,
    ) -> "Workload":
        """Workload of a recorded trace of ``data/traces``; its precision, attention and cache are the recording's."""
        facts = load_recorded(trace).facts
        return cls(name=trace, recorded_trace=trace, precision=facts.precision, turns=_turns(turns, tokens), **fields)

    def with_turns(self, turns: str | Sequence[tuple[int, int]]) -> "Workload":
        """Return the same workload with other turns."""
        return replace(self, turns=_turns(turns, None))

    def with_tokens(self, tokens: int) -> "Workload":
        """Return the same workload with one turn that reaches a context length, from a short prompt."""
        return replace(self, turns=_turns(None, tokens))

    @property
    def context_tokens(self) -> int:
        """Context length after the last turn; the last generated token of a turn is not fed."""
        return sum(prompt + generated - 1 for prompt, generated in self.turns)

    @property
    def gpu_architecture(self) -> str:
        """Architecture that the trace is made for."""
        if self.architecture:
            return self.architecture
        return find_card(self.card).architecture if self.card else DEFAULT_ARCHITECTURE

    def trace_settings(self) -> TraceSettings:
        """What of the workload shapes its trace.

        Raises:
            WorkloadError: a static cache that is shorter than the turns.
        """
        from glmlab.tracing.cuda_rules import FUSED_4BIT_ROWS

        static_tokens = 0
        if self.cache == "static":
            static_tokens = self.static_tokens or self.context_tokens
            if static_tokens < self.context_tokens:
                raise WorkloadError(
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
            without_effects=self.without_effects,
            dequantise_4bit=self.precision == "int4" and longest_prefill_rows > FUSED_4BIT_ROWS,
        )


def parse_turns(text: str) -> tuple[Turn, ...]:
    """``"30:500,30:500"`` -> turns; :class:`WorkloadError` names the part that is no ``prompt:generated``.

    Example:
        >>> parse_turns("8:418,26:259")
        (Turn(prompt=8, generated=418), Turn(prompt=26, generated=259))
    """
    turns = []
    for part in text.split(","):
        prompt, colon, generated = part.strip().partition(":")
        if not (colon and prompt.isdecimal() and generated.isdecimal()):
            raise WorkloadError(
                f"turns: {part.strip()!r} is not prompt:generated. Write tokens such as 30:500, several joined by "
                "commas."
            )
        turns.append(Turn(int(prompt), int(generated)))
    return tuple(turns)


def _turns(turns: str | Sequence[tuple[int, int]] | None, tokens: int | None) -> tuple[Turn, ...]:
    if turns is not None and tokens is not None:
        raise WorkloadError("give either turns or tokens, not both: tokens stands for one turn of that context length.")
    if isinstance(turns, str):
        return parse_turns(turns)
    if turns is not None:
        return tuple(Turn(int(prompt), int(generated)) for prompt, generated in turns)
    if tokens is None:
        return (Turn(DEFAULT_PROMPT, 100),)
    if tokens < 1:
        raise WorkloadError(f"tokens={tokens}: a context has at least one token.")
    prompt = min(DEFAULT_PROMPT, tokens)
    return (Turn(prompt, tokens - prompt + 1),)


def _one_of(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise WorkloadError(f"{field}={value!r} is not known. Use one of {', '.join(known)}.")
