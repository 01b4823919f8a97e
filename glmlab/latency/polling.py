"""What it costs to ask how much memory is used: three ways, timed for real on this machine.

    gpustat --json      what the chapter's script ran: a new Python process each time
    gpustat.new_query   the same question from within this process; sleeps about 100 ms for each GPU
    NVML                the driver's library itself, which the other two ask

Without an NVIDIA driver all three fail. They are timed all the same, and the table says that they failed: the process
of ``gpustat --json`` starts, imports and looks for the driver before it can know, a lower bound of what it costs.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from glmlab.core.errors import GlmlabError

SUBPROCESS = "gpustat --json (a process)"
API = "gpustat.new_query()"
NVML = "NVML"


def measure_polling(*, repetitions: int = 5) -> pd.DataFrame:
    """Time the three ways in turn.

    Args:
        repetitions: calls that count of each way, after one that does not.

    Returns:
        One row a way: way, answers (whether the driver answered), poll_ms (median), fastest_ms, repetitions, outcome
        (the error's text where it did not answer, else empty).

    Raises:
        GlmlabError: fewer than one repetition.
    """
    if repetitions < 1:
        raise GlmlabError(f"{repetitions} repetitions measure nothing. Ask for at least 1.")
    ways: Mapping[str, Callable[[], str]] = {SUBPROCESS: _by_subprocess, API: _by_gpustat, NVML: _by_nvml}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    outcomes: dict[str, str] = {}
    for repetition in range(-1, repetitions):
        for way, poll in ways.items():
            started = time.perf_counter()
            outcome = poll()
            elapsed = time.perf_counter() - started
            if repetition >= 0:
                seconds[way].append(elapsed)
                outcomes[way] = outcomes.get(way) or outcome
    return pd.DataFrame(
        {
            "way": list(ways),
            "answers": [not outcomes[way] for way in ways],
            "poll_ms": [float(np.median(seconds[way])) * 1e3 for way in ways],
            "fastest_ms": [min(seconds[way]) * 1e3 for way in ways],
            "repetitions": repetitions,
            "outcome": [outcomes[way] for way in ways],
        }
    )


def _by_subprocess() -> str:
    """Run gpustat's command in a process of its own; returns what it says where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "gpustat", "--json"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode == 0:
        return ""
    lines = (done.stderr + done.stdout).strip().splitlines()
    return lines[-1].strip() if lines else f"exit status {done.returncode}"


def _by_gpustat() -> str:
    import gpustat
    from gpustat.nvml import pynvml

    try:
        gpustat.new_query()
    except pynvml.NVMLError as error:
        return str(error)
    return ""


def _by_nvml() -> str:
    """Ask for the memory of every GPU."""
    from gpustat.nvml import pynvml

    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index))
    except pynvml.NVMLError as error:
        return str(error)
    return ""
