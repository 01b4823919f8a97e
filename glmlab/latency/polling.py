"""What it costs to ask how much memory is used: three ways, timed on this machine.

    gpustat --json      what the chapter's script ran: a new Python process each time
    gpustat.new_query   the same from within this process; sleeps about 100 ms for each GPU
    NVML                the driver's library itself, which the other two call

Without an NVIDIA driver all three fail. They are timed all the same, and the table says that they failed: a process of
``gpustat --json`` starts, imports and looks for the driver first, so its time is a lower bound of what it costs.
"""

import subprocess
import sys
import time

import numpy as np
import pandas as pd

from glmlab.latency.measure import LatencyError

SUBPROCESS = "gpustat --json (a process)"
API = "gpustat.new_query()"
NVML = "NVML"


def measure_polling(*, repetitions: int = 5) -> pd.DataFrame:
    """Time the three ways, one after the other.

    Args:
        repetitions: calls that count of each way, after one that does not.

    Returns:
        One row a way: way, answers (whether the driver answered), poll_ms (median), fastest_ms, repetitions, outcome
        (the error's text where it did not answer, else empty).

    Raises:
        LatencyError: fewer than one repetition.
    """
    if repetitions < 1:
        raise LatencyError(f"{repetitions} repetitions measure nothing. Ask for at least 1.")
    rows = []
    for way, poll in {SUBPROCESS: _by_subprocess, API: _by_gpustat, NVML: _by_nvml}.items():
        poll()
        ms, outcomes = [], []
        for _ in range(repetitions):
            started = time.perf_counter()
            outcomes.append(poll())
            ms.append((time.perf_counter() - started) * 1e3)
        outcome = max(outcomes, key=bool)
        rows.append((way, not outcome, float(np.median(ms)), min(ms), repetitions, outcome))
    return pd.DataFrame(rows, columns=["way", "answers", "poll_ms", "fastest_ms", "repetitions", "outcome"])


def _by_subprocess() -> str:
    """Run gpustat's command in a process of its own; return its error message, or an empty text."""
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
