"""A child ends with the process that started it: asked to end, interrupted, killed.

Child and grandchild hold the pipe that the test reads: at its end, neither is alive. One that lives on says so, later.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
GATHER = """
import sys
from pathlib import Path
from glmlab.evidence.plan import ALL_TURNS, Run
from glmlab.evidence.runner import gather
run = Run("recording", "embedded", "fp32", turns=ALL_TURNS)
for outcome in gather([run], Path(sys.argv[1], "data"), Path(sys.argv[1], "work"), "none", budget_s=600, device="cpu"):
    print(outcome, flush=True)
"""


@contextmanager
def started(code: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    command = [sys.executable, "-c", code, *arguments]
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


def test_recording_ends_with_the_command_that_was_killed(tmp_path: Path) -> None:
    with started(GATHER, str(tmp_path)) as (process, said):
        deadline = time.monotonic() + 120
        while not (rows := list(tmp_path.glob("work/*/result.csv"))) or rows[0].read_bytes().count(b"\n") < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        assert said.read() == ""
    told = json.loads(rows[0].with_suffix(".json").read_text(encoding="utf-8"))["provenance"]
    assert told["status"] == "running"
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_status_is_the_childs_and_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_child([sys.executable, "-c", "raise SystemExit(4)"]) == 4
    assert run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == -signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) is before
