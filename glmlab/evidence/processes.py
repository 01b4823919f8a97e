"""A child process that does not outlive the one that started it, however that one ends.

When Ctrl-C or SIGTERM asks the parent to end, it kills the child's whole process group first. After SIGKILL the parent
cannot act, so the child itself checks whether its parent is still there. Both need POSIX; elsewhere only the child is
killed, and only where the parent can still act.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

IS_POSIX = os.name == "posix"
WATCH_S = 0.5
"""Seconds between a child's looks for its parent."""


def run_child(command: Sequence[str]) -> int:
    """Run a command in its own process group and wait; return its exit status, negative where a signal ended it.

    Whatever ends this function early (KeyboardInterrupt; SIGTERM, which becomes SystemExit) kills the group first. Call
    it in the main thread: no other may handle signals.
    """

    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)  # the status that a shell gives for that signal

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with subprocess.Popen(command, process_group=0 if IS_POSIX else None) as child:
            try:
                return child.wait()
            except BaseException:
                if child.poll() is None:  # not waited for yet, so the number is still its own
                    os.killpg(child.pid, signal.SIGKILL) if IS_POSIX else child.kill()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with(parent: int) -> None:
    """End this process, and the group that it leads, soon after its parent ended; a thread watches.

    Args:
        parent: the parent's process id as it knows itself: asked here, it could be gone already.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        if os.getpgrp() == os.getpid():  # run_child made the group
            os.killpg(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    if IS_POSIX:
        threading.Thread(target=watch, daemon=True, name="end with parent").start()
