"""An allocation trace parametrised by the conversation, and its file format.

A trace is an :class:`~glmlab.allocator.program.EventProgram` whose sections have fixed names, with a label for every
allocation (operation, module path, layer) and a few facts about the model. :meth:`AllocationTrace.schedule` lays any
conversation out over the sections.

Sections
    ``load``; then for the first turn ``first.prefill``, ``first.step2``, ``first.step3`` and for later turns
    ``later.*``; ``steady`` for every step from the fourth on; ``first.end`` and ``later.end`` for what is freed when
    a turn ends (``.end1`` and ``.end2`` for turns of one or two steps). A prompt of one token runs other operations:
    ``first-one`` and ``later-one`` have their own ``.prefill``, ``.step2`` and ``.end1``.

Steps
    A turn of p prompt tokens and a generated tokens is a steps: the prefill reads p tokens and gives the first token,
    every decode step reads one more. The last token is not fed: a turn that starts with L0 cached tokens leaves L0 +
    p + a - 1. Step i (from 0) has n = p + i tokens of this turn and L = L0 + p + i tokens of context.

Owners
    What the bytes of an allocation are for, one of :data:`OWNERS`.

File
    One ``.npz`` without pickle: the arrays of the program, ``label_of_event``, ``layer_of_event``, and a ``document``
    (JSON) with everything else.
"""

import importlib.metadata
import io
import json
import operator
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from glmlab.allocator.program import ALLOCATE, EventProgram, EventProgramError, Int64Array
from glmlab.core.errors import GlmlabError
from glmlab.core.files import write_atomically
from glmlab.core.resources import data_path
from glmlab.core.units import MIB, format_bytes

FORMAT = 3
"""Version of the file format; a file of another version is refused."""

WEIGHT_OWNERS = ("weights_attention", "weights_mlp", "weights_embedding", "weights_head", "weights_norms")
"""Owners of the model's parameters, by kind; biases count to their layer, buffers (rotary tables) to the norms."""

OWNERS = ("activations", "workspace", *WEIGHT_OWNERS, "quantisation_state", "kv_cache", "kept_outputs")
"""What allocated bytes are for. Every trace has these owners in this order."""

WARM_UP = "loader's warm-up block"
"""Operation of the block that transformers asks for before it loads the first tensor."""

MOST_BYTES = 64 * MIB
"""Most that the arrays of a trace file may have together; the largest known has 2 MiB."""

STEADY = "steady"

FUSED_4BIT_ROWS = 256
"""Most rows of a product whose 4-bit weight a fused kernel reads (``bnb-4bit-dequantise`` in cuda_rules.py)."""


class TraceError(GlmlabError):
    """A trace that cannot be made, read, or laid out over a conversation: says why, and how to fix it."""


class TurnTokens(NamedTuple):
    """One user message and its answer, in tokens: ``prompt`` tokens fed, ``generated`` tokens sampled."""

    prompt: int
    generated: int


@dataclass(frozen=True)
class TraceSettings:
    """Everything that shapes a trace: a model and how it runs, but not how long its conversation is."""

    config: Mapping[str, Any]  # the fields of config.json
    name: str  # of the model
    precision: str = "fp16"  # fp32, fp16, bf16, int8 or int4 (bitsandbytes; int4 is nf4)
    attention: str = "sdpa"  # or "eager"
    weights: str = "checkpoint"  # or "random", as load_model's; each is loaded another way
    cache: str = "dynamic"  # or "static"
    static_tokens: int = 0  # length of a static cache
    batch: int = 1
    keeps: tuple[str, ...] = ()  # "logits": the caller holds those of the last step
    all_logits: bool = False  # the prefill computes logits of every token, not of the last alone
    architecture: str = "ada"  # of the GPU
    dequantise_4bit: bool = False  # prefills have so many rows that bitsandbytes dequantises 4-bit weights first
    one_token_prompts: bool = False  # a prompt may have a single token


def turn_sections(turn: TurnTokens, *, is_first: bool) -> list[str]:
    """Names of a turn's sections: one for each step, then its end.

    Example:
        >>> turn_sections(TurnTokens(8, 5), is_first=True)
        ['first.prefill', 'first.step2', 'first.step3', 'steady', 'steady', 'first.end']
        >>> turn_sections(TurnTokens(1, 2), is_first=False)
        ['later-one.prefill', 'later-one.step2', 'later.end2']
    """
    usual = "first" if is_first else "later"
    own = f"{usual}-one" if turn.prompt == 1 else usual
    begin = [f"{own}.prefill", f"{own}.step2", f"{usual}.step3"][: turn.generated]
    end = {1: f"{own}.end1", 2: f"{usual}.end2"}.get(turn.generated, f"{usual}.end")
    return [*begin, *[STEADY] * (turn.generated - len(begin)), end]


