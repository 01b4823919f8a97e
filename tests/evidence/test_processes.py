"""A child ends with the process that started it: asked to end, interrupted, killed.

Child and grandchild hold the pipe that the test reads: at its end, neither is alive. One that lives on says so, later.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pytest

from glmlab.evidence.processes import run_child

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")

LATER = "import time; time.sleep(60); print('survived', flush=True)"
CHILD = f"""
import os, subprocess, sys
from glmlab.evidence.processes import end_with
end_with(os.getppid())
subprocess.Popen([sys.executable, "-c", {LATER!r}])
print("ready", flush=True)
{LATER}
"""
PARENT = f"""
import sys
from glmlab.evidence.processes import run_child
run_child([sys.executable, "-c", {CHILD!r}])
"""


@contextmanager
def started(code: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        yield process, process.stdout


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_child_and_grandchild_end_with_the_parent(number: signal.Signals, status: int) -> None:
    with started(PARENT) as (process, said):
        assert said.readline() == "ready\n"
        process.send_signal(number)
        assert said.read() == ""
    assert process.returncode == status


def test_status_is_the_childs_and_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_child([sys.executable, "-c", "raise SystemExit(4)"]) == 4
    assert run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == -signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) is before
