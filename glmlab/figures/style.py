"""How figures look: colours, letters and sizes, and the style, width and language set around the call.

Drawing functions state lengths of the paper style; another style scales all of them alike, so a slide is the page seen
from nearer. A width changes how much fits on a line, never the size of the letters.
"""

import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from html import escape
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter

from glmlab.core.errors import GlmlabError
from glmlab.core.resources import data_path

COLORS = {  # Okabe and Ito's palette: distinct for colour-blind readers, and in greyscale by its order
    "used": "#000000",
    "reserved": "#56606b",
    "allocated": "#0072b2",
    "weights": "#8c8c8c",
    "MLP": "#7d6b4f",  # the parts of the weights, where they are shown apart
    "attention": "#a8946f",
    "embedding": "#cfc0a1",
    "head": "#e6dcc8",
    "quantisation state": "#b8b8b8",
    "kv": "#d55e00",
    "kv copies": "#e69f00",
    "activations": "#009e73",
    "inactive small": "#56b4e9",
    "inactive large": "#cc79a7",
    "context": "#4d4d4d",
    "unexplained": "#f0e442",
}
"""Colour of every memory component, the same everywhere."""

HATCHES = {
    "kv": "////",
    "kv copies": "\\\\\\\\",
    "activations": "....",
    "inactive small": "xxxx",
    "inactive large": "----",
}
"""Pattern of components that touch, for readers and printers without colour."""

HATCH_COLOR, GRID_COLOR = "#333333", "#999999"

LANGUAGES = ("en", "zh")

CJK_FAMILY = "Noto Sans SC Subset"
"""Family of the bundled Chinese font; data/fonts says what it covers."""

_LEAST_WIDTH_MM, _MOST_WIDTH_MM = 60.0, 600.0  # in lengths of the paper style
_MM_PER_INCH = 25.4
_UNITS_MM = {"mm": 1.0, "cm": 10.0, "in": _MM_PER_INCH}
_SCREEN_DPI = 144

PLAIN_NUMBERS = FuncFormatter(lambda value, _: f"{value:,.10g}")
"""Formatter of axes, also logarithmic ones: 1,000 instead of a power of ten."""


Look = dict[str, Any]
"""Arguments of a line, a bar or a text: colour, width, place."""


class FigureError(GlmlabError):
    """A figure cannot be drawn, saved or read as asked."""


STYLES = {
    "paper": (1.0, 200),  # text of 9 pt
    "slide": (1.6, 150),  # 14 pt: as wide as a slide of 10 inches
    "web": (1.15, 192),  # 14 CSS pixels, for screens of twice the density
}
"""Medium -> how much larger than on paper everything is, and the dots per inch of a PNG."""


@dataclass(frozen=True)
class FigureSettings:
    """Style, width and language of a figure; see :func:`figure_settings`."""

    style: str = "paper"
    width_mm: float | None = None
    lang: str = "en"

    def __post_init__(self) -> None:
        for what, name, known in (("style", self.style, tuple(STYLES)), ("language", self.lang, LANGUAGES)):
            if name not in known:
                raise FigureError(f"{what} {name!r} is not known. Use {', '.join(known)}.")
        least, most = _LEAST_WIDTH_MM * self.scale, _MOST_WIDTH_MM * self.scale
        if self.width_mm is not None and not least <= self.width_mm <= most:
            raise FigureError(
                f"a width of {self.width_mm:g}mm cannot be drawn. In the style {self.style}, give {least:g}mm to "
                f"{most:g}mm."
            )

    @property
    def scale(self) -> float:
        """How many times larger than on paper everything is drawn."""
        return STYLES[self.style][0]

    def layout_width_in(self, natural_in: float) -> float:
        """Inches, as on paper, in which a figure lays itself out; ``natural_in`` where no width is set."""
        return natural_in if self.width_mm is None else self.width_mm / _MM_PER_INCH / self.scale


_DEFAULT = FigureSettings()
_CURRENT: ContextVar[FigureSettings] = ContextVar("figure_settings", default=_DEFAULT)


def current_settings() -> FigureSettings:
    """The settings of the innermost :func:`figure_settings`, or the default ones."""
    return _CURRENT.get()


