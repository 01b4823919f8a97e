"""GPUs for tests on machines without one: the stand-in driver library, and torch.cuda's side of the same GPUs."""

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glmlab.core.units import MIB

GPU_UUIDS = tuple(f"00000000-0000-0000-0000-00000000000{gpu}" for gpu in range(4))  # as fake_nvml.c gives them
MIG_UUIDS = tuple(f"00000000-0000-0000-0001-0000000000{place:02d}" for place in range(4))  # slices of GPU 0


def build_library(folder: Path) -> Path:
    """Compile fake_nvml.c; skips the test where there is no C compiler or no Linux loader."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the stand-in for the NVIDIA driver's library needs a C compiler and Linux")
    library = folder / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("fake_nvml.c")
    subprocess.run([compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@dataclass
class FakeDriver:
    """The state that the stand-in library reports."""

    state: Path

    def says(self, *lines: str) -> None:
        self.state.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def goes_away(self) -> None:
        self.state.unlink()


def install_driver(library: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Let pynvml, and with it gpustat, call the stand-in in this process until the test ends."""
    from gpustat.nvml import pynvml

    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(library)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setenv("FAKE_NVML_STATE", str(state))
    return FakeDriver(state)


class FakeCuda:
    """torch.cuda as CUDA would present the UUIDs that CUDA_VISIBLE_DEVICES leaves visible."""

    def __init__(self, uuids: tuple[str, ...]) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.uuids = uuids if visible is None else tuple(uuids[int(entry)] for entry in visible.split(","))
        self.allocated_mib = 100
        self.peak_mib = 100

    def allocate(self, mib: int) -> None:
        self.allocated_mib += mib
        self.peak_mib = max(self.peak_mib, self.allocated_mib)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "FakeCuda":
        def reset_peak(_: int) -> None:
            self.peak_mib = self.allocated_mib

        faked: dict[str, Any] = {
            "current_device": lambda: 0,
            "get_device_capability": lambda: (8, 9),
            "get_device_properties": lambda ordinal: SimpleNamespace(uuid=self.uuids[ordinal]),
            "memory_allocated": lambda _: self.allocated_mib * MIB,
            "max_memory_allocated": lambda _: self.peak_mib * MIB,
            "memory_reserved": lambda _: 2 * self.allocated_mib * MIB,
            "max_memory_reserved": lambda _: 2 * self.peak_mib * MIB,
            "reset_peak_memory_stats": reset_peak,
        }
        for name, function in faked.items():
            monkeypatch.setattr(torch.cuda, name, function)
        return self
