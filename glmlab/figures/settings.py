"""How large, for what medium and in which language figures are drawn: set around the call, not in each function.

Every function of the suite draws inside :func:`glmlab.figures.style.drawing`, which asks this module. Lengths in those
functions are those of the paper style; a style for another medium scales all of them alike, so that a slide is the
page seen from nearer, and a width moves what a line holds, never the size of its letters.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from glmlab.core.errors import GlmlabError
from glmlab.figures.chinese import CHINESE

LANGUAGES = ("en", "zh")

LEAST_WIDTH_MM, MOST_WIDTH_MM = 60.0, 600.0
"""Widths that a figure can be asked for, in the lengths of the paper style."""

_MM_PER_INCH = 25.4
_UNITS_MM = {"mm": 1.0, "cm": 10.0, "in": _MM_PER_INCH}


class FigureError(GlmlabError):
    """A figure cannot be drawn or saved as asked."""


@dataclass(frozen=True)
class Style:
    """A medium: how much larger than on paper everything is, and the dots per inch of a PNG."""

    scale: float
    dpi: int


STYLES = {
    "paper": Style(scale=1.0, dpi=200),  # text of 9 pt
    "slide": Style(scale=1.6, dpi=150),  # 14 pt: as wide as a slide of 10 inches
    "web": Style(scale=1.15, dpi=192),  # 14 CSS pixels, for screens of twice the density
}


@dataclass(frozen=True)
class FigureSettings:
    """Style, width and language of the figures that are drawn now; see :func:`figure_settings`."""

    style: str = "paper"
    width_mm: float | None = None
    lang: str = "en"

    def __post_init__(self) -> None:
        for what, name, known in (("style", self.style, tuple(STYLES)), ("language", self.lang, LANGUAGES)):
            if name not in known:
                raise FigureError(f"{what} {name!r} is not known. Use {', '.join(known)}.")
        least, most = LEAST_WIDTH_MM * self.scale, MOST_WIDTH_MM * self.scale
        if self.width_mm is not None and not least <= self.width_mm <= most:
            raise FigureError(
                f"a width of {self.width_mm:g}mm cannot be drawn. In the style {self.style}, give {least:g}mm to "
                f"{most:g}mm."
            )

    @property
    def scale(self) -> float:
        """How many times larger than on paper everything is drawn."""
        return STYLES[self.style].scale

    def layout_width_in(self, natural_in: float) -> float:
        """Inches, as on paper, in which a figure lays itself out; ``natural_in`` where no width is asked for."""
        return natural_in if self.width_mm is None else self.width_mm / _MM_PER_INCH / self.scale


_DEFAULT = FigureSettings()
_CURRENT: ContextVar[FigureSettings] = ContextVar("figure_settings", default=_DEFAULT)


def current_settings() -> FigureSettings:
    """The settings that the innermost :func:`figure_settings` gives, or the default ones."""
    return _CURRENT.get()


@contextmanager
def figure_settings(
    *, style: str = "paper", width_mm: float | None = None, lang: str = "en"
) -> Iterator[FigureSettings]:
    """Draw every figure of the block in a style, at a width and in a language.

    Args:
        style: paper, slide or web.
        width_mm: width of the whole figure; without it, every figure has its own.
        lang: en or zh (traditional Chinese); labels, captions and alternative texts.

    Raises:
        FigureError: an unknown style or language, or a width that is too small or too large.

    Example:
        >>> from glmlab.figures import growth_figure
        >>> import pandas as pd
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
    """Millimetres of a width such as ``86mm``, ``8.6cm`` or ``3.4in``.

    Raises:
        FigureError: no number with a unit.

    Example:
        >>> parse_width("8.6cm")
        86.0
    """
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)\s?([a-z]+)", text.strip())
    if match is None or match[2] not in _UNITS_MM:
        raise FigureError(f"width {text!r} is not a length. Give a number and mm, cm or in, such as 86mm.")
    return float(match[1]) * _UNITS_MM[match[2]]


def tr(text: str, **fields: Any) -> str:
    """A text of the suite in the language of the figure, with its fields filled in.

    Args:
        text: English; the key of the table in ``glmlab/figures/chinese.py``.
        fields: values for the names in braces.

    Raises:
        FigureError: the table has no translation.

    Example:
        >>> tr("{count:,} survive", count=3)
        '3 survive'
        >>> with figure_settings(lang="zh"):
        ...     tr("{count:,} survive", count=3)
        '剩 3 個'
    """
    if current_settings().lang == "zh":
        if text not in CHINESE:
            raise FigureError(f"{text!r} has no Chinese. Add it to glmlab/figures/chinese.py.")
        text = CHINESE[text]
    return text.format(**fields)


def tr_label(label: str) -> str:
    """The label of a curve in the language of the figure: its parts between commas, where the table has them.

    What names a model, a precision or a card is the same in every language, and stays.

    Example:
        >>> with figure_settings(lang="zh"):
        ...     tr_label("ChatGLM3-6B, original code, int4"), tr_label("")
        ('ChatGLM3-6B，原始程式碼，int4', '未命名')
    """
    if not label:
        return tr("unnamed")
    if current_settings().lang == "zh":
        return "，".join(CHINESE.get(part, part) for part in label.split(", "))
    return label


def pt(points: float) -> float:
    """A size in points, of letters, lines or marks on paper, in the style of the figure."""
    return points * current_settings().scale
