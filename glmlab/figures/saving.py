"""How a figure is saved: the picture in every format, its data as a table, and where they come from."""

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from glmlab.core.resources import source_date
from glmlab.figures.settings import FigureError, FigureSettings
from glmlab.figures.style import style_rc

FORMATS = ("pdf", "svg", "png")


def save_figure(
    figure: Figure,
    stem: str | os.PathLike[str],
    *,
    data: pd.DataFrame,
    provenance: Mapping[str, Any],
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Save a figure with what it shows: ``STEM.pdf``, ``.svg``, ``.png``, ``.csv`` and ``.json``.

    Equal figures give equal bytes: the only date is that of SOURCE_DATE_EPOCH, where it is set. The figure's
    alternative text goes into every picture: as description of an SVG and a PNG, as subject of a PDF.

    Args:
        figure: from a function of this package.
        stem: path without suffix; its folder is made.
        data: the table that the figure shows.
        provenance: where the data come from; it becomes the ``.json``.
        formats: of pdf, svg, png.

    Returns:
        The files written.

    Raises:
        FigureError: an unknown format, or a folder or file that cannot be written.
        GlmlabError: a SOURCE_DATE_EPOCH that is no number of seconds.
    """
    check_formats(formats)
    base = Path(stem)
    settings = getattr(figure, "settings", FigureSettings())
    alt_text = getattr(figure, "alt_text", "")
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FigureError(f"{base.parent} cannot be made ({error.strerror}). Choose another folder.") from error
    contents: dict[str, bytes] = {}
    with matplotlib.rc_context(style_rc(settings)):
        for name in formats:
            picture = BytesIO()
            figure.savefig(picture, format=name, metadata=_metadata(name, base.name, alt_text))
            contents[name] = picture.getvalue()
    if "svg" in contents:
        contents["svg"] = _described(contents["svg"], alt_text, settings.lang)
    contents["csv"] = data.to_csv(index=False, lineterminator="\n").encode("utf-8")
    contents["json"] = (json.dumps(dict(provenance), indent=2, ensure_ascii=False, default=str) + "\n").encode("utf-8")
    written = []
    for suffix, content in contents.items():
        path = base.with_name(f"{base.name}.{suffix}")
        write_file(path, content)
        written.append(path)
    return written


def write_file(path: Path, content: bytes) -> None:
    """Write a file; :class:`FigureError` where it cannot be."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise FigureError(f"{path} cannot be written ({error.strerror}). Choose another folder.") from error


def check_formats(formats: Sequence[str]) -> None:
    """Raise :class:`FigureError` for a format that figures are not saved in."""
    if unknown := [name for name in formats if name not in FORMATS]:
        raise FigureError(f"format {unknown[0]!r} is not known. Use {', '.join(FORMATS)}.")


def _metadata(file_format: str, title: str, alt_text: str) -> dict[str, Any]:
    date = source_date()
    if file_format == "pdf":
        return {"Title": title, "Subject": alt_text, "Creator": "glmlab", "Producer": None, "CreationDate": date}
    if file_format == "svg":
        return {"Title": title, "Creator": "glmlab", "Date": date.isoformat() if date else None}
    return {"Title": title, "Description": alt_text, "Software": "glmlab"}


def _described(svg: bytes, alt_text: str, lang: str) -> bytes:
    """The SVG as one image with a description, for programs that read pages aloud."""
    text = svg.decode("utf-8")
    root, end = text.index("<svg "), "</title>"
    after = text.index(end, root) + len(end)
    return (
        f'{text[:root]}<svg role="img" lang="{"zh-Hant" if lang == "zh" else lang}" {text[root + len("<svg ") : after]}'
        f"\n <desc>{escape(alt_text, quote=False)}</desc>{text[after:]}"
    ).encode()
