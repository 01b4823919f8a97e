"""What a model needs in each precision, against what a card has."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator

from glmlab.core.units import MIB
from glmlab.figures.settings import FigureError, pt, tr
from glmlab.figures.style import COLORS, HATCHES, SuiteFigure, drawing, ink_on, legend_below, most_ticks

PART_LOOKS = {
    "MLP": (COLORS["MLP"], ""),
    "attention": (COLORS["attention"], ""),
    "embedding": (COLORS["embedding"], ""),
    "head": (COLORS["head"], "...."),
    "norms": (COLORS["weights"], ""),
    "other": (COLORS["unexplained"], ""),
    "quantisation state": (COLORS["quantisation state"], "xxxx"),
    "KV payload": (COLORS["kv"], HATCHES["kv"]),
    "CUDA context": (COLORS["context"], ""),
}
"""Colour and pattern of every part, in the order in which they are stacked."""

_LISTED_FROM = 0.002  # a part below this share of the axis is too thin to be seen: the legend leaves it out


def precision_chart(parts: pd.DataFrame, *, card: str, card_mib: float) -> SuiteFigure:
    """Draw the bytes of each precision, stacked by part, with a card's memory as a line.

    Args:
        parts: a row per precision, a column per part of :data:`PART_LOOKS`, in bytes.
        card: what the line is called.
        card_mib: the card's memory.

    Returns:
        A figure of horizontal bars; memory in MiB, the total beside each name.

    Raises:
        FigureError: no row, a part that is not known, or a number below 0.

    Example:
        >>> parts = pd.DataFrame({"MLP": [2**30, 2**28], "KV payload": [2**20, 2**20]}, index=["bf16", "int4"])
        >>> precision_chart(parts, card="a card", card_mib=512).alt_text
        'Memory by precision: bf16 1,025 MiB (does not fit), int4 257 MiB (fits), against 512 MiB of a card.'
    """
    if parts.empty:
        raise FigureError("no precision to draw: give at least one row.")
    if unknown := [part for part in parts.columns if part not in PART_LOOKS]:
        raise FigureError(f"part {unknown[0]!r} is not known. Use {', '.join(PART_LOOKS)}.")
    if (parts < 0).any(axis=None):
        raise FigureError("a part has less than 0 bytes. Give bytes.")
    stacked = (parts / MIB)[[part for part in PART_LOOKS if part in parts.columns]]
    totals = stacked.sum(axis=1)
    widest = max(float(totals.max()), card_mib)
    with drawing(6.3, 1.7 + 0.55 * len(stacked)) as figure:
        axes = figure.subplots()
        numbers = []
        left = pd.Series(0.0, index=stacked.index)
        for part, widths in stacked.items():
            color, hatch = PART_LOOKS[str(part)]
            label = tr(str(part)) if widths.max() >= _LISTED_FROM * widest else "_nolegend_"
            bars = axes.barh(
                range(len(stacked)), widths, left=left, color=color, hatch=hatch, label=label, height=0.62
            )  # fmt: skip
            numbers += _number(axes, bars, color)
            left = left + widths
        names = [f"{precision}\n{total:,.0f} MiB" for precision, total in totals.items()]
        axes.set_yticks(range(len(stacked)), names)
        card_label = tr("{card}: {card_mib:,.0f} MiB", card=card, card_mib=card_mib)
        axes.axvline(card_mib, color=COLORS["used"], linestyle="--", label=card_label, zorder=3)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(most_ticks(figure)))
        axes.set_xlim(0, widest * 1.02)
        axes.set_xlabel(tr("memory (MiB)"))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
        legend_below(figure, *axes.get_legend_handles_labels(), ncols=4)
        figure.draw_without_rendering()
        for number, bar in numbers:
            number.set_visible(number.get_window_extent().x1 < bar.get_window_extent().x1)
    verdicts = (
        tr(
            "{precision} {total:,.0f} MiB ({verdict})",
            precision=precision, total=total, verdict=tr("fits") if total <= card_mib else tr("does not fit"),
        )
        for precision, total in totals.items()
    )  # fmt: skip
    figure.alt_text = tr(
        "Memory by precision: {verdicts}, against {card_mib:,.0f} MiB of {card}.",
        verdicts=", ".join(verdicts), card_mib=card_mib, card=card,
    )  # fmt: skip
    return figure


def _number(axes: Axes, bars: BarContainer, color: str) -> list[tuple[Annotation, Rectangle]]:
    """Write each bar's length at its left, on a ground without pattern."""
    return [
        (
            axes.annotate(
                f"{bar.get_width():,.0f}", (bar.get_x(), bar.get_y() + bar.get_height() / 2), (pt(3), 0),
                textcoords="offset points", va="center", fontsize=pt(7), color=ink_on(color),
                bbox={"facecolor": color, "edgecolor": "none", "pad": pt(1)},
            ),
            bar,
        )
        for bar in bars
    ]  # fmt: skip
