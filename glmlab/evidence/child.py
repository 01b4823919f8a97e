"""One run in its own process: ``python -m glmlab.evidence.child ORDER``.

In a fresh process allocator, CUDA context and libraries start clean. The order is JSON: ``{"run": {…}, "folder": …,
"device": …, "parent": …}``. The result is left in ``folder``; the parent, whose process id the order gives, takes it
from there when the run ends with status 0. The run ends with the parent.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from glmlab.core.curve import curve_json
from glmlab.core.errors import GlmlabError
from glmlab.core.files import write_atomically
from glmlab.evidence.plan import CONVERSATION, SNAPSHOT_TURN, EvidenceError, Run
from glmlab.evidence.processes import end_with
from glmlab.generation.decoding import Keep, decode_steps
from glmlab.generation.preparation import new_cache
from glmlab.latency.measure import measure_decode, measure_first_token
from glmlab.latency.polling import measure_polling
from glmlab.latency.roofline import measure_rates, roofline
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
    settings: dict[str, Any] = {"precision": run.precision, "attention": run.attention, "compile": run.compile}
    return load_model(run.model, device=device, weights="random", **settings)


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


def time_tokens(loaded: LoadedModel, lengths: Sequence[int], path: Path, notes: Mapping[str, Any]) -> Path:
    """Time tokens at several context lengths: decode step, first token, the floor under it, gpustat's own cost.

    The .json beside the .csv is that of a recording, with the device's measured rates and gpustat's cost. The .csv has
    one row a length:

        context_tokens                           cached before a decode step, or of the prompt of a first token
        token_ms, p10_ms, p90_ms                 a decode step: median and percentiles of so many ``tokens``
        sm_clock_mhz                             the GPU's clock after them
        first_token_ms, first_token_p10_ms, …    a prefill and the choice of its token, of so many ``prefills``
        floor_ms, memory_ms, compute_ms, …       ``roofline`` at the measured rates

    Raises:
        EvidenceError: the model was to be compiled and is not, or no longer.
        LatencyError: a length that the model does not have; the device failed.
    """
    decode = measure_decode(loaded, lengths)
    compilation = loaded.report.compilation
    if compilation is not None and compilation.failure is not None:
        raise EvidenceError(
            f"{loaded.report.name} in {loaded.report.precision} cannot be compiled here ({compilation.failure}), and "
            "eager steps are no evidence of compiled ones. Install what it lacks, or leave this run out."
        )
    first = measure_first_token(loaded, lengths).rename(
        columns={
            "prompt_tokens": "context_tokens",
            "p10_ms": "first_token_p10_ms",
            "p90_ms": "first_token_p90_ms",
            "tokens": "prefills",
            "sm_clock_mhz": "first_token_sm_clock_mhz",
        }
    )
    model, precision = loaded.model, loaded.report.precision
    rates = measure_rates(model.device, threads=loaded.threads)
    floor = roofline(model.config, rates, precision=precision, contexts=lengths, dtype=model.dtype)
    table = decode.merge(first, on="context_tokens").merge(floor, on="context_tokens")
    provenance = {
        **run_provenance(loaded.report, MemoryProbe.for_model(model)),
        "clocks_before": decode.attrs["conditions"]["gpus"],
        "compilation_s": None if compilation is None else round(compilation.seconds, 3),
        "rates": asdict(rates),
        "polling": measure_polling().to_dict("records"),
        **notes,
    }
    where = ", ".join(gpu["name"] for gpu in provenance["gpus"]) or "CPU"
    how = "compiled" if provenance["compiled"] else "eager"
    label = f"{provenance['model']}, {provenance['precision']}, {how}, {where}"
    write_atomically(path.with_suffix(".json"), curve_json("measured", label, provenance))
    write_atomically(path, table.to_csv(index=False, lineterminator="\n"))
    return path


def main(argument: str) -> None:
    """Do the run that the argument orders; "gpu" prints the name of the GPU that runs take as JSON, null for none."""
    if argument == "gpu":
        name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
        print(json.dumps(name))  # noqa: T201 - the answer to the process that asks
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
