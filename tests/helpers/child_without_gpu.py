"""The evidence child on a machine without a GPU: the stand-in driver, and a made-up memory history.

Every text that the child sets for the history becomes an allocation and its free, so that a test sees which it set.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fake_gpu import GPU_UUIDS, FakeCuda
from recorded_device import RecordedDevice

from glmlab.evidence import child


class MadeUpHistory:
    """torch.cuda.memory's history: every note that is set becomes an allocation and its free."""

    def __init__(self) -> None:
        self.device = RecordedDevice()

    def start(self, enabled: str | None = "all", **asked: Any) -> None:
        if enabled is not None:
            assert asked == {"context": "alloc", "stacks": "all", "skip_actions": ["free_requested"]}

    def note(self, text: str) -> None:
        self.device.note = text
        self.device.free(self.device.malloc(1000 + len(text)))

    def snapshot(self) -> dict[str, Any]:
        self.device.history[0]["frames"] = [{"name": "forward", "filename": "/home/somebody/secret/m.py", "line": 7}]
        return self.device.snapshot()


def pretend_gpu(patch: pytest.MonkeyPatch) -> None:
    history = MadeUpHistory()
    FakeCuda(GPU_UUIDS[:1]).install(patch)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_name", lambda _=0: "NVIDIA Fake GPU")
    patch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    patch.setattr(torch.cuda.memory, "_record_memory_history", history.start)
    patch.setattr(torch.cuda.memory, "_set_memory_metadata", history.note)
    patch.setattr(torch.cuda.memory, "_snapshot", history.snapshot)
    patch.setattr(child.MemoryProbe, "for_model", classmethod(lambda cls, model: cls("cuda:0")))


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend_gpu(monkeypatch)
        child.main(sys.argv[1])
