"""Bind executed notebooks into one HTML document: title page, contents, chapters, provenance."""

import hashlib
import importlib.metadata
import json
import platform
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import nbformat
from bs4.builder import ParserRejectedMarkup
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from glmlab.core.errors import GlmlabError
from glmlab.core.resources import data_path, source_date
from glmlab.figures.style import CJK_FAMILY, register_cjk_font
from glmlab.suite.notebooks import find_notebooks, read_notebook
from glmlab.suite.report_cleaning import clean, with_signs

TITLE = "Where does a chat model's GPU memory go, and why?"
_TEMPLATES = Path(__file__).resolve().parent / "templates"
_POLICY = "default-src 'none'; img-src data:; font-src data:; style-src 'unsafe-inline'"
_PACKAGES = ("glmlab", "torch", "transformers", "bitsandbytes", "matplotlib", "pandas", "numpy")


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


def report_html(folder: Path) -> str:
    """The notebooks of a folder as one HTML document that loads nothing and runs nothing.

    Notebooks are taken with the outputs that they hold, in the order of their names; ``index.ipynb`` is left out. Code
    is folded away. A content security policy forbids scripts and requests beside what cleaning.py takes out.

    Raises:
        NotebookError: no notebooks, or a file that is none.
        ReportError: a notebook that has not been run or cannot be a chapter; the .json of a recording that is none.
    """
    paths = [path for path in find_notebooks(folder, []) if path.stem != "index"]
    if not paths:
        raise ReportError(f"{folder} holds no notebook but the index. Give the folder of the suite's notebooks.")
    if odd := [path.name for path in paths if not re.fullmatch(r"[\w.-]+", path.stem)]:
        raise ReportError(f"{odd[0]!r} cannot name a chapter: rename it with letters, digits, '_', '-' and '.' only.")
    stems = frozenset(path.stem for path in paths)
    chapters = [_chapter(path, stems) for path in paths]
    date = source_date() or datetime.now(UTC)
    body = "\n".join([_title_page(date), _contents(chapters), _main(chapters), _provenance(chapters)])
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(TITLE)}</title>\n'
        f"<style>\n{_style()}</style>\n</head>\n<body>\n{with_signs(body)}\n</body>\n</html>\n"
    )


def _style() -> str:
    font = b64encode(register_cjk_font().read_bytes()).decode("ascii")
    face = f'@font-face {{ font-family: "{CJK_FAMILY}"; src: url("data:font/ttf;base64,{font}"); }}\n'
    code: str = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    return face + (_TEMPLATES / "report.css").read_text(encoding="utf-8") + code + "\n"


def _chapter(path: Path, stems: frozenset[str]) -> Chapter:
    notebook = read_notebook(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if any(cell.execution_count is None for cell in code):
        raise ReportError(
            f"{path.name} has cells that were not run, so the report would lack their figures. Run: glmlab notebooks "
            f"--folder {path.parent} --in-place"
        )
    exporter = HTMLExporter(template_name="report", extra_template_basedirs=[str(_TEMPLATES)])
    try:
        raw, _ = exporter.from_notebook_node(_with_words(notebook))
        html = clean(raw, chapter=path.stem, chapters=stems)
    except ParserRejectedMarkup as error:
        raise ReportError(
            f"{path.name} holds HTML that cannot be read, such as '<![' without its end. Take it from the suite's "
            "checkout, or run it again."
        ) from error
    headings = re.findall(r'<h([12]) id="([^"]+)">(.*?)</h\1>', html, re.DOTALL)
    titles = [re.sub(r"<[^>]+>", "", text) for level, _, text in headings if level == "1"]
    sections = tuple((name, re.sub(r"<[^>]+>", "", text)) for level, name, text in headings if level == "2")
    title = titles[0] if titles else escape(path.stem)
    return Chapter(path.stem, title, sections, html, hashlib.sha256(path.read_bytes()).hexdigest())


def _with_words(notebook: Any) -> Any:
    """The notebook with outputs as print has them: a picture's text for those who do not see it, no live views."""
    notebook = nbformat.from_dict(notebook)
    notebook.metadata.pop("widgets", None)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        for output in cell.outputs:
            data, metadata = output.get("data", {}), output.get("metadata", {})
            for kind in ("text/vnd.mermaid", "application/javascript", "application/vnd.jupyter.widget-view+json"):
                data.pop(kind, None)
            for kind in ("image/png", "image/jpeg"):
                if kind in data and not metadata.get(kind, {}).get("alt"):
                    metadata.setdefault(kind, {})["alt"] = str(data.get("text/plain", "picture"))
        cell.outputs = [output for output in cell.outputs if output.get("data", True)]
    return notebook


def _title_page(date: datetime) -> str:
    version = importlib.metadata.version("glmlab")
    return (
        f"<header><h1>{escape(TITLE)}</h1>\n<p>The notebooks of glmlab {escape(version)}, bound into "
        f"one document.</p>\n<p>{date:%d %B %Y}</p></header>"
    )


def _contents(chapters: Sequence[Chapter]) -> str:
    items = []
    for chapter in chapters:
        inner = "".join(f'<li><a href="#{name}">{text}</a></li>' for name, text in chapter.sections)
        items.append(f'<li><a href="#{chapter.stem}">{chapter.title}</a><ul>{inner}</ul></li>')
    return f"<nav><h1>Contents</h1><ol>{''.join(items)}</ol></nav>"


def _main(chapters: Sequence[Chapter]) -> str:
    parts = [f'<section id="{chapter.stem}">\n{chapter.html}\n</section>' for chapter in chapters]
    return "<main>\n" + "\n".join(parts) + "\n</main>"


def _provenance(chapters: Sequence[Chapter]) -> str:
    rows = "".join(f"<tr><td>{c.stem}.ipynb</td><td><code>{c.sha256[:16]}</code></td></tr>" for c in chapters)
    versions = {"Python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}
    bound = ", ".join(f"{name} {version}" for name, version in versions.items())
    recordings = "".join(_recording(path) for path in sorted(data_path("recordings").glob("*.json")))
    return (
        "<footer><h1>Provenance</h1>\n<h2>Notebooks</h2>\n<p>Texts, numbers and figures are those that the notebooks "
        "hold, each from one clean run. The digest is the beginning of the file's SHA-256.</p>\n"
        f"<table><thead><tr><th>notebook</th><th>digest</th></tr></thead><tbody>{rows}</tbody></table>\n"
        f"<p>Bound with {escape(bound)}.</p>\n<h2>Recordings</h2>\n<dl>{recordings}</dl></footer>"
    )


def _recording(path: Path) -> str:
    """Facts of a recording in short: those that fit a line."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        facts: Mapping[str, Any] = document.get("provenance", document)
        versions = facts.get("versions", {}).items()
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ReportError(
            f"{path.name} of data/recordings is not the JSON of a recording ({error}). Copy it again from the suite's "
            "checkout."
        ) from error
    shown = ("kind", "source", "model", "precision", "device", "gpu", "driver", "os", "date")
    told = [f"{name}: {facts[name]}" for name in shown if facts.get(name)]
    told += [f"{name} {version}" for name, version in versions]
    return f"<dt>{escape(path.stem)}</dt><dd>{escape('; '.join(told))}</dd>"