@contextmanager
def figure_settings(
    *, style: str = "paper", width_mm: float | None = None, lang: str = "en"
) -> Iterator[FigureSettings]:
    """Draw every figure of the block in a style, at a width and in a language.

    Args:
        style: paper, slide or web.
        width_mm: width of the whole figure; by default every figure has its own.
        lang: en or zh (traditional Chinese): labels, captions and alternative texts.

    Raises:
        FigureError: an unknown style or language, or a width that is too small or too large.

    Example:
        >>> from glmlab.figures import growth_figure
        >>> growth = pd.DataFrame({"turn": [1], "prompt_tokens": [7], "kept_tokens": [0], "answer_tokens": [0],
        ...     "fed_tokens": [7]})
        >>> with figure_settings(width_mm=86, lang="zh"):
        ...     figure = growth_figure(growth)
        >>> figure.axes[0].get_ylabel(), round(figure.get_figwidth() * 25.4)
        ('輪次', 86)
    """
    token = _CURRENT.set(FigureSettings(style, width_mm, lang))
    try:
        yield _CURRENT.get()
    finally:
        _CURRENT.reset(token)


def parse_width(text: str) -> float:
    """Millimetres of a width such as ``86mm``, ``8.6cm`` or ``3.4in``; FigureError for anything else.

    Example:
        >>> parse_width("8.6cm")
        86.0
    """
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)\s?([a-z]+)", text.strip())
    if match is None or match[2] not in _UNITS_MM:
        raise FigureError(f"width {text!r} is not a length. Give a number and mm, cm or in, such as 86mm.")
    return float(match[1]) * _UNITS_MM[match[2]]


def pt(points: float) -> float:
    """A size in points, of letters, lines or marks on paper, in the style of the figure."""
    return points * current_settings().scale


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
    "hatch.linewidth": 0.6,
    "text.parse_math": False,  # a dollar in a token or a name is a dollar
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.hashsalt": "glmlab",
    "savefig.dpi": 200,
}
"""matplotlib's settings in the paper style; PDFs embed their fonts as TrueType.

An SVG has its letters as outlines, so that it looks the same where the fonts are not installed. What it shows stands in
its title and description, as text.
"""

_SIZES = re.compile(  # settings in points, which a style scales
    r"font\.size|(axes|legend)\.(title|label|font)size|(axes|lines|patch|grid|hatch)\.linewidth|lines\.markersize"
    r"|axes\.(title|label)pad|[xy]tick\.(major|minor)\.(size|width|pad)"
)


def style_rc(settings: FigureSettings) -> dict[Any, Any]:
    """Settings of matplotlib for a style: :data:`STYLE` with every size in points scaled.

    Example:
        >>> style_rc(FigureSettings("slide"))["font.size"]
        14.4
    """
    known: dict[Any, Any] = {**matplotlib.rcParamsDefault, **STYLE}
    scaled = {name: size * settings.scale for name, size in known.items() if _SIZES.fullmatch(name)}
    return {**STYLE, **scaled, "savefig.dpi": STYLES[settings.style][1]}


class SuiteFigure(Figure):
    """A matplotlib Figure that shows itself in a notebook and remembers what it was drawn from."""

    alt_text = ""
    """The picture in words, for readers who do not see it."""
    caption = ""
    """What stands under it in a text: what is shown and how to read it."""
    settings = FigureSettings()
    """The settings that it was drawn with."""
    function = ""
    """Name of the drawing function; with ``table`` and ``arguments`` it draws the same figure again."""
    table = pd.DataFrame()
    """What it shows."""
    arguments: Mapping[str, Any] = {}

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        png = BytesIO()
        with matplotlib.rc_context(style_rc(self.settings)):
            self.savefig(png, format="png", dpi=_SCREEN_DPI, metadata={"Title": "figure", "Software": "glmlab"})
        width, height = (int(inches * 96) for inches in self.get_size_inches())
        return picture_bundle(png.getvalue(), self.alt_text, width, height)


