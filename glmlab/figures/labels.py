"""What stands in a figure: every text goes through :func:`tr`, lines are named at their ends, areas in one legend.

The translations are ``data/locale/zh_TW/LC_MESSAGES/glmlab.po``, gettext's format. ``make messages`` collects the texts
from the code: arguments of ``tr`` and ``msg``.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import font_manager, ft2font
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from matplotlib.typing import ColorType

from glmlab.core.resources import data_path
from glmlab.figures.style import (
    HATCH_COLOR,
    STYLE,
    FigureError,
    Look,
    SuiteFigure,
    current_settings,
    pt,
    text_width_in,
    wrapped,
)
from glmlab.prompts.format import visible

LOCALES = {"zh": "zh_TW"}
"""Language of a figure -> folder of data/locale; English stands in the code."""

_FIRST_EMOJI = 0x1F000  # from here on U+…: the few that a font has are line drawings of another meaning


def msg(text: str) -> str:
    """Mark a text for translation where it is a constant; ``tr`` translates it when the figure is drawn."""
    return text


_LABEL_PARTS = (  # what labels of curves and names of stages are made of
    msg("the chapter"), msg("original code"), msg("dynamic cache"), msg("static cache"), msg("embedded"),
    msg("embeddings"), msg("repetition penalty"), msg("minimum length"), msg("temperature"), msg("eager"),
    msg("compiled"),
)  # fmt: skip


def tr(text: str, **fields: Any) -> str:
    """A text of the suite in the language of the figure, with its fields filled in.

    Raises:
        FigureError: the text has no translation.

    Example:
        >>> from glmlab.figures import figure_settings
        >>> tr("{count:,} survive", count=3)
        '3 survive'
        >>> with figure_settings(lang="zh"):
        ...     tr("{count:,} survive", count=3)
        '剩 3 個'
    """
    known = _translations(current_settings().lang)
    if known is not None:
        if text not in known:
            raise FigureError(f"{text!r} has no Chinese. Run make messages, and translate it in data/locale.")
        text = known[text]
    return text.format(**fields)


def tr_label(label: str) -> str:
    """A label of the data in the language of the figure: whole, or its parts between commas, as far as it is known.

    Names of models, precisions and cards are the same in every language.

    Example:
        >>> from glmlab.figures import figure_settings
        >>> with figure_settings(lang="zh"):
        ...     tr_label("ChatGLM3-6B, original code, int4"), tr_label("")
        ('ChatGLM3-6B，原始程式碼，int4', '未命名')
    """
    if not label:
        return tr("unnamed")
    known = _translations(current_settings().lang)
    if known is None:
        return label
    return known.get(label) or "，".join(known.get(part, part) for part in label.split(", "))


@cache
def _translations(lang: str) -> Mapping[str, str] | None:
    """English text -> translation; None for English itself."""
    if lang not in LOCALES:
        return None
    from babel.messages.pofile import read_po

    with data_path("locale", LOCALES[lang], "LC_MESSAGES", "glmlab.po").open("rb") as file:
        catalog = read_po(file, locale=LOCALES[lang])
    return {str(message.id): str(message.string) for message in catalog if message.id and message.string}


def printable(text: str) -> str:
    """Text as a figure can draw it: blanks (sentencepiece's ▁ too) as signs, as U+… what no font has, emoji first.

    Example:
        >>> printable("你好 👋")
        '你好␣U+1F44B'
    """
    return "".join(
        character if ord(character) in _drawable() and ord(character) < _FIRST_EMOJI else f"U+{ord(character):04X}"
        for character in visible(text.replace("▁", " "))
    )


@cache
def _drawable() -> frozenset[int]:
    """Code points that the fonts of STYLE have a glyph for."""
    paths = [font_manager.findfont(family, fallback_to_default=False) for family in STYLE["font.family"]]
    return frozenset(code for path in paths for code in ft2font.FT2Font(path).get_charmap())


# -- names of lines, bars and areas ------------------------------------------------------------------------------------

End = tuple[float, float, str, ColorType]
"""Where a line or area ends (x, y in data), its name, its colour."""


def label_ends(figure: SuiteFigure, axes: Axes, ends: Sequence[End]) -> None:
    """Name lines or areas at the right of a panel, each beside its end, none over another."""
    points = pt(7)
    names = [wrapped(name, 0.22 * figure.get_figwidth(), points) for _, _, name, _ in ends]
    figure.draw_without_rendering()
    wanted = (axes.transData + axes.transAxes.inverted()).transform([(x, y) for x, y, *_ in ends])[:, 1]
    line = 1.3 * points / 72 / (axes.get_window_extent().height / figure.dpi)
    room = [line * (name.count("\n") + 1) for name in names]
    order = np.argsort(wanted, kind="stable")
    places = wanted.copy()
    for before, after in pairwise(order):  # upwards, then down again from the upper edge
        places[after] = max(places[after], places[before] + (room[before] + room[after]) / 2)
    places[order[-1]] = min(places[order[-1]], 1.0)
    for after, before in pairwise(order[::-1]):
        places[before] = min(places[before], places[after] - (room[before] + room[after]) / 2)
    for (x, y, _, color), name, place in zip(ends, names, places, strict=True):
        leader: Look = {"arrowstyle": "-", "color": color, "linewidth": pt(1.0), "shrinkA": 0, "shrinkB": 0}
        axes.annotate(name, (x, y), (1.05, place), textcoords="axes fraction", va="center", fontsize=points,
                      arrowprops=leader | {"relpos": (0, 0.5)}, annotation_clip=False)  # fmt: skip


AreaLook = Sequence[str]
"""Colour and pattern."""


def area(look: AreaLook) -> Look:
    """Arguments of a bar or patch of a colour and pattern."""
    return {"facecolor": look[0], "hatch": look[1], "edgecolor": HATCH_COLOR, "linewidth": pt(0.4)}


def legend_of_areas(figure: SuiteFigure, looks: Mapping[str, AreaLook], *, ncols: int = 4) -> None:
    """Name areas below the panels, in at most ``ncols`` columns and as many as the width has room for."""
    points = float(matplotlib.rcParams["legend.fontsize"])
    room_in = figure.get_figwidth() - points / 72
    mark_in = 4.8 * points / 72  # a sample, and the gaps beside it
    for columns in range(min(ncols, len(looks)), 0, -1):
        parts = np.array_split([text_width_in(name, points) + mark_in for name in looks], columns)
        if sum(float(part.max()) for part in parts) <= room_in:
            break
    handles = [Patch(**area(look)) for look in looks.values()]
    figure.legend(handles, list(looks), loc="outside lower center", ncols=columns)


def stack_bars(axes: Axes, lengths: pd.DataFrame, looks: Mapping[str, AreaLook], names: Sequence[str]) -> None:
    """Draw a horizontal bar a row, named at its left, in parts one behind the other: the columns of the table."""
    left = np.zeros(len(lengths))
    for part in lengths:
        axes.barh(range(len(lengths)), lengths[part], left=left, height=0.62, **area(looks[str(part)]))
        left = left + lengths[part].to_numpy(float)
    name_bars(axes, names)


def name_bars(axes: Axes, names: Sequence[str]) -> None:
    """Name bars from the top down, in lines of at most a third of the figure."""
    width_in = float(axes.get_figure(root=True).get_figwidth())  # type: ignore[union-attr]
    axes.set_yticks(range(len(names)), [wrapped(name, 0.38 * width_in, pt(9)) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


WHITE_GROUND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
"""Box of a text that stands over lines."""


def write_ends(figure: SuiteFigure, axes: Axes, ends: Sequence[float], labels: Sequence[str]) -> None:
    """Write a text after every bar, and lengthen the horizontal axis until all have room inside it."""
    written = [axes.text(end, row, f" {label}", va="center", fontsize=pt(8), bbox=WHITE_GROUND)
               for row, (end, label) in enumerate(zip(ends, labels, strict=True))]  # fmt: skip
    for text in written:
        text.set_in_layout(False)  # the panel gets the width that it has in the end
    figure.draw_without_rendering()
    scale, panel = axes.xaxis.get_transform(), axes.get_window_extent().width
    left, right = scale.transform(axes.get_xlim())
    for text, end in zip(written, ends, strict=True):
        start = float(scale.transform([end])[0]) - left
        right = max(right, left + start * panel / (panel - text.get_window_extent().width))
    axes.set_xlim(right=float(scale.inverted().transform([right])[0]))


def luminance(color: ColorType) -> float:
    """Relative luminance of a colour, 0 (black) to 1 (white), as WCAG 2.1 defines it.

    Example:
        >>> luminance("white"), round(luminance("#767676"), 2)
        (1.0, 0.18)
    """
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear).round(9))


def ink_on(background: ColorType) -> str:
    """Black or white, whichever reads better on a colour: a contrast of 4.5 or more on any.

    Example:
        >>> ink_on("#0072b2"), ink_on("#e69f00")
        ('#ffffff', '#000000')
    """
    return "#000000" if (luminance(background) + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"
