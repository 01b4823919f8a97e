"""Which runs are evidence: models, precisions, attention and caches, each a recording and a snapshot.

Everything runs with random weights: memory does not depend on the values, and nothing is downloaded. The runs stand in
order of worth, since a time budget may end before they do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from glmlab.errors import GlmlabError
from glmlab.memory.allocation_trace import Turn
from glmlab.memory.workload import DEFAULT_PROMPT

Kind = Literal["recording", "snapshot"]

SNAPSHOT_TURN = Turn(DEFAULT_PROMPT, 21)
"""What a snapshot's history holds after loading: a prefill, which gives the first token, and 20 decode steps."""

CONVERSATION = "long"
"""The conversation that a recording follows."""

TURNS = 9
"""Turns of it that a run takes: some 3,700 tokens, far beyond the 2,048 where ChatGLM3's keys and values change their
pool, and within the 4,096 that Llama 2 is made for."""

ALL_TURNS = 15

STATIC_TOKENS = 4096
"""Length of a static cache."""


class EvidenceError(GlmlabError):
    """Evidence cannot be gathered or is not what it says; names the run and what to do."""


@dataclass(frozen=True)
class Run:
    """One run in one fresh process: a chat that is recorded at every token, or a snapshot of a short one.

    Example:
        >>> Run("snapshot", "chatglm3-6b", "int4").name
        'snapshot-chatglm3-6b-int4-sdpa-dynamic'
    """

    kind: Kind
    model: str
    precision: str
    attention: str = "sdpa"
    cache: str = "dynamic"
    turns: int = TURNS

    @property
    def setting(self) -> str:
        """Name of what runs, whatever is read of it."""
        return f"{self.model}-{self.precision}-{self.attention}-{self.cache}"

    @property
    def name(self) -> str:
        """Name by which the run is chosen."""
        return f"{self.kind}-{self.setting}"

    def __str__(self) -> str:
        what = (
            f"{CONVERSATION} conversation, {self.turns} turns, memory at every token"
            if self.kind == "recording"
            else f"history of loading, a prefill of {SNAPSHOT_TURN.prompt} tokens and "
            f"{SNAPSHOT_TURN.generated - 1} decode steps"
        )
        return f"{self.name}: {what}"

    def file(self, data: Path, gpu: str) -> Path:
        """Where the run's result lies once it is finished; a recording has a .json and a .transcript.jsonl beside."""
        stem = f"{gpu}-{self.setting}"
        return data / "recordings" / f"{stem}.csv" if self.kind == "recording" else snapshots(data) / f"{stem}.json.gz"


def snapshots(data: Path) -> Path:
    """Folder of the stripped snapshots."""
    return data / "snapshots"


def _both(model: str, precision: str, attention: str = "sdpa", turns: int = TURNS) -> tuple[Run, Run]:
    snapshot = Run("snapshot", model, precision, attention)
    return snapshot, replace(snapshot, kind="recording", turns=turns)


PLAN: tuple[Run, ...] = (
    *_both("chatglm3-6b", "fp16", turns=ALL_TURNS),
    *_both("chatglm3-6b", "int4"),
    *_both("chatglm3-6b", "bf16"),
    *_both("chatglm3-6b", "fp16", "eager"),
    *_both("qwen2.5-7b", "fp16"),
    *_both("llama-2-7b", "fp16"),
    *_both("glm-4-9b-chat-hf", "fp16"),
    Run("snapshot", "chatglm3-6b", "fp16", "sdpa", "static"),
    Run("snapshot", "chatglm3-6b", "fp16", "eager", "static"),
    *_both("chatglm3-6b", "int8"),
)
"""Every run, the most telling first."""


def choose(names: Sequence[str], plan: Sequence[Run] = PLAN) -> list[Run]:
    """Runs whose name has one of ``names`` in it, or matches it where it has ``*`` or ``?``; all without names.

    Raises:
        EvidenceError: a name that fits no run.

    Example:
        >>> [run.name for run in choose(["snapshot-*static"])][:1]
        ['snapshot-chatglm3-6b-fp16-sdpa-static']
    """
    for name in names:
        if not any(_fits(run, name) for run in plan):
            raise EvidenceError(f"no run has {name!r} in its name; 'glmlab evidence --list' shows them all.")
    return [run for run in plan if not names or any(_fits(run, name) for name in names)]


def _fits(run: Run, name: str) -> bool:
    return fnmatchcase(run.name, name) if set(name) & set("*?") else name in run.name