def picture_bundle(png: bytes, alt: str, width: int, height: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A PNG as a notebook's output (data and metadata), with its alt text; width and height are CSS pixels.

    The metadata keep the alt text in the file. Neither JupyterLab nor nbconvert reads it there, so the same picture is
    given in HTML too, which both prefer.

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


@contextmanager
def drawing(
    width_in: float, height_in: float, *, layout: str | None = "constrained", **rc: Any
) -> Iterator[SuiteFigure]:
    """Make a figure and draw it in the block, in the current style, width and language.

    Args:
        width_in: its natural width in inches of the paper style; ``figure_settings`` may set another.
        height_in: its height, the same at every width.
        layout: matplotlib's layout engine; None for figures that place everything themselves.
        rc: matplotlib's settings beside those of the style, with ``_`` for the dots of their names.

    Example:
        >>> with drawing(6.3, 4.0, axes_grid=False) as figure:
        ...     _ = figure.subplots()
        >>> figure.get_size_inches().tolist()
        [6.3, 4.0]
    """
    settings = current_settings()
    own: dict[Any, Any] = {name.replace("_", "."): value for name, value in rc.items()}
    with matplotlib.rc_context({**style_rc(settings), **own}):
        figure = SuiteFigure(layout=layout)  # type: ignore[arg-type]
        figure.settings = settings
        set_size(figure, settings.layout_width_in(width_in), height_in)
        yield figure
        if settings.width_mm is not None and layout is not None:
            _wrap_labels(figure)


def set_size(figure: SuiteFigure, width_in: float, height_in: float) -> None:
    """Size a figure in inches of the paper style."""
    figure.set_size_inches(width_in * figure.settings.scale, height_in * figure.settings.scale)


def sheet(figure: SuiteFigure) -> Axes:
    """Axes without frame or ticks over the whole figure, for drawings that place everything themselves."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    return axes


@cache
def text_width_in(text: str, points: float) -> float:
    """Width of a text in inches, in the fonts of the figures."""
    font = font_manager.FontProperties(family=STYLE["font.family"], size=points)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, False)
    return float(width) / 72


def wrapped(text: str, room_in: float, points: float) -> str:
    """Text in lines of at most ``room_in`` inches, broken at blanks and between Chinese characters, never in a word.

    Example:
        >>> wrapped("context length (tokens)", 1.0, 9.0)
        'context length\\n(tokens)'
        >>> wrapped("輪次", 9.0, 9.0)
        '輪次'
    """
    return "\n".join(_lines(line, room_in, points) for line in text.split("\n"))


def _lines(text: str, room_in: float, points: float) -> str:
    """One line of text, broken where it must be."""
    if text_width_in(text, points) <= room_in:
        return text
    starts = [0, *(i for i, (before, after) in enumerate(pairwise(text), 1) if _may_break(before, after))]
    words = [text[start:end] for start, end in pairwise([*starts, len(text)])]
    lines = [""]
    for word in words:
        if lines[-1] and text_width_in((lines[-1] + word).rstrip(), points) > room_in:
            lines.append("")
        lines[-1] += word
    return "\n".join(line.rstrip() for line in lines)


_OPENING, _CLOSING = (
    "（「『(",
    "，。；：！？）」』、,.;:!?)",
)  # no line ends with the first, none begins with the others


def _may_break(before: str, after: str) -> bool:
    """Whether a line may end between two characters."""
    if before in _OPENING or after in _CLOSING or after == " ":
        return False
    return before == " " or max(before, after) > "\u2e7f"


def _wrap_labels(figure: SuiteFigure) -> None:
    """Break titles and labels of axes into lines that fit the figure; the letters keep their size."""
    figure.draw_without_rendering()
    whole_in = figure.get_figwidth()
    for axes in figure.axes:
        panel = axes.get_window_extent()
        middle_in = (panel.x0 + panel.x1) / 2 / figure.dpi
        alone = len({round(other.get_window_extent().x0) for other in figure.axes}) == 1
        # centred on the panel, a text may be as wide as leaves it inside the figure, or beside its neighbours
        # (0.96: letters on a screen's grid take a little more than their outlines)
        room_in = 0.96 * 2 * min(middle_in, whole_in - middle_in) if alone else panel.width / figure.dpi * 1.1
        for text in (axes.title, axes.xaxis.label, *(child.xaxis.label for child in axes.child_axes)):
            _wrap(text, room_in)
        _wrap(axes.yaxis.label, panel.height / figure.dpi * 1.05)
    for text in (figure._suptitle, figure._supxlabel):  # type: ignore[attr-defined]
        if text is not None:
            _wrap(text, whole_in)


def _wrap(text: Text, room_in: float) -> None:
    text.set_text(wrapped(text.get_text(), room_in, float(text.get_fontsize())))
