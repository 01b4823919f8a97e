"""Bind executed notebooks into one document: HTML that needs no other file, or a PDF that Chromium prints from it.

nbconvert renders the notebooks and nh3 cleans what comes out. nbconvert's own ``sanitize_html`` would show every
paragraph and table heading as text, since its short list of tags cannot be changed; its webpdf needs playwright and a
Chromium of playwright's own.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
from base64 import b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import nh3
from bs4.builder import ParserRejectedMarkup
from jinja2 import Environment, FileSystemLoader
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from glmlab.core.curve import read_curve_json
from glmlab.core.errors import GlmlabError
from glmlab.core.files import write_atomically
from glmlab.core.resources import data_path, source_date
from glmlab.figures.style import CJK_FAMILY, register_cjk_font
from glmlab.suite.notebooks import find_notebooks, read_notebook

TITLE = "Where does a chat model's GPU memory go, and why?"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
"""Names of browsers that print without a window, as they are on PATH."""

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_PACKAGES = ("glmlab", "torch", "transformers", "bitsandbytes", "matplotlib", "pandas", "numpy")
_SHOWN = ["text/html", "text/markdown", "image/png", "image/jpeg", "text/plain"]  # the first that an output has
_LONGEST_PRINT_S = 300

_ATTRIBUTES = {
    "*": {"class", "id", "style", "title"},
    "a": {"href"},
    "img": {"alt", "src", "width", "height"},
    "td": {"colspan", "rowspan"},
    "th": {"colspan", "rowspan", "scope"},
}
_STYLES = {"background", "background-color", "color", "font-weight", "height", "text-align", "white-space", "width"}
_CALLS = re.compile(r"(?<!rgb)(?<!rgba)(?<!hsl)(?<!hsla)\(|\\|//")  # url(…) under any name or escape


class ReportError(GlmlabError):
    """The report cannot be bound or printed."""


@dataclass(frozen=True)
class Chapter:
    """One notebook of the report."""

    stem: str
    title: str
    sections: tuple[tuple[str, str], ...]  # id and heading
    html: str
    sha256: str


def write_report(out: Path, *, folder: Path, browser: str | None = None) -> Path:
    """Bind the notebooks of a folder into ``out``: ``.html``, or ``.pdf``.

    Args:
        out: the file to write; its folder is made.
        folder: of the executed notebooks.
        browser: name or path of the browser that prints the PDF; without it, the first of :data:`BROWSERS` on PATH.

    Raises:
        ReportError: another suffix, a place that cannot be written, no browser, or one that failed.
        NotebookError: no notebooks, or a file that is not one.
    """
    if out.suffix not in (".html", ".pdf"):
        raise ReportError(f"{out} is neither .html nor .pdf. Let --out end in one of them.")
    program = find_browser(browser) if out.suffix == ".pdf" else ""
    html = report_html(folder)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, print_pdf(html, program) if program else html)
    except OSError as error:
        raise ReportError(f"{out} cannot be written ({error.strerror}). Choose another --out.") from error
    return out


def report_html(folder: Path) -> str:
    """The notebooks of a folder as one HTML document that loads nothing and runs nothing.

    Notebooks are taken with the outputs they hold, in the order of their names, without ``index.ipynb``. Code is folded
    away. A content security policy forbids scripts and requests, should :func:`clean` miss one.

    Raises:
        NotebookError: no notebooks, or a file that is not one.
        ReportError: a notebook that was not run or cannot be a chapter.
        CurveError: a recording's .json that cannot be read.
    """
    paths = [path for path in find_notebooks(folder, []) if path.stem != "index"]
    if not paths:
        raise ReportError(f"{folder} holds no notebook but the index. Give the folder of the suite's notebooks.")
    if odd := [path.name for path in paths if not re.fullmatch(r"[\w.-]+", path.stem)]:
        raise ReportError(f"{odd[0]!r} cannot name a chapter: rename it with letters, digits, '_', '-' and '.' only.")
    stems = frozenset(path.stem for path in paths)
    templates = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True)
    code: str = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    html = templates.get_template("document.html.j2").render(
        title=TITLE,
        date=source_date() or datetime.now(UTC),
        chapters=[_chapter(path, stems) for path in paths],
        versions={name: importlib.metadata.version(name) for name in _PACKAGES} | {"Python": platform.python_version()},
        recordings={path.stem: _facts(path) for path in sorted(data_path("recordings").glob("*.json"))},
        font_family=CJK_FAMILY,
        font=b64encode(register_cjk_font().read_bytes()).decode("ascii"),
        style=(_TEMPLATES / "report.css").read_text(encoding="utf-8") + code,
    )
    return _with_code_points(html)


def clean(html: str, *, chapter: str, chapters: frozenset[str]) -> str:
    """The HTML of a chapter without anything that runs, loads or leads to a file that is not there.

    Tags, attributes, styles and addresses that are not on a list are removed. A picture stays when it is a PNG or JPEG
    inside the document.

    Args:
        html: of one notebook.
        chapter: its stem; put before every id, so that the ids of two notebooks differ.
        chapters: stems of all notebooks of the document; links to them become links inside it.

    Example:
        >>> clean('<p onclick="x()">a<script>x()</script></p>', chapter="01", chapters=frozenset())
        '<p>a</p>'
    """

    def attribute(tag: str, name: str, value: str) -> str | None:
        if name == "id":
            return f"{chapter}-{value}"
        if name == "style":
            return None if _CALLS.search(value) else value
        if name == "src":
            return value if value.startswith(("data:image/png;", "data:image/jpeg;")) else None
        if name == "href":
            stem = value.split("/")[-1].partition(".ipynb")[0]
            if value.startswith("#"):
                return f"#{chapter}-{value[1:]}"
            if ".ipynb" in value and stem in chapters:
                return f"#{stem}"
            return value if value.startswith(("https://", "http://")) else None
        if name in ("width", "height", "colspan", "rowspan"):
            return value if value.isdecimal() else None
        return value

    return nh3.clean(
        html,
        attributes=_ATTRIBUTES,
        attribute_filter=attribute,
        url_schemes={"http", "https", "data"},
        link_rel=None,
        filter_style_properties=_STYLES,
    )


def find_browser(name: str | None = None) -> str:
    """Path of the browser of this name, or of the first one on PATH that prints; ReportError where there is none."""
    found = next((path for path in map(shutil.which, [name] if name else BROWSERS) if path), None)
    if found is None:
        what = f"{name!r} is no program" if name else "no browser that prints is on PATH"
        raise ReportError(
            f"{what}. Install Chromium (Debian: apt-get install chromium) or name one with --browser, or let --out end "
            "in .html and print that from your own browser."
        )
    return found


def print_pdf(html: str, browser: str) -> bytes:
    """Print a document; the browser has a profile of its own and asks no host for anything.

    Raises:
        ReportError: the browser failed or wrote nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        page, out = Path(folder) / "report.html", Path(folder) / "report.pdf"
        page.write_text(html, encoding="utf-8")
        command = [
            browser, "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-quic", "--no-pdf-header-footer",
            f"--user-data-dir={folder}/profile", f"--print-to-pdf={out}", page.as_uri(),
        ]  # fmt: skip
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # Chromium's sandbox refuses to work for root
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_LONGEST_PRINT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ReportError(f"{browser} did not print ({error}). Name another with --browser.") from error
        if done.returncode or not out.is_file():
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ReportError(
                f"{browser} printed no PDF (exit {done.returncode}: {last}). Name another with --browser."
            )
        return out.read_bytes()


