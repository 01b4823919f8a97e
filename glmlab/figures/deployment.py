"""What a model needs in each precision, against what a card has."""

import matplotlib
import pandas as pd

from glmlab.figures.settings import FigureError
from glmlab.figures.style import COLORS, STYLE, SuiteFigure
from glmlab.units import MIB

PART_COLORS = {
    "MLP": COLORS["MLP"],
    "attention": COLORS["attention"],
    "embedding": COLORS["embedding"],
    "head": COLORS["head"],
    "norms": COLORS["weights"],
    "other": COLORS["unexplained"],
    "quantisation state": COLORS["quantisation state"],
    "KV payload": COLORS["kv"],
    "CUDA context": COLORS["context"],
}
"""Parts in the order in which they are stacked."""

_LABELLED_FROM = 0.05  # a part below this share of the axis has no room for its number
_LISTED_FROM = 0.002  # and one below this is too thin to be seen, so that the legend leaves it out


def precision_chart(parts: pd.DataFrame, *, card: str, card_mib: float) -> SuiteFigure:
    """Draw the bytes of each precision, stacked by part, with a card's memory as a line.

    Args:
        parts: a row per precision, a column per part of :data:`PART_COLORS`, in bytes.
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
    if unknown := [part for part in parts.columns if part not in PART_COLORS]:
        raise FigureError(f"part {unknown[0]!r} is not known. Use {', '.join(PART_COLORS)}.")
    if (parts < 0).any(axis=None):
        raise FigureError("a part has less than 0 bytes. Give bytes.")
    stacked = (parts / MIB)[[part for part in PART_COLORS if part in parts.columns]]
    totals = stacked.sum(axis=1)
    widest = max(float(totals.max()), card_mib)
    with matplotlib.rc_context(STYLE):
        figure = SuiteFigure(figsize=(6.3, 1.5 + 0.55 * len(stacked)), layout="constrained")
        axes = figure.subplots()
        left = pd.Series(0.0, index=stacked.index)
        for part in stacked.columns:
            widths, color = stacked[part], PART_COLORS[part]
            label = part if widths.max() >= _LISTED_FROM * widest else "_nolegend_"
            axes.barh(range(len(stacked)), widths, left=left, color=color, label=label, height=0.62)
            for row, (start, width) in enumerate(zip(left, widths, strict=True)):
                if width >= _LABELLED_FROM * widest:
                    axes.annotate(
                        f"{width:,.0f}", (start, row), (3, 0), textcoords="offset points", va="center", fontsize=7,
                        color=_readable_on(color),
                    )  # fmt: skip
            left = left + widths
        names = [f"{precision}\n{total:,.0f} MiB" for precision, total in totals.items()]
        axes.set_yticks(range(len(stacked)), names)
        axes.axvline(card_mib, color=COLORS["used"], linestyle="--", label=f"{card}: {card_mib:,.0f} MiB", zorder=3)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlim(0, widest * 1.02)
        axes.set_xlabel("memory (MiB)")
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=4)
    verdicts = (
        f"{p} {total:,.0f} MiB ({'fits' if total <= card_mib else 'does not fit'})" for p, total in totals.items()
    )
    figure.alt_text = f"Memory by precision: {', '.join(verdicts)}, against {card_mib:,.0f} MiB of {card}."
    return figure


def _readable_on(color: str) -> str:
    """Black or white, whichever stands out on a colour."""
    red, green, blue = matplotlib.colors.to_rgb(color)
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
