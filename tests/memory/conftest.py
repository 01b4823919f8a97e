"""What several tests of this folder need: the stand-in GPU driver, and the reference replay of the recorded chat."""

import importlib.util
from pathlib import Path
from types import ModuleType

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


@pytest.fixture(scope="session")
def reference(shared_data: Path) -> ModuleType:
    """The replay that came with the recorded trace of the original chat: another program, by another hand."""
    file = shared_data / "original-trace" / "replay_reference.py"
    spec = importlib.util.spec_from_file_location("replay_reference", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