@dataclass(frozen=True)
class Request:
    """Who asked for memory: operation, module path (``*`` for the layer's number), layer (-1: none), bytes."""

    operation: str
    module: str
    layer: int
    requested_bytes: int

    def __str__(self) -> str:
        where = self.module.replace("*", str(self.layer)) if self.layer >= 0 else self.module
        return f"{self.operation} in {where}" if where else self.operation


@dataclass(frozen=True)
class TraceFacts:
    """What one needs to know of the traced model; all sizes in bytes."""

    model: str
    precision: str
    kv_bytes_per_token: int  # payload: 2 * layers * kv_heads * head_dim * bytes * batch
    context_limit: int  # tokens the model is made for; 0 = not stated
    longest_context: int = 0  # tokens for which the trace holds: its cache drops the oldest ones beyond; 0 = any
    warmup_size: int = -1  # row of ``sizes`` of the loader's warm-up block, which a small card caps; -1 = none
    description: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    effects: dict[str, str] = field(default_factory=dict)  # what was modelled beside the tensors, and its source

    def __post_init__(self) -> None:
        for name in ("kv_bytes_per_token", "context_limit", "longest_context", "warmup_size"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"the fact {name} is {getattr(self, name)!r}, not a whole number")


@dataclass(frozen=True)
class AllocationTrace:
    """Every allocation and free of a run, as sections whose sizes follow the context length.

    Raises:
        TraceError: sections, labels or owners do not fit together.

    Example:
        >>> trace = load_recorded("chatglm3-6b-original-int4")
        >>> trace.facts.kv_bytes_per_token
        28672
        >>> trace.schedule([TurnTokens(8, 3)])[:, [0, 2]].tolist()  # turn and context: load, three steps, end
        [[0, 0], [1, 8], [1, 9], [1, 10], [1, 10]]
    """

    program: EventProgram
    facts: TraceFacts
    labels: Sequence[tuple[str, str]]  # (operation, module path)
    label_of_event: npt.NDArray[np.int32]  # (events,) index into labels; -1 = a free
    layer_of_event: npt.NDArray[np.int32]  # (events,) -1 = none

    def __post_init__(self) -> None:
        n_events = len(self.program.events)
        if not len(self.label_of_event) == len(self.layer_of_event) == n_events:
            raise TraceError(f"a trace of {n_events} events needs as many labels; trace the model again.")
        of_allocations = self.label_of_event[self.program.events[:, 0] == ALLOCATE]
        if np.any((of_allocations < 0) | (of_allocations >= len(self.labels))):
            raise TraceError("a label is missing from the trace. Trace the model again.")
        if tuple(self.program.owners) != OWNERS:
            raise TraceError(f"the owners of a trace are {', '.join(OWNERS)}; this one has others. Trace again.")

    def request(self, event: int, context: int, turn_tokens: int) -> Request:
        """Who asked with event number ``event`` (an allocation), and for how many bytes at this step."""
        operation, module = self.labels[self.label_of_event[event]]
        size_row = self.program.events[event, 2]
        requested = int(self.program.bytes_at(context, turn_tokens)[size_row])
        return Request(operation, module, int(self.layer_of_event[event]), requested)

    def schedule(self, turns: Sequence[TurnTokens]) -> Int64Array:
        """Rows (turn, section, context, tokens of the turn): loading, then every step and end of every turn.

        Raises:
            TraceError: no turn, a turn of no tokens, a context beyond a sliding window, or a section that the trace
                does not have.
        """
        self._check_turns(turns)
        number = {name: i for i, name in enumerate(self.program.section_names)}
        try:
            rows = [np.array([[0, number["load"], 0, 0]], np.int64)]
            cached = 0
            for i, turn in enumerate(turns, start=1):
                sections = [number[name] for name in turn_sections(turn, is_first=i == 1)]
                last = turn.generated - 1  # a turn's end has the lengths of its last step
                tokens = turn.prompt + np.minimum(np.arange(turn.generated + 1), last)
                rows.append(np.column_stack([np.full_like(tokens, i), sections, cached + tokens, tokens]))
                cached += turn.prompt + last
        except KeyError as error:
            raise TraceError(
                f"the trace has no section {error}, which this conversation needs. Trace again."
            ) from error
        return np.concatenate(rows)

    def _check_turns(self, turns: Sequence[TurnTokens]) -> None:
        if not turns:
            raise TraceError("a conversation needs at least one turn, such as 8:100 (prompt tokens:generated tokens).")
        for number, turn in enumerate(turns, start=1):
            told = f"turn {number} is {turn.prompt}:{turn.generated}"
            if turn.prompt < 1 or turn.generated < 1:
                raise TraceError(f"{told}; prompt and generated tokens start at 1.")
            if turn.prompt == 1 and turn_sections(turn, is_first=number == 1)[0] not in self.program.section_names:
                raise TraceError(
                    f"{told}, but this trace holds for prompts of at least 2 tokens there. A chat message is never "
                    "shorter; give more prompt tokens."
                )
        longest, reached = self.facts.longest_context, sum(turn.prompt + turn.generated - 1 for turn in turns)
        if longest and reached > longest:
            raise TraceError(
                f"the turns reach {reached:,} tokens, but {self.facts.model} has a sliding window: its cache drops the "
                f"oldest tokens beyond {longest:,}, which a trace does not cover. Ask for {longest:,} tokens or fewer."
            )

    def is_step(self, schedule: Int64Array) -> npt.NDArray[np.bool_]:
        """Which rows of a schedule are forward passes (not loading, not the end of a turn), shape (rows,)."""
        ends = [i for i, name in enumerate(self.program.section_names) if name == "load" or ".end" in name]
        steps: npt.NDArray[np.bool_] = ~np.isin(schedule[:, 1], ends)
        return steps

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the trace to ``path`` (``.npz``); the file appears whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        target, program, content = Path(path), self.program, io.BytesIO()
        document = {
            "format": FORMAT,
            "section_names": program.section_names,
            "carried": program.carried,
            "owners": program.owners,
            "labels": self.labels,
            "facts": asdict(self.facts),
        }
        np.savez_compressed(
            content,
            events=program.events,
            sizes=program.sizes,
            section_start=program.section_start,
            label_of_event=self.label_of_event,
            layer_of_event=self.layer_of_event,
            document=np.array(json.dumps(document, ensure_ascii=False)),
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, content.getvalue())
        return target


