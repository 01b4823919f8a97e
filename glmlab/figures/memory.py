"""Memory against context: measured, forecast and reported Curves in one picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from glmlab.core.curve import Curve
from glmlab.figures.settings import FigureError, pt, tr, tr_label
from glmlab.figures.style import COLORS, SuiteFigure, drawing, legend_below, most_ticks

_MARKERS = "os^Dvp"


def memory_curve(curves: Sequence[Curve]) -> SuiteFigure:
    """Draw memory against context length: above what is used, below how much it grew, beside the exact KV payload.

    Args:
        curves: measured, forecast or reported. Each is drawn from its ``used_mib``, or ``rss_mib`` where it has no GPU.
            A reported curve counts characters; it is placed by the characters of the first curve that has both counts.

    Returns:
        A figure of two panels over context tokens, with characters on the upper axis; memory in MiB.

    Raises:
        FigureError: no curve, none with context tokens, or one without a memory column to draw.

    Example:
        >>> table = pd.DataFrame({"step": [0, 9], "turn": [0, 1], "context_tokens": [0, 900],
        ...     "context_characters": [0, 1500], "used_mib": [4710.0, 4736.0], "kv_mib": [0.0, 24.6]})
        >>> figure = memory_curve([Curve(table, label="ChatGLM3-6B, int4")])
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['memory (MiB)', 'growth since loading (MiB)']
    """
    if not curves:
        raise FigureError("no curve to draw: give at least one recording or forecast.")
    ruler = _token_ruler(curves)
    with drawing(6.3, 5.6) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        n_forecasts = 0
        for index, curve in enumerate(curves):
            if curve.kind == "forecast":
                look = _forecast_look(n_forecasts)
                n_forecasts += 1
            else:
                look = {"marker": _MARKERS[index % len(_MARKERS)]}
            _draw_memory(above, below, curve, ruler, look)
        above.set_ylabel(tr("memory (MiB)"))
        below.set_ylabel(tr("growth since loading (MiB)"))
        below.set_xlabel(tr("context length (tokens)"))
        _add_character_axis(figure, above, ruler)
        for axes in (above, below):
            axes.margins(x=0.03, y=0.12)
        legend_below(figure, *below.get_legend_handles_labels())
    figure.alt_text = " ".join([tr("Memory against context length."), *(_in_words(curve) for curve in curves)])
    return figure


def _in_words(curve: Curve) -> str:
    """One sentence on a curve: from where to where, over how long a context."""
    table = curve.table[curve.table[memory_column(curve)].notna()]
    memory = table[memory_column(curve)]
    ruler = "context_tokens" if "context_tokens" in table.columns else "context_characters"
    return tr(
        "{label} ({kind}): {first:.0f} MiB at first, {last:.0f} MiB at {length:.0f} {unit}.",
        label=tr_label(curve.label), kind=tr(curve.kind), first=memory.iloc[0], last=memory.iloc[-1],
        length=table[ruler].iloc[-1], unit=tr(ruler.removeprefix("context_")),
    )  # fmt: skip


def _forecast_look(index: int) -> dict[str, Any]:
    """Colour and width of the n-th solid line: told apart without colour, too."""
    colors = (COLORS["allocated"], COLORS["activations"], COLORS["slack large"])
    linewidth = 0.9 + 0.9 * (index % 4)
    return {"color": colors[index % len(colors)], "linewidth": pt(linewidth), "zorder": 3 - linewidth / 10}


def _draw_memory(above: Axes, below: Axes, curve: Curve, ruler: pd.DataFrame, own_look: dict[str, Any]) -> None:
    column = memory_column(curve)
    table = curve.table[curve.table[column].notna()]
    tokens = _tokens_of(table, ruler)
    memory = table[column].to_numpy(float)
    what = {"label": tr_label(curve.label), "what": tr(_COLUMN_NAMES[column]), "kind": tr(curve.kind)}
    label = tr("{label}, {what} ({kind})", **what)
    look: dict[str, Any] = {"color": COLORS["used"], **own_look}
    if curve.kind == "measured":
        look |= {"markersize": pt(4), "linewidth": pt(0.8), "linestyle": ":"}
    elif curve.kind == "forecast":
        look |= {"drawstyle": "steps-post"}
    else:
        look |= {"markersize": pt(6), "linestyle": "none", "markerfacecolor": "white"}
    if curve.kind != "reported":
        above.plot(tokens, memory, label=label, **look)
    below.plot(tokens, memory - memory[0], label=label, **look)
    if "kv_mib" in table and table["kv_mib"].notna().any():
        below.plot(
            tokens,
            table["kv_mib"] - table["kv_mib"].iloc[0],
            color=COLORS["kv"],
            linestyle="--",
            label=tr("{label}, KV payload (exact)", label=tr_label(curve.label)),
        )


_COLUMN_NAMES = {"used_mib": "GPU memory used", "rss_mib": "process memory"}


def memory_column(curve: Curve) -> str:
    """Name the column that stands for "memory" in a curve: ``used_mib``, or ``rss_mib`` where no GPU was read.

    Raises:
        FigureError: the curve has neither.
    """
    for column in _COLUMN_NAMES:
        if column in curve.memory_columns:
            return column
    raise FigureError(
        f"curve {curve.label!r} has neither used_mib nor rss_mib, only "
        f"{', '.join(curve.memory_columns)}: nothing to draw."
    )


def _token_ruler(curves: Sequence[Curve]) -> pd.DataFrame:
    """Tokens and characters of the first curve that counts both, one row a length, rising in both."""
    for curve in curves:
        if {"context_tokens", "context_characters"} <= set(curve.table.columns):
            both = curve.table[["context_tokens", "context_characters"]].dropna().astype(float)
            both = both.sort_values("context_tokens").drop_duplicates("context_tokens", keep="last")
            both = both[both["context_characters"].diff().fillna(1) > 0]
            if len(both) >= 2:
                return both
    tokens = [curve for curve in curves if "context_tokens" in curve.table.columns]
    if len(tokens) < len(curves):
        raise FigureError(
            "a curve counts characters only, and no other counts both tokens and characters to place it by. "
            "Draw it together with a recording."
        )
    return pd.DataFrame(columns=["context_tokens", "context_characters"], dtype=float)


def _tokens_of(table: pd.DataFrame, ruler: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.float64]]:
    if "context_tokens" in table.columns:
        return table["context_tokens"].to_numpy(float)
    return _convert(table["context_characters"].to_numpy(float), ruler["context_characters"], ruler["context_tokens"])


def _convert(
    values: Any, known: "pd.Series[float]", wanted: "pd.Series[float]"
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Linear interpolation; beyond the last known point at the mean rate of the whole."""
    x, y = known.to_numpy(float), wanted.to_numpy(float)
    rate = (y[-1] - y[0]) / (x[-1] - x[0])
    values = np.asarray(values, float)
    inside = np.interp(values, x, y)
    beyond = np.where(values > x[-1], (values - x[-1]) * rate, 0) + np.where(values < x[0], (values - x[0]) * rate, 0)
    return np.asarray(inside + beyond)


def _add_character_axis(figure: SuiteFigure, axes: Axes, ruler: pd.DataFrame) -> None:
    if len(ruler) < 2:
        return
    tokens, characters = ruler["context_tokens"], ruler["context_characters"]
    upper = axes.secondary_xaxis(
        "top",
        functions=(lambda x: _convert(x, tokens, characters), lambda x: _convert(x, characters, tokens)),
    )
    upper.xaxis.set_major_locator(MaxNLocator(most_ticks(figure)))
    upper.set_xlabel(tr("conversation length (characters)"))


def curves_table(curves: Sequence[Curve]) -> pd.DataFrame:
    """Stack the tables of several curves, each row with its curve's label and kind: what a figure shows, as one CSV.

    Example:
        >>> table = pd.DataFrame({"step": [0], "turn": [0], "context_tokens": [0], "used_mib": [1.0]})
        >>> curves_table([Curve(table, label="a"), Curve(table, label="b")])["curve"].tolist()
        ['a', 'b']
    """
    parts = []
    for curve in curves:
        table = curve.table.copy()
        table.insert(0, "curve", curve.label)
        table.insert(1, "kind", curve.kind)
        parts.append(table)
    return pd.concat(parts, ignore_index=True)
