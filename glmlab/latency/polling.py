"""What it costs to ask how much memory is used, timed on this machine.

    a process that imports gpustat    what every call of the command pays before it asks anything
    gpustat --json                    what the chapter's script ran: a new Python process each time
    gpustat.new_query                 the same from within this process; sleeps about 100 ms for each GPU
    NVML                              the driver's library itself, which the other two call

Only what answers has a time: an error comes back faster. Without an NVIDIA driver only the first does.
"""

import subprocess
import sys
import time

import numpy as np
import pandas as pd

from glmlab.latency.measure import LatencyError

STARTING = "starting Python, importing gpustat"
SUBPROCESS = "gpustat --json (a process)"
API = "gpustat.new_query()"
NVML = "NVML"


def measure_polling(*, repetitions: int = 5) -> pd.DataFrame:
    """Time every way, one after the other.

    Args:
        repetitions: calls that count of each way, after one that does not.

    Returns:
        One row a way: way, poll_ms (median), fastest_ms (both NaN where the driver did not answer), outcome (then the
        error's text, else empty).

    Raises:
        LatencyError: fewer than one repetition.
    """
    if repetitions < 1:
        raise LatencyError(f"{repetitions} repetitions measure nothing. Ask for at least 1.")
    rows = []
    for way, poll in {STARTING: _start, SUBPROCESS: _by_subprocess, API: _by_gpustat, NVML: _by_nvml}.items():
        outcome = poll()
        ms = []
        for _ in range(0 if outcome else repetitions):
            started = time.perf_counter()
            outcome = poll() or outcome
            ms.append((time.perf_counter() - started) * 1e3)
        answered = ms and not outcome
        rows.append((way, float(np.median(ms)) if answered else np.nan, min(ms) if answered else np.nan, outcome))
    return pd.DataFrame(rows, columns=["way", "poll_ms", "fastest_ms", "outcome"])


def _start() -> str:
    return _run("-c", "import gpustat")


def _by_subprocess() -> str:
    return _run("-m", "gpustat", "--json")


def _run(*arguments: str) -> str:
    """Run Python in a process of its own; return its error message, or an empty text."""
    done = subprocess.run(
        [sys.executable, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
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