def read_trace(path: str | os.PathLike[str]) -> AllocationTrace:
    """Read a trace that :meth:`AllocationTrace.save` wrote.

    Raises:
        TraceError: the file is missing, truncated, of another format, or no trace.
    """
    source = Path(path)
    try:
        with source.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            n_bytes = sum(member.file_size for member in archive.zip.infolist())
            if n_bytes > MOST_BYTES:
                raise ValueError(f"its arrays say that they have {format_bytes(n_bytes)}, which no trace has")
            arrays = {name: archive[name] for name in archive.files}
        document = json.loads(str(arrays["document"]))
        if document["format"] != FORMAT:
            raise TraceError(
                f"{source} has trace format {document['format']}; this version reads {FORMAT}. Trace again."
            )
        program = EventProgram(
            arrays["events"],
            arrays["sizes"],
            document["section_names"],
            arrays["section_start"],
            {name: [operator.index(slot) for slot in slots] for name, slots in document["carried"].items()},
            document["owners"],
        )
        facts = TraceFacts(**document["facts"])
        labels = tuple((str(operation), str(module)) for operation, module in document["labels"])
        of_event = [arrays[name].reshape(-1).astype(np.int32) for name in ("label_of_event", "layer_of_event")]
    except FileNotFoundError:
        raise TraceError(f"{source} is not there. Give the path of a trace (.npz).") from None
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, MemoryError, RecursionError),
        *(zipfile.BadZipFile, EventProgramError),
    ) as error:
        raise TraceError(f"{source} is not a readable allocation trace ({error}). Trace the model again.") from error
    return AllocationTrace(program, facts, labels, *of_event)


def recorded_traces() -> tuple[str, ...]:
    """Names of the traces that ship with the suite (``data/traces``)."""
    return tuple(sorted(path.stem for path in data_path("traces").glob("*.npz")))


def load_recorded(name: str) -> AllocationTrace:
    """Read a trace of ``data/traces`` by name; :class:`TraceError` names those that are there.

    Example:
        >>> load_recorded("chatglm3-6b-original-int4").facts.precision
        'int4'
    """
    if name not in recorded_traces():
        raise TraceError(f"no recorded trace {name!r}. There is: {', '.join(recorded_traces())}.")
    return read_trace(data_path("traces", f"{name}.npz"))


def allocations(program: EventProgram, section: str) -> npt.NDArray[np.int64]:
    """Event numbers (into ``program.events``) of a section's allocations, by slot."""
    number = program.section(section)
    start, end = program.section_start[number], program.section_start[number + 1]
    found: npt.NDArray[np.int64] = start + np.flatnonzero(program.events[start:end, 0] == ALLOCATE)
    return found


def versions() -> dict[str, str]:
    """Versions of the packages whose code shapes a trace."""
    return {package: importlib.metadata.version(package) for package in ("torch", "transformers", "bitsandbytes")}
