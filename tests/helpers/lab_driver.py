"""JupyterLab in a real browser: a server as ``make lab`` starts it, and a notebook as a reader runs it."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import nbformat
import pytest

from glmlab.core.resources import cache_folder

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = [pytest.param(path, id=path.stem) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
SCREENSHOTS = ROOT / "build" / "screenshots"
CHROMIUM = shutil.which("chromium")
HAS_BROWSER = CHROMIUM is not None and importlib.util.find_spec("playwright") is not None
CHROMIUM_FLAGS = (
    "--no-sandbox",  # the sandbox refuses root, and continuous integration is root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # committed outputs are those of a machine without one
THEMES = ("JupyterLab Light", "JupyterLab Dark")
VIEWPORT = {"width": 1400, "height": 1000}
NOTEBOOK_TIMEOUT_S = 600

_LAB_TIMEOUT_S = 60
_ANOTHER_KERNEL = {
    "argv": ["/nonexistent/python", "-f", "{connection_file}"],
    "display_name": "other",
    "language": "python",
}

STATE = """() => {
  const widget = window.jupyterapp?.shell.currentWidget;
  if (!widget?.content?.model || !widget.context?.isReady) return null;
  const cells = Array.from(widget.content.model.cells).filter(cell => cell.type === 'code');
  const outputs = cells.flatMap(cell => Array.from({length: cell.outputs.length}, (_, i) => cell.outputs.get(i)));
  return {
    status: widget.sessionContext.kernelDisplayStatus,
    counts: cells.map(cell => cell.executionCount),
    errors: outputs.filter(output => output.type === 'error').map(output => output.toJSON())
      .map(error => `${error.ename}: ${error.evalue}`),
  };
}"""


_CLOSE_ALL = """async () => {
  for (const widget of Array.from(jupyterapp.shell.widgets('main'))) widget.dispose();
  await jupyterapp.serviceManager.sessions.shutdownAll();
}"""


@dataclass(frozen=True)
class Lab:
    """A running server; ``url`` has no token, ``token`` was made by the server itself."""

    url: str
    token: str
    folder: Path
    pid: int


def only(beginning: str) -> pytest.MarkDecorator:
    """Run a test on the one notebook whose name begins so."""
    (notebook,) = [parameter for parameter in NOTEBOOKS if parameter.id.startswith(beginning)]
    return pytest.mark.parametrize("notebook_path", [notebook], indirect=True)


def make_lab_command() -> list[str]:
    """The command behind ``make lab``, without the program: what to open, and options."""
    (recipe,) = re.findall(r"^lab:.*\n\t(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    _program, lab, *arguments = shlex.split(recipe)
    assert lab == "lab"
    return arguments


@contextmanager
def running_lab(folder: Path) -> Iterator[Lab]:
    """Start JupyterLab by the command of ``make lab`` on a copy of the notebooks.

    The home folder is an empty one but for a kernel named python3 that is not ours: it must not be taken.

    Args:
        folder: where the copy, the home and the log go; empty.
    """
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    home = folder / "home"
    kernel = home / ".local" / "share" / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps(_ANOTHER_KERNEL))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON"))}
    environment |= {"HOME": str(home), "JUPYTER_RUNTIME_DIR": str(folder / "runtime"), **WITHOUT_GPU}
    environment["OMP_NUM_THREADS"] = "1"  # another worker runs notebooks beside this one
    environment["GLMLAB_CACHE"] = str(cache_folder())  # a trace that a test made is not made again
    command = [sys.executable, "-m", "jupyter", "lab", *make_lab_command()]
    command += ["--no-browser", "--allow-root", "--expose-app-in-browser", "--ServerApp.port=0"]
    log = folder / "lab.log"
    with log.open("w") as stream:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=stream, stderr=stream)
    try:
        yield _wait_for_server(server, folder, log)
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for_server(server: subprocess.Popen[bytes], folder: Path, log: Path) -> Lab:
    """Wait for the file in which a server says its port and token."""
    end = time.monotonic() + _LAB_TIMEOUT_S
    while time.monotonic() < end and server.poll() is None:
        for path in (folder / "runtime").glob("jpserver-*.json"):
            info = json.loads(path.read_text() or "{}")
            if info:
                return Lab(f"http://127.0.0.1:{info['port']}", info["token"], folder, server.pid)
        time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()}")


def open_lab(browser: "BrowserContext", lab: Lab) -> "Page":
    """JupyterLab in a page of its own, with no notebook open."""
    page = browser.new_page()
    page.goto(f"{lab.url}/lab?token={lab.token}&reset")
    page.wait_for_function("() => window.jupyterapp", timeout=_LAB_TIMEOUT_S * 1000)
    page.evaluate("() => jupyterapp.restored.then(() => null)")
    return page


@contextmanager
def open_notebook(page: "Page", lab: Lab, name: str) -> Iterator["OpenNotebook"]:
    """Open a notebook of the server's folder, alone, wait for its kernel, and end the kernel with the notebook."""
    notebook = OpenNotebook(page, lab, name)
    listeners = {
        "request": lambda request: notebook.requests.append(request.url),
        "websocket": lambda socket: notebook.requests.append(socket.url),
        "dialog": lambda dialog: notebook.dialogs.append(dialog.message),
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    page.evaluate(_CLOSE_ALL)
    page.evaluate("async path => { await jupyterapp.commands.execute('docmanager:open', {path}); }", name)
    notebook.wait_until("state.status === 'idle'", _LAB_TIMEOUT_S)
    notebook.use_theme(THEMES[0])
    try:
        yield notebook
    finally:
        page.evaluate(_CLOSE_ALL)
        for event, listener in listeners.items():
            page.remove_listener(event, listener)


@dataclass
class OpenNotebook:
    """A notebook in JupyterLab, driven through the menus."""

    page: "Page"
    lab: Lab
    name: str
    content: nbformat.NotebookNode = field(default_factory=nbformat.NotebookNode)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def menu(self, menu: str, item: str) -> None:
        """Click an item of a menu of the main bar."""
        self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{menu}$")).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{item}$")).click()

    def run_all(self) -> None:
        """Clear the outputs, run all cells, and wait until the kernel has done the last of them or one has failed.

        ``content`` is then what JupyterLab would save.
        """
        self.menu("Edit", "Clear Outputs of All Cells")
        self.wait_until("!state.counts.some(Boolean)", _LAB_TIMEOUT_S)
        self.menu("Run", "Run All Cells")
        self.wait_until(
            "state.errors.length || (state.status === 'idle' && state.counts.every(Boolean))", NOTEBOOK_TIMEOUT_S
        )
        saved = self.page.evaluate("() => jupyterapp.shell.currentWidget.content.model.toJSON()")
        self.content = nbformat.from_dict(saved)

    def wait_until(self, done: str, timeout_s: float) -> None:
        """Wait for a condition in JavaScript on the ``state`` of notebook and kernel."""
        condition = f"() => {{ const state = ({STATE})(); return state && ({done}); }}"
        self.page.wait_for_function(condition, polling=200, timeout=timeout_s * 1000)

    def use_theme(self, theme: str) -> None:
        """Switch JupyterLab to another theme."""
        self.page.evaluate(
            "async theme => { await jupyterapp.commands.execute('apputils:change-theme', {theme}); }", theme
        )
        self.page.wait_for_function("theme => document.body.dataset.jpThemeName === theme", arg=theme)

    def foreign_requests(self) -> list[str]:
        """Addresses asked that are not the server's."""
        host = urlsplit(self.lab.url).netloc
        parts = [(url, urlsplit(url)) for url in self.requests]
        return [url for url, part in parts if part.scheme not in ("data", "blob") and part.netloc != host]

    def screenshot(self, suffix: str = "") -> None:
        """Two pictures into build/screenshots: what the window shows, and the whole notebook."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        stem = SCREENSHOTS / f"{Path(self.name).stem}{suffix}"
        self.page.screenshot(path=f"{stem}.png")
        height = self.page.evaluate("() => document.querySelector('.jp-WindowedPanel-outer').scrollHeight")
        self.page.set_viewport_size({**VIEWPORT, "height": min(height + 200, 16_000)})
        self.page.evaluate("() => document.querySelector('.jp-WindowedPanel-outer').scrollTo(0, 0)")
        self.page.wait_for_timeout(500)
        self.page.locator(".jp-NotebookPanel").first.screenshot(path=f"{stem}_whole.png")
        self.page.set_viewport_size(VIEWPORT)
