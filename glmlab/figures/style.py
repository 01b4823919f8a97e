"""How every figure of the suite looks, shows itself in a notebook, and is saved with its data."""

import json
import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib import font_manager
from matplotlib.figure import Figure

from glmlab.errors import GlmlabError
from glmlab.resources import data_path

COLORS = {  # Okabe and Ito's palette, told apart by readers with colour blindness and in greyscale by its order
    "used": "#000000",
    "reserved": "#56606b",
    "allocated": "#0072b2",
    "weights": "#8c8c8c",
    "quantisation state": "#b8b8b8",
    "kv": "#d55e00",
    "kv copies": "#e69f00",
    "activations": "#009e73",
    "slack small": "#56b4e9",
    "slack large": "#cc79a7",
    "context": "#4d4d4d",
    "unexplained": "#f0e442",
}
"""Colour of every memory component, the same everywhere."""

CJK_FAMILY = "Noto Sans SC Subset"
"""Family of the bundled font, in which figures draw Chinese; data/fonts says what it covers."""


def register_cjk_font() -> Path:
    """Make the bundled font known to matplotlib, once; returns its file.

    Example:
        >>> register_cjk_font().name
        'NotoSansSC-subset.ttf'
    """
    path = data_path("fonts", "NotoSansSC-subset.ttf")
    if not any(font.name == CJK_FAMILY for font in font_manager.fontManager.ttflist):
        font_manager.fontManager.addfont(path)
        regular = font_manager.fontManager.ttflist[-1]
        # bold text takes the same glyphs; without an entry of its own matplotlib logs every such text
        font_manager.fontManager.ttflist.append(replace(regular, weight=700))
    return path


register_cjk_font()

STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans", CJK_FAMILY],  # the second draws what the first has no glyph for
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.4,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.hashsalt": "glmlab",
    "savefig.dpi": 200,
}
"""matplotlib settings of the suite; fonts are embedded as TrueType."""

FORMATS = ("pdf", "svg", "png")

_SCREEN_DPI = 144


class FigureError(GlmlabError):
    """A figure cannot be drawn from the data given."""


class SuiteFigure(Figure):
    """A matplotlib Figure that shows itself in a notebook, with a text for readers who do not see it."""

    alt_text = ""

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        png = BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(png, format="png", dpi=_SCREEN_DPI, metadata=_metadata("png", "figure"))
        width, height = (int(inches * 96) for inches in self.get_size_inches())
        return picture_bundle(png.getvalue(), self.alt_text, width, height)


def picture_bundle(png: bytes, alt: str, width: int, height: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A PNG as a notebook's output (data and metadata), with its alt text wherever the notebook is shown.

    nbconvert reads the alt text from the metadata. JupyterLab does not, and prefers the same picture in HTML.

    Args:
        png: the file's bytes.
        alt: the picture in words.
        width: in CSS pixels, as it is shown.
        height: likewise.

    Example:
        >>> data, metadata = picture_bundle(b"...", "Memory < 8 GiB", 604, 441)
        >>> data["text/html"]
        '<img src="data:image/png;base64,Li4u" alt="Memory &lt; 8 GiB" width="604" height="441" style="height:auto">'
    """
    encoded = b64encode(png).decode("ascii")
    html = (
        f'<img src="data:image/png;base64,{encoded}" alt="{escape(alt)}" width="{width}" height="{height}" '
        'style="height:auto">'
    )
    return (
        {"image/png": encoded, "text/html": html, "text/plain": alt},
        {"image/png": {"alt": alt, "width": width, "height": height}},
    )


def save_figure(
    figure: Figure,
    stem: str | os.PathLike[str],
    *,
    data: pd.DataFrame,
    provenance: Mapping[str, Any],
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Save a figure with what it shows: ``STEM.pdf``, ``.svg``, ``.png``, ``.csv`` and ``.json``.

    Equal figures give equal bytes: the only date is that of SOURCE_DATE_EPOCH, where it is set.

    Args:
        figure: from a function of this module.
        stem: path without suffix; its folder is made.
        data: the table that the figure shows.
        provenance: where the data come from; it becomes the ``.json``.
        formats: of pdf, svg, png.

    Returns:
        The files written.

    Raises:
        FigureError: an unknown format, or a folder that cannot be written.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise FigureError(f"format {unknown[0]!r} is not known. Use {', '.join(FORMATS)}.")
    base = Path(stem)
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FigureError(f"{base.parent} cannot be made ({error.strerror}). Choose another folder.") from error
    written = []
    with matplotlib.rc_context(STYLE):
        for name in formats:
            path = base.with_name(f"{base.name}.{name}")
            figure.savefig(path, metadata=_metadata(name, base.name))
            written.append(path)
    csv_path, json_path = base.with_name(f"{base.name}.csv"), base.with_name(f"{base.name}.json")
    data.to_csv(csv_path, index=False, lineterminator="\n")
    json_path.write_text(
        json.dumps(dict(provenance), indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8"
    )
    return [*written, csv_path, json_path]


def _metadata(file_format: str, title: str) -> dict[str, Any]:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    date = datetime.fromtimestamp(int(epoch), UTC) if epoch else None
    if file_format == "pdf":
        return {"Title": title, "Creator": "glmlab", "Producer": None, "CreationDate": date}
    if file_format == "svg":
        return {"Title": title, "Creator": "glmlab", "Date": date.isoformat() if date else None}
    return {"Title": title, "Software": "glmlab"}
