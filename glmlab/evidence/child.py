"""One run in a process of its own: ``python -m glmlab.evidence.child ORDER``.

The order is JSON: ``{"run": {…}, "folder": …, "device": …, "parent": …}``. Allocator, CUDA context and libraries start
clean in a fresh process; what a run before left behind would be in the figures. The result is left in ``folder``;
whoever started the process, and has the number ``parent``, takes it from there once it ends with 0. The run ends with
that process.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from glmlab.core.errors import GlmlabError
from glmlab.evidence.latency import time_tokens
from glmlab.evidence.plan import CONVERSATION, SNAPSHOT_TURN, STATIC_TOKENS, EvidenceError, Kind, Run
from glmlab.evidence.processes import end_with
from glmlab.generation.decoding import Keep, decode_steps, new_cache
from glmlab.memory.probes import MemoryProbe
from glmlab.memory.provenance import run_provenance
from glmlab.memory.recording import load_conversation, record
from glmlab.models.loading import LoadedModel, load_model
from glmlab.snapshots.stripping import save_stripped, strip


def perform(run: Run, folder: Path, device: str) -> Path:
    """Do one run in this process; return its result's file in ``folder``."""
    do: dict[Kind, Callable[[Run, Path, str], Path]] = {
        "recording": _record,
        "snapshot": _record_history,
        "latency": _time,
    }
    return do[run.kind](run, folder, device)


def _load(run: Run, device: str) -> LoadedModel:
    return load_model(
        run.model,
        precision=run.precision,
        device=device,
        weights="random",
        attention=run.attention,
        compile=run.compile,
    )


def _static_tokens(run: Run) -> int | None:
    return STATIC_TOKENS if run.cache == "static" else None


def _command(run: Run) -> dict[str, Any]:
    return {"command": f"glmlab evidence {run.name}"}


def _time(run: Run, folder: Path, device: str) -> Path:
    return time_tokens(_load(run, device), run.lengths, folder / "result.csv", _command(run))


def _record(run: Run, folder: Path, device: str) -> Path:
    conversation = load_conversation(CONVERSATION)
    conversation = replace(conversation, turns=conversation.turns[: run.turns])
    path = folder / "result.csv"
    record(
        _load(run, device),
        conversation,
        path,
        every_token=True,
        notes=_command(run),
        static_tokens=_static_tokens(run),
    )
    return path


def _record_history(run: Run, folder: Path, device: str) -> Path:
    """Load and chat as the tracer does (``tracing._Run``), with PyTorch's memory history on."""
    history = _History()
    loaded = _load(run, device)
    model = loaded.model
    cache = new_cache(loaded, _static_tokens(run))
    prompt, generated = SNAPSHOT_TURN
    steps = decode_steps(loaded, list(range(1, prompt + 1)), max_new_tokens=generated, keep=Keep(top_k=0), cache=cache)
    with history.naming_modules(model):
        for i in range(generated):
            history.begin(str(i))
            step = next(steps, None)
            if step is None:
                raise EvidenceError(
                    f"{run.name}: the model ended its answer after {i} tokens of {generated}, so the history is too "
                    "short. Please report this."
                )
        history.begin("end")
        next(steps, None)
    provenance = {
        **run_provenance(loaded.report, MemoryProbe.for_model(model)),
        **_command(run),
        "cache": run.cache,
        "static_tokens": _static_tokens(run) or 0,
        "turns": [list(SNAPSHOT_TURN)],
    }
    return save_stripped(strip(history.end(), provenance), folder / "result.json.gz")


class _History:
    """PyTorch's memory history of this process; every event notes ``row|path of the module that runs``.

    There is no public name for it in PyTorch; ``torch.cuda.memory`` documents these.
    """

    def __init__(self) -> None:
        self._row = self._module = ""
        torch.cuda.memory._record_memory_history(context="alloc", stacks="all", skip_actions=["free_requested"])
        self.begin("load")

    def begin(self, row: str) -> None:
        """What follows belongs to ``row``: "load", the index of a step, or "end"."""
        self._row = row
        self._note()

    def end(self) -> dict[str, Any]:
        """Stop, and return the snapshot."""
        snapshot: dict[str, Any] = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)
        return snapshot

    def _note(self) -> None:
        torch.cuda.memory._set_memory_metadata(f"{self._row}|{self._module}")

    @contextmanager
    def naming_modules(self, model: torch.nn.Module) -> Iterator[None]:
        """While within, the notes name the module of ``model`` that runs."""
        handles: list[RemovableHandle] = []
        stack = [""]

        def enter(path: str) -> None:
            stack.append(path)
            self._module = path
            self._note()

        def leave() -> None:
            stack.pop()
            self._module = stack[-1]
            self._note()

        for path, module in model.named_modules():
            if path:
                handles.append(module.register_forward_pre_hook(lambda *_, path=path: enter(path)))
                handles.append(module.register_forward_hook(lambda *_: leave()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def gpu_name() -> str | None:
    """Name of the GPU that runs take, None where PyTorch can use none."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def main(argument: str) -> None:
    """Do what the argument says: ``"gpu"`` prints :func:`gpu_name` as JSON, else a run."""
    if argument == "gpu":
        print(json.dumps(gpu_name()))  # noqa: T201 - the answer to the process that asks
        return
    order = json.loads(argument)
    end_with(order["parent"])
    try:
        perform(Run(**order["run"]), Path(order["folder"]), order["device"])
    except GlmlabError as error:
        print(f"glmlab: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from error


if __name__ == "__main__":
    main(sys.argv[1])