def _chapter(path: Path, stems: frozenset[str]) -> Chapter:
    notebook = read_notebook(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if any(cell.execution_count is None for cell in code):
        raise ReportError(
            f"{path.name} has cells that were not run, so the report would lack their figures. Run: glmlab notebooks "
            f"--folder {path.parent} --in-place"
        )
    notebook.metadata.pop("widgets", None)
    for cell in code:
        cell.outputs = [output for output in cell.outputs if "data" not in output or output.data.keys() & set(_SHOWN)]
    exporter = HTMLExporter(
        template_name="report",
        extra_template_basedirs=[str(_TEMPLATES)],
        anchor_link_text="",
        config=Config({"NbConvertBase": {"display_data_priority": _SHOWN}}),
    )
    try:
        raw, _ = exporter.from_notebook_node(notebook)
    except ParserRejectedMarkup as error:
        raise ReportError(
            f"{path.name} holds HTML that cannot be read, such as '<![' without its end. Take it from the suite's "
            "checkout, or run it again."
        ) from error
    html = re.sub(r'<a class="anchor-link"[^>]*></a>', "", clean(raw, chapter=path.stem, chapters=stems))
    headings = re.findall(r'<h([12]) id="([^"]+)">(.*?)</h\1>', html, re.DOTALL)
    titles = [re.sub(r"<[^>]+>", "", text) for level, _, text in headings if level == "1"]
    sections = tuple((name, re.sub(r"<[^>]+>", "", text)) for level, name, text in headings if level == "2")
    title = titles[0] if titles else escape(path.stem)
    return Chapter(path.stem, title, sections, html, hashlib.sha256(path.read_bytes()).hexdigest())


def _facts(path: Path) -> list[str]:
    """Facts of a recording in short: those that fit a line."""
    facts = read_curve_json(path)["provenance"]
    shown = ("kind", "source", "model", "precision", "device", "gpu", "driver", "os", "date")
    versions = facts.get("versions", {}).items()
    return [f"{name}: {facts[name]}" for name in shown if facts.get(name)] + [" ".join(each) for each in versions]


def _with_code_points(html: str) -> str:
    """Mark emoji, for which printers have no glyph; in print their code points stand in their place.

    Example:
        >>> _with_code_points('<p title="👋">👋</p>')
        '<p title="👋"><span class="sign" data-code="U+1F44B">👋</span></p>'
    """
    return re.sub(r">[^<]+", lambda text: _EMOJI.sub(_sign, text.group()), html)


_EMOJI = re.compile("[\U0001f000-\U0001faff]")


def _sign(match: re.Match[str]) -> str:
    return f'<span class="sign" data-code="U+{ord(match.group()):04X}">{match.group()}</span>'
