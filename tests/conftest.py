"""Fixtures that several test files share."""

import shutil
from pathlib import Path

import pytest
import torch

from glmlab import load_model
from glmlab.models.loading import LoadedModel
from glmlab.resources import data_path

_CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """One thread: with more, matrix products add up in another order and exact comparisons end."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real inputs that are not committed; tests that need it skip where it is missing."""
    folder = _CHECKOUT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real inputs (../shared/data) is not on this machine")
    return folder


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    """The embedded model in fp32 on the CPU; tests must not change it."""
    return load_model("embedded", precision="fp32", device="cpu")


@pytest.fixture(scope="session")
def compiled() -> LoadedModel:
    """The same model with compiled decode steps; tests must not change it."""
    return load_model("embedded", precision="fp32", device="cpu", compile=True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the embedded model's folder, for tests that damage it."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(data_path("tiny-chatglm3"), folder, ignore=shutil.ignore_patterns("recipe"))
    return folder
