"""One run in its own process: ``python -m glmlab.evidence.child ORDER``.

In a fresh process allocator, CUDA context and libraries start clean. The order is JSON: ``{"run": {…}, "folder": …,
"device": …, "parent": …}``. The result is left in ``folder``; the parent, whose process id the order gives, takes it
from there when the run ends with status 0. The run ends with the parent.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glmlab.core.errors import GlmlabError
from glmlab.evidence.latency import time_tokens
from glmlab.evidence.plan import CONVERSATION, SNAPSHOT_TURN, EvidenceError, Run
from glmlab.evidence.processes import end_with
from glmlab.generation.decoding import Keep, decode_steps
from glmlab.generation.preparation import new_cache
from glmlab.memory.conversations import load_conversation
from glmlab.memory.probes import MemoryProbe
from glmlab.memory.provenance import run_provenance
from glmlab.memory.recording import record
from glmlab.models.loading import LoadedModel, load_model
from glmlab.models.module_paths import follow_modules
from glmlab.snapshots.stripping import save_stripped, strip


def perform(run: Run, folder: Path, device: str) -> Path:
    """Do one run in this process; return its result's file in ``folder``."""
    notes = {"command": f"glmlab evidence {run.name}"}
    if run.kind == "snapshot":
        return _record_history(run, folder / "result.json.gz", device, notes)
    path = folder / "result.csv"
    if run.kind == "latency":
        return time_tokens(_load(run, device), run.lengths, path, notes)
    conversation = load_conversation(CONVERSATION)
    conversation = replace(conversation, turns=conversation.turns[: run.turns])
    loaded = _load(run, device)
    record(loaded, conversation, path, every_token=True, notes=notes, static_tokens=run.static_tokens)
    return path


def _load(run: Run, device: str) -> LoadedModel:
    return load_model(
        run.model,
        precision=run.precision,
        device=device,
        weights="random",
        attention=run.attention,
        compile=run.compile,
    )


def _record_history(run: Run, path: Path, device: str, notes: dict[str, Any]) -> Path:
    """Load and chat as the tracer does, with PyTorch's memory history on; each event notes ``row|module``.

    A row is "load", the index of a step, or "end". PyTorch has no public names for these functions;
    ``torch.cuda.memory`` documents them.
    """
    torch.cuda.memory._record_memory_history(context="alloc", stacks="all", skip_actions=["free_requested"])
    row = "load"

    def note(module: str = "") -> None:
        torch.cuda.memory._set_memory_metadata(f"{row}|{module}")

    note()
    loaded = _load(run, device)
    cache = new_cache(loaded, run.static_tokens)
    prompt, generated = SNAPSHOT_TURN
    steps = decode_steps(loaded, list(range(1, prompt + 1)), max_new_tokens=generated, keep=Keep(top_k=0), cache=cache)
    with follow_modules([item for item in loaded.model.named_modules() if item[0]], note, note):
        for row in [*map(str, range(generated)), "end"]:
            note()
            step = next(steps, None)  # held until the next one is there, as the tracer does
            if step is None and row != "end":
                raise EvidenceError(
                    f"{run.name}: the model ended its answer after {row} tokens of {generated}, so the history is too "
                    "short. Please report this."
                )
    snapshot = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(enabled=None)
    provenance = {
        **run_provenance(loaded.report, MemoryProbe.for_model(loaded.model)),
        **notes,
        "cache": run.cache,
        "static_tokens": run.static_tokens or 0,
        "turns": [list(SNAPSHOT_TURN)],
    }
    return save_stripped(strip(snapshot, provenance), path)


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
