"""Figures as files, and files as figures: pictures, the table they show, and how to draw them again.

A saved figure is ``STEM.csv`` (its one table) and ``STEM.json`` (the name of the drawing function, its arguments,
provenance, caption, alternative text) beside the pictures. From these two :func:`redraw` draws it again, in another
language, width or style, without a model. The json may come from a stranger: its function is looked up among those
registered by :func:`draws`, its arguments are checked against their types, and nothing is executed.
"""

import csv
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from html import escape
from io import BytesIO
from math import isfinite
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, cast

import matplotlib
import pandas as pd

from glmlab.core.files import write_atomically
from glmlab.core.resources import data_path, source_date
from glmlab.figures.style import FigureError, FigureSettings, SuiteFigure, figure_settings, style_rc

FORMATS = ("pdf", "svg", "png")

Arguments = dict[str, Any]
_P = ParamSpec("_P")
_LONGEST_FACT = 120  # characters of a fact in the .md; longer ones are in the .json
_MM_PER_INCH = 25.4


@dataclass(frozen=True)
class _Drawing:
    """A registered drawing function."""

    draw: Callable[..., SuiteFigure]
    columns: Mapping[str, type]
    parameters: Mapping[str, inspect.Parameter]


FUNCTIONS: dict[str, _Drawing] = {}
"""Every drawing function by name, with the columns that its table needs: what a saved figure may ask for."""


def draws(
    columns: Mapping[str, type],
    *,
    empty: str,
    convert: Callable[[Any], tuple[pd.DataFrame, Arguments]] = lambda table: (table, {}),
) -> Callable[[Callable[Concatenate[pd.DataFrame, _P], SuiteFigure]], Callable[Concatenate[Any, _P], SuiteFigure]]:
    """Register a drawing function, so that its figures can be saved and drawn again.

    The function gets a table that has the columns and at least one row, and keyword arguments that are str, int or
    float. Its figure remembers name, table and arguments.

    Args:
        columns: those that the table must have; str, int, float or bool.
        empty: the error for a table without rows.
        convert: makes table and arguments of what callers give, such as a Curve; a table of its own it leaves alone.

    The registered function raises FigureError for a table without rows or without one of the columns.
    """

    def register(
        draw: Callable[Concatenate[pd.DataFrame, _P], SuiteFigure],
    ) -> Callable[Concatenate[Any, _P], SuiteFigure]:
        @wraps(draw)
        def drawn(data: Any, *args: _P.args, **arguments: _P.kwargs) -> SuiteFigure:
            table, implied = convert(data)
            asked: Arguments = implied | arguments
            needed = [*columns, *([asked["by"]] if "by" in asked else [])]
            if missing := [column for column in needed if column not in table.columns]:
                has = ", ".join(map(str, table.columns)) or "none"
                raise FigureError(f"the table has no column {missing[0]!r}; it has {has}.")
            if table.empty:
                raise FigureError(empty)
            figure = draw(table, *args, **asked)
            figure.function, figure.table, figure.arguments = draw.__name__, table, asked
            return figure

        keywords = list(inspect.signature(draw).parameters.values())[1:]
        FUNCTIONS[draw.__name__] = _Drawing(drawn, columns, {keyword.name: keyword for keyword in keywords})
        return cast(Callable[Concatenate[Any, _P], SuiteFigure], drawn)

    return register


