"""The stand-in GPU driver, for every test of this folder."""

from pathlib import Path

import pytest
from fake_gpu import FakeDriver, build_library, install_driver


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for the NVIDIA driver's library, compiled once."""
    return build_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def driver(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A driver that pynvml and gpustat ask in this process; ``driver.says(...)`` gives it GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install_driver(library, tmp_path / "state", monkeypatch)
