"""Fixtures that several test files share."""

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import hypothesis
import lab_driver
import nbformat
import pytest
import torch
from fake_gpu import FakeDriver, build_library, install_driver
from weather import TOOL_PROMPT, WEATHER_TOOL

from glmlab import load_model
from glmlab.core.resources import data_path, environment_variable
from glmlab.forecast.forecast import Forecast
from glmlab.generation.chat import ChatSession
from glmlab.models.loading import LoadedModel
from glmlab.suite.notebooks import execute_notebook, normalize

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

hypothesis.settings.register_profile(  # a slow machine fails no test
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")

_CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """All tests of a notebook, or of a figure of data/figures, go to one worker, so that it is run or made once.

    Every other test goes where there is room. (xdist's own ``loadgroup`` marks node ids, which pytest 9 no longer lets
    it.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class BySubject(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            notebook = re.search(r"\[(\d\d_\w+|index)[-\]]", nodeid)
            figure = re.search(r"test_saved_figures.py::TestEveryFigure::.*\[(\w+)[-\]]", nodeid)
            compiled = re.search("(compil)", nodeid)  # and so is the model with compiled decode steps
            return (notebook or figure or compiled or [None, nodeid])[1]

    return BySubject(config, log)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """One thread: with more, matrix products add up in another order and exact comparisons end."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _trace_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache of traces for all tests, also of several workers; the user's own stays as it is."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with environment_variable("GLMLAB_CACHE", str(folder / "glmlab-cache")):
        yield


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


@pytest.fixture(scope="session", params=lab_driver.NOTEBOOKS)
def notebook_path(request: pytest.FixtureRequest) -> Path:
    """Every committed notebook in turn; the tests of one stay on one worker, so that it runs once."""
    return request.param


@pytest.fixture(scope="session")
def _compiled_replay() -> None:
    """Compile the replay once; on a new machine the first notebook to need it would say that it does."""
    _ = Forecast.of(trace="chatglm3-6b-original-int4", turns="8:2").replay


@pytest.fixture(scope="session")
def browser() -> "Iterator[BrowserContext]":
    """Chromium without a window, one a process."""
    if not lab_driver.HAS_BROWSER:
        pytest.skip("needs chromium (Debian: apt-get install chromium) and playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=lab_driver.CHROMIUM, args=lab_driver.CHROMIUM_FLAGS)
        yield chromium.new_context(viewport=lab_driver.VIEWPORT)


@pytest.fixture(scope="session")
def lab(browser: "BrowserContext", tmp_path_factory: pytest.TempPathFactory) -> Iterator[lab_driver.Lab]:
    """JupyterLab as ``make lab`` starts it, on a copy of the notebooks."""
    with lab_driver.running_lab(tmp_path_factory.mktemp("lab")) as server:
        yield server


@pytest.fixture(scope="session")
def lab_page(lab: lab_driver.Lab, browser: "BrowserContext") -> "Page":
    """JupyterLab in the browser, in which one notebook after the other is opened."""
    return lab_driver.open_lab(browser, lab)


@pytest.fixture(scope="session")
def in_lab(
    lab: lab_driver.Lab, lab_page: "Page", notebook_path: Path, _compiled_replay: None
) -> Iterator[lab_driver.OpenNotebook]:
    """The notebook in JupyterLab, run by Run > Run All Cells, and photographed."""
    with lab_driver.open_notebook(lab_page, lab, notebook_path.name) as notebook:
        notebook.run_all()
        notebook.screenshot()
        yield notebook


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


@dataclass(frozen=True)
class FreshRun:
    """A notebook run from a fresh kernel: what it shows now, and the folder of its figures."""

    content: nbformat.NotebookNode
    figures: Path


@pytest.fixture(scope="session")
def fresh_run(
    request: pytest.FixtureRequest,
    notebook_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    _compiled_replay: None,
) -> FreshRun:
    """One run of the notebook for all tests: in JupyterLab where there is a browser to drive, else by nbclient."""
    if lab_driver.HAS_BROWSER:
        opened = request.getfixturevalue("in_lab")
        normalize(opened.content)
        return FreshRun(opened.content, opened.lab.folder / "figures")
    folder = tmp_path_factory.mktemp(notebook_path.stem)
    shutil.copytree(notebook_path.parent, folder / "notebooks")
    executed = folder / "executed.ipynb"
    with pytest.MonkeyPatch.context() as environment:
        for name, value in lab_driver.WITHOUT_GPU.items():
            environment.setenv(name, value)
        execute_notebook(folder / "notebooks" / notebook_path.name, executed, {})
    return FreshRun(nbformat.read(executed, as_version=4), folder / "figures")


@pytest.fixture
def weather_session(embedded: LoadedModel) -> ChatSession:
    """A session that lists the weather tool, in the words that the embedded model was trained on."""
    return ChatSession(embedded, system=TOOL_PROMPT, tools=[WEATHER_TOOL], max_new_tokens=80)