def save_figure(
    figure: SuiteFigure,
    stem: str | os.PathLike[str],
    *,
    provenance: Mapping[str, Any],
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Save a figure with what it shows: pictures, ``STEM.csv``, ``STEM.json`` and ``STEM.md`` (the words in Markdown).

    Equal figures give equal bytes: the only date is that of SOURCE_DATE_EPOCH, where it is set. The alternative text
    goes into every picture: as description of an SVG and a PNG, as subject of a PDF.

    Args:
        figure: from a function of glmlab.figures.
        stem: path without suffix; its folder is made.
        provenance: where the data come from: model, precision, device, versions, as far as they apply.
        formats: of pdf, svg, png.

    Returns:
        The files written.

    Raises:
        FigureError: an unknown format, a figure without its table, a folder or file that cannot be written.
        GlmlabError: a SOURCE_DATE_EPOCH that is not a number of seconds.
    """
    _check_formats(formats)
    if figure.function not in FUNCTIONS:
        raise FigureError("the figure has no table to save. Draw it with a function of glmlab.figures.")
    base = Path(stem)
    document = {
        "function": figure.function,
        "arguments": dict(figure.arguments),
        "caption": figure.caption,
        "alternative_text": figure.alt_text,
        "provenance": dict(provenance),
    }
    text = json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n"
    contents: dict[str, str | bytes] = {name: _picture(figure, name, base.name) for name in formats}
    contents["csv"] = _csv(figure.table)
    contents["json"] = text
    contents["md"] = _words(figure, base.name, json.loads(text)["provenance"])
    return [_write(base.with_name(f"{base.name}.{suffix}"), content) for suffix, content in contents.items()]


def _write(path: Path, content: str | bytes) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise FigureError(f"{path} cannot be written ({error.strerror}). Choose another folder.") from error
    return path


def _csv(table: pd.DataFrame) -> str:
    text = table.to_csv(index=False, lineterminator="\n")
    if "\r" in text:  # which is not quoted, and would end a line for a reader
        text = table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    return text


def _check_formats(formats: Sequence[str]) -> None:
    if unknown := [name for name in formats if name not in FORMATS]:
        raise FigureError(f"format {unknown[0]!r} is not known. Use {', '.join(FORMATS)}.")


def _picture(figure: SuiteFigure, file_format: str, title: str) -> bytes:
    """The bytes of a picture, with title and alternative text."""
    date = source_date()
    metadata: dict[str, Any] = {"Title": title, "Description": figure.alt_text, "Software": "glmlab"}
    if file_format == "pdf":
        metadata = {"Title": title, "Subject": figure.alt_text, "Creator": "glmlab", "Producer": None}
        metadata["CreationDate"] = date
    if file_format == "svg":
        metadata = {"Title": title, "Creator": "glmlab", "Date": date.isoformat() if date else None}
    picture = BytesIO()
    with matplotlib.rc_context(style_rc(figure.settings)):
        try:
            figure.savefig(picture, format=file_format, metadata=metadata)
        except ValueError as error:  # such as a PNG of more pixels than matplotlib draws
            raise FigureError(f"{title}.{file_format} cannot be drawn: {error}") from error
    return _described(picture.getvalue(), figure) if file_format == "svg" else picture.getvalue()


def _described(svg: bytes, figure: SuiteFigure) -> bytes:
    """The SVG as one image with a description, for programs that read pages aloud."""
    text = svg.decode("utf-8")
    root, end = text.index("<svg "), "</title>"
    after = text.index(end, root) + len(end)
    lang = "zh-Hant" if figure.settings.lang == "zh" else figure.settings.lang
    return (
        f'{text[:root]}<svg role="img" lang="{lang}" {text[root + len("<svg ") : after]}'
        f"\n <desc>{escape(figure.alt_text, quote=False)}</desc>{text[after:]}"
    ).encode()


def _words(figure: SuiteFigure, name: str, provenance: Mapping[str, Any]) -> str:
    """Caption, alternative text and provenance of a figure, as Markdown."""
    width, height = (inches * _MM_PER_INCH for inches in figure.get_size_inches())
    facts = [f"- {fact}: {value}" for fact, value in _facts(provenance)]
    return "\n".join(
        [f"# {name}", "", figure.caption, "", "## Alternative text", "", " ".join(figure.alt_text.split()), "",
         "## Provenance", "", f"- size: {width:.0f} mm x {height:.0f} mm", *facts, ""]
    )  # fmt: skip


def _facts(provenance: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Facts of a provenance on one level, those that fit a line; the .json has all of them in full."""
    for name, fact in provenance.items():
        if isinstance(fact, Mapping):
            yield from _facts(fact, f"{prefix}{name}: ")
        elif fact is not None and fact != [] and len(str(fact)) <= _LONGEST_FACT:
            yield f"{prefix}{name}", " ".join(str(fact).split())


# -- drawing saved figures again ---------------------------------------------------------------------------------------


def saved_figures(folder: Path) -> list[str]:
    """Names of the figures that a folder keeps, in alphabetical order: every .json that names a drawing function."""
    return [path.stem for path in sorted(folder.glob("*.json")) if b'"function"' in path.read_bytes()]


def find_figures(arguments: Sequence[str]) -> tuple[Path, list[str], Path]:
    """Folder to draw figures from, names of figures, and where they go if nothing else is said.

    A folder among the arguments is what contains a slash or exists. Without one it is ``figures/``, where notebooks
    save, or else the suite's own figures, of which copies go to ``figures/``.

    Raises:
        FigureError: more than one folder.
    """
    folders = [Path(argument) for argument in arguments if "/" in argument or Path(argument).is_dir()]
    names = [argument for argument in arguments if Path(argument) not in folders]
    if len(folders) > 1:
        raise FigureError(f"{folders[0]} and {folders[1]} are two folders. Give one folder, and names of figures.")
    of_notebooks = Path("figures")
    if folders or (of_notebooks.is_dir() and saved_figures(of_notebooks)):
        folder = folders[0] if folders else of_notebooks
        return folder, names, folder
    return data_path("figures"), names, of_notebooks


def redraw(
    folder: Path,
    out: Path,
    names: Sequence[str] = (),
    *,
    formats: Sequence[str] = FORMATS,
    settings: FigureSettings = FigureSettings(),  # noqa: B008 - frozen
) -> Iterator[str]:
    """Draw saved figures again from their csv and json, and save each as :func:`save_figure` does.

    Args:
        folder: keeps ``NAME.csv`` and ``NAME.json`` of every figure.
        out: the folder that the new files go into; may be the same.
        names: of figures; by default all of the folder.
        formats: of pdf, svg, png.
        settings: style, width and language; a figure that needs more than the width keeps its least width.

    Returns:
        A line on each figure as it is saved: its name and width.

    Raises:
        FigureError: a folder or figure that is not there, a file that is not what :func:`save_figure` writes, an
            unknown format, or ``out`` is a file.
    """
    _check_formats(formats)
    if not folder.is_dir():
        raise FigureError(f"{folder} is not a folder. Give one that keeps saved figures, or run make notebooks first.")
    known = saved_figures(folder)
    if not known:
        raise FigureError(f"{folder} keeps no figures (NAME.json with NAME.csv). Run make notebooks first.")
    if unknown := [name for name in names if name not in known]:
        raise FigureError(f"figure {unknown[0]!r} is not known in {folder}. Choose from {', '.join(known)}.")
    if out.exists() and not out.is_dir():
        raise FigureError(f"{out} is a file, so no figures can go into it. Give another --out.")
    return (_redrawn(folder / name, out / name, formats, settings) for name in dict.fromkeys(names or known))


def _redrawn(stem: Path, out: Path, formats: Sequence[str], settings: FigureSettings) -> str:
    with figure_settings(style=settings.style, width_mm=settings.width_mm, lang=settings.lang):
        figure, provenance = read_figure(stem)
    save_figure(figure, out, provenance=provenance, formats=formats)
    width_mm = figure.get_figwidth() * _MM_PER_INCH
    wider = settings.width_mm is not None and width_mm > settings.width_mm + 0.5
    why = f" ({settings.width_mm:g} mm asked: narrower, its letters would be too small)" if wider else ""
    return f"{stem.name}: {width_mm:.0f} mm{why}"


def read_figure(stem: Path) -> tuple[SuiteFigure, Mapping[str, Any]]:
    """Draw a saved figure in the current settings; returns it with its provenance.

    Raises:
        FigureError: a file is missing or is not what :func:`save_figure` wrote.
    """
    path = stem.with_name(f"{stem.name}.json")
    document = _read_json(path)
    function, arguments, provenance = (document.get(key) for key in ("function", "arguments", "provenance"))
    if not isinstance(arguments, dict) or not isinstance(provenance, dict):
        raise FigureError(f"{path} needs objects under arguments and provenance. Save the figure again.")
    if not isinstance(function, str) or function not in FUNCTIONS:
        raise FigureError(f"{path} asks for the function {function!r}. Known are {', '.join(FUNCTIONS)}.")
    drawing = FUNCTIONS[function]
    _check_arguments(path, drawing, arguments)
    table = _read_table(stem.with_name(f"{stem.name}.csv"), drawing.columns)
    try:
        return drawing.draw(table, **arguments), provenance
    except Exception as error:  # whatever is wrong with a stranger's table, the file is named
        raise FigureError(f"{stem} cannot be drawn by {function}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number of JSON")

    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise FigureError(f"{path} cannot be read as JSON ({error}). Save the figure again.") from error
    if not isinstance(document, dict):
        raise FigureError(f"{path} is not the .json of a figure: it holds no object. Save the figure again.")
    return document


def _check_arguments(path: Path, drawing: _Drawing, arguments: Arguments) -> None:
    known = drawing.parameters
    if unknown := [name for name in arguments if name not in known]:
        names = ", ".join(known) or "none"
        raise FigureError(f"{path} gives the argument {unknown[0]!r}, which the function does not take ({names}).")
    for name, parameter in known.items():
        if name not in arguments:
            if parameter.default is parameter.empty:
                raise FigureError(f"{path} lacks the argument {name!r}.")
            continue
        kind = int | float if parameter.annotation is float else parameter.annotation
        if isinstance(arguments[name], bool) or not isinstance(arguments[name], kind):
            raise FigureError(f"{path}: the argument {name!r} is {arguments[name]!r}, not {_name(kind)}.")


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace(" |", " or")


def _read_table(path: Path, columns: Mapping[str, type]) -> pd.DataFrame:
    """A saved table; columns that the function does not name are numbers where every cell is one, else text."""
    try:
        cells = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # pandas' errors of parsing are ValueErrors
        raise FigureError(f"{path} cannot be read as a table ({error}). Copy it beside its .json again.") from error
    if missing := [name for name in columns if name not in cells.columns]:
        raise FigureError(f"{path} has no column {missing[0]!r}; it has {', '.join(cells.columns)}.")
    return pd.DataFrame({name: _typed(cells[name], columns.get(str(name)), path) for name in cells.columns})


def _typed(cells: "pd.Series[str]", kind: type | None, path: Path) -> "pd.Series[Any]":
    """Cells as text, truth values or numbers, of which an empty cell is a missing one."""
    texts = cells.tolist()
    if kind is str:
        return cells
    if kind in (bool, None) and texts and set(texts) <= {"True", "False"}:
        return cells == "True"
    numbers = [None if kind is bool else _number(text) for text in texts]
    right = [isinstance(number, int if kind is int else (int, float)) for number in numbers]
    if all(right):
        whole = all(isinstance(number, int) for number, text in zip(numbers, texts, strict=True) if text)
        return pd.Series(numbers, name=cells.name, dtype="Int64" if kind is None and whole and "" in texts else None)
    if kind is None:
        return cells
    row = right.index(False)
    raise FigureError(f"{path}: row {row + 1} of the column {cells.name!r} is {texts[row]!r}, not {kind.__name__}.")


def _number(text: str) -> float | None:
    """A whole or finite number, nan for an empty cell, None for anything else."""
    if not text:
        return float("nan")
    if re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return None
    return number if isfinite(number) else None
