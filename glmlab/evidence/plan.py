"""Which runs are evidence: models, precisions, attention and caches, each a recording, a snapshot or times of tokens.

Everything runs with random weights: memory does not depend on the values, and nothing is downloaded. The runs are
ordered by worth, since a time budget may end before they do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from glmlab.core.curve import SIDE_FILES
from glmlab.core.errors import GlmlabError
from glmlab.forecast.workload import DEFAULT_PROMPT
from glmlab.tracing.trace import TurnTokens

Kind = Literal["recording", "snapshot", "latency"]

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "recording": (*SIDE_FILES, ".csv"),
    "snapshot": (".json.gz",),
    "latency": (".json", ".csv"),
}
"""Endings of a result's files; a run is finished when the last one is there."""

LATENCY_PREFIX = "latency-"  # of timed tokens, which lie among the recordings and are no curves

SNAPSHOT_TURN = TurnTokens(DEFAULT_PROMPT, 21)
"""What a snapshot's history holds after loading: a prefill, which gives the first token, and 20 decode steps."""

CONVERSATION = "long"  # what recordings follow
ALL_TURNS = 15
TURNS = 9
"""Turns of it that most runs take: some 3,700 tokens, far beyond the 2,048 where ChatGLM3's keys and values change
their pool, and within the 4,096 that Llama 2 is made for."""

STATIC_TOKENS = 4096  # length of a static cache; a run's turns must fit into it
LATENCY_TOKENS = (128, 512, 2048, 4096, 8000)  # lengths at which tokens are timed; ChatGLM3's limit is 8,192


class EvidenceError(GlmlabError):
    """Evidence cannot be gathered or read: names the run or file and what to do."""


@dataclass(frozen=True)
class Run:
    """One run in one fresh process: a chat recorded at every token, a snapshot of a short one, or timed tokens.

    Example:
        >>> Run("snapshot", "chatglm3-6b", "int4").name
        'snapshot-chatglm3-6b-int4-sdpa-dynamic'
    """

    kind: Kind
    model: str
    precision: str
    attention: str = "sdpa"
    cache: str = "dynamic"
    turns: int = TURNS  # of a recording
    compile: bool = False  # whether timed tokens come from a compiled model; its cache is static and grows
    lengths: tuple[int, ...] = LATENCY_TOKENS  # at which tokens are timed

    @property
    def setting(self) -> str:
        """Name of what runs, whatever is read of it."""
        return f"{self.model}-{self.precision}-{self.attention}-{'compiled' if self.compile else self.cache}"

    @property
    def name(self) -> str:
        """Name by which the run is chosen."""
        return f"{self.kind}-{self.setting}"

    @property
    def static_tokens(self) -> int | None:
        """Length of the static cache; None for a dynamic one."""
        return STATIC_TOKENS if self.cache == "static" else None

    def __str__(self) -> str:
        prompt, generated = SNAPSHOT_TURN
        what = {
            "recording": f"{CONVERSATION} conversation, {self.turns} turns, memory at every token",
            "snapshot": f"history of loading, a prefill of {prompt} tokens and {generated - 1} decode steps",
            "latency": f"time of a token and of a first token at {', '.join(map(str, self.lengths))} tokens",
        }
        return f"{self.name}: {what[self.kind]}"

    def file(self, data: Path, gpu: str) -> Path:
        """The last file of the run's result."""
        folder = data / ("snapshots" if self.kind == "snapshot" else "recordings")
        prefix = LATENCY_PREFIX if self.kind == "latency" else ""
        return folder / f"{prefix}{gpu}-{self.setting}{SUFFIXES[self.kind][-1]}"


def _both(model: str, precision: str, attention: str = "sdpa", turns: int = TURNS) -> tuple[Run, Run]:
    snapshot = Run("snapshot", model, precision, attention)
    return snapshot, replace(snapshot, kind="recording", turns=turns)


def _latency(precision: str) -> tuple[Run, Run]:
    eager = Run("latency", "chatglm3-6b", precision)
    return eager, replace(eager, compile=True)


PLAN: tuple[Run, ...] = (
    *_both("chatglm3-6b", "fp16", turns=ALL_TURNS),
    *_both("chatglm3-6b", "int4"),
    *_latency("fp16"),
    *_both("chatglm3-6b", "bf16"),
    *_both("chatglm3-6b", "fp16", "eager"),
    *_both("qwen2.5-7b", "fp16"),
    *_both("llama-2-7b", "fp16"),
    *_both("glm-4-9b-chat-hf", "fp16"),
    Run("snapshot", "chatglm3-6b", "fp16", cache="static"),
    Run("recording", "chatglm3-6b", "fp16", cache="static"),
    *_latency("int4"),
    Run("snapshot", "chatglm3-6b", "fp16", "eager", "static"),
    *_both("chatglm3-6b", "int8"),
    *_latency("int8"),
    *_latency("bf16"),
)
"""Every run, the most telling first."""


def choose(names: Sequence[str], plan: Sequence[Run] = PLAN) -> list[Run]:
    """Runs whose name contains one of ``names``, or matches it where it has ``*`` or ``?``; all without names.

    Raises:
        EvidenceError: a name that fits no run.

    Example:
        >>> [run.name for run in choose(["snapshot-*static"])][:1]
        ['snapshot-chatglm3-6b-fp16-sdpa-static']
    """
    patterns = [name if set(name) & set("*?") else f"*{name}*" for name in names]
    for name, pattern in zip(names, patterns, strict=True):
        if not name or not any(fnmatchcase(run.name, pattern) for run in plan):
            raise EvidenceError(f"no run has {name!r} in its name; 'glmlab evidence --list' shows them all.")
    return [run for run in plan if not names or any(fnmatchcase(run.name, pattern) for pattern in patterns)]
