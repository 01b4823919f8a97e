"""Runs the plan: one fresh process a run, finished results kept, nothing of an interrupted run left behind.

A result lands in ``data`` only when its run has ended well, so the files there say what is finished. An interrupted run
starts anew: a chat that goes on after a break has another memory than one without. A run ends with the process that
started it (``processes.py``).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from glmlab.core.cards import short_name
from glmlab.evidence.plan import SUFFIXES, EvidenceError, Run
from glmlab.evidence.processes import run_child

CHILD = (sys.executable, "-m", "glmlab.evidence.child")
"""Command of a run's process; its argument follows."""


@dataclass(frozen=True)
class Outcome:
    """What became of one run."""

    run: Run
    status: Literal["finished", "was there", "failed", "left"]
    seconds: float = 0.0
    file: Path | None = None

    def __str__(self) -> str:
        seconds = f", {self.seconds:.0f} s" if self.status in ("finished", "failed") else ""
        return f"{self.status:<9} {self.run.name}{seconds}"


def gpu_of_this_machine(child: Sequence[str] = CHILD) -> str:
    """Short name of the GPU that the runs take; another process asks, so that this one takes no GPU memory.

    Raises:
        EvidenceError: PyTorch sees no GPU.
    """
    asked = subprocess.run([*child, "gpu"], stdout=subprocess.PIPE, text=True, check=False)
    if asked.returncode != 0:
        raise EvidenceError("the process that asks PyTorch for its GPU failed; its own words stand above.")
    name = json.loads(asked.stdout)
    if name is None:
        raise EvidenceError(
            "evidence is measured on an NVIDIA GPU, and PyTorch sees none here. 'glmlab doctor' says why; 'glmlab "
            "evidence --list' shows what would run, and 'glmlab forecast' needs no GPU."
        )
    return short_name(name)


def gather(
    runs: Sequence[Run],
    data: Path,
    work: Path,
    gpu: str,
    *,
    budget_s: float,
    device: str = "cuda",
    child: Sequence[str] = CHILD,
) -> Iterator[Outcome]:
    """Do the runs that have no result yet, one after the other; yield what became of each.

    Args:
        runs: from :func:`~glmlab.evidence.plan.choose`.
        data: the folder that keeps recordings, snapshots and times.
        work: a folder for what is under way.
        gpu: short name of the GPU, part of every result's name.
        budget_s: no run starts later than so many seconds from now; a run under way is not cut.
        device: where the models go.
        child: command of a run's process.

    Raises:
        EvidenceError: a budget below 0 or that is not a number, or a folder that cannot be made.
    """
    if not budget_s >= 0:
        raise EvidenceError(f"a budget of {budget_s / 60:g} minutes is not possible. Give --minutes 0 or more.")
    for folder in (data, work):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvidenceError(f"the folder {folder} cannot be made ({error.strerror}). Choose another.") from error
    deadline = time.monotonic() + budget_s
    for run in runs:
        file = run.file(data, gpu)
        if file.exists():
            yield Outcome(run, "was there", file=file)
        elif time.monotonic() >= deadline:
            yield Outcome(run, "left")
        else:
            yield _do(run, file, work / run.name, device, child)


def _do(run: Run, file: Path, folder: Path, device: str, child: Sequence[str]) -> Outcome:
    started = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    order = {"run": asdict(run), "folder": str(folder), "device": device, "parent": os.getpid()}
    status = run_child([*child, json.dumps(order)])
    seconds = time.monotonic() - started
    if status != 0:
        return Outcome(run, "failed", seconds)
    file.parent.mkdir(parents=True, exist_ok=True)
    suffixes = SUFFIXES[run.kind]
    for suffix in suffixes:
        shutil.move(folder / f"result{suffix}", str(file).removesuffix(suffixes[-1]) + suffix)
    shutil.rmtree(folder)
    return Outcome(run, "finished", seconds, file)
