"""Time in pictures: measured against the floor, the parts of a token, the cost of asking, an account of 1.5 s.

Measured times are dots, floors (computed) solid lines, thicker from series to series.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from glmlab.figures.settings import FigureError, pt, tr, tr_label
from glmlab.figures.style import COLORS, HATCHES, SuiteFigure, drawing, legend_below, most_ticks, wrapped

_SERIES_LOOKS = (
    ("allocated", "o"),
    ("kv", "s"),
    ("activations", "^"),
    ("slack large", "D"),
    ("used", "v"),
    ("kv copies", "p"),
)
PART_LOOKS = {
    "weights": (COLORS["weights"], ""),
    "attention": (COLORS["kv"], HATCHES["kv"]),
    "head": (COLORS["allocated"], HATCHES["kv copies"]),
    "norms, activations, rest": (COLORS["activations"], HATCHES["activations"]),
    "Python and launching": (COLORS["kv copies"], "xx"),
    "sampling": (COLORS["slack large"], HATCHES["slack large"]),
    "unexplained": (COLORS["unexplained"], ""),
}
"""Colour and pattern of every part of a token's time."""

_KIND_LOOKS = {  # kind of a row of an account -> colour, hatch
    "floor": (COLORS["allocated"], "////"),
    "estimated": (COLORS["slack small"], "...."),
    "measured here": (COLORS["kv"], ""),
    "unexplained": (COLORS["unexplained"], ""),
}


def latency_curve(table: pd.DataFrame, *, by: str = "precision") -> SuiteFigure:
    """Draw milliseconds a token against context length: above measured (dots) and floor (line), below their ratio.

    Args:
        table: rows of ``measure_decode`` with a column ``by`` that names the series and floor_ms (``roofline``).
        by: the column that tells the series apart.

    Returns:
        A figure of two panels over context tokens, both with logarithmic scales; the whiskers reach from p10 to p90.

    Raises:
        FigureError: no rows, or a column that is missing.

    Example:
        >>> table = pd.DataFrame({"precision": ["fp32"] * 2, "context_tokens": [64, 1024], "token_ms": [1.0, 2.0],
        ...     "p10_ms": [0.9, 1.9], "p90_ms": [1.2, 2.5], "floor_ms": [0.1, 0.2]})
        >>> [axes.get_ylabel() for axes in latency_curve(table).axes]
        ['time of a token (ms)', 'times the floor']
    """
    _need(table, by, "context_tokens", "token_ms", "p10_ms", "p90_ms", "floor_ms")
    with drawing(6.3, 5.6) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        words = []
        for index, (name, rows) in enumerate(table.groupby(by, sort=False)):
            color, marker = _SERIES_LOOKS[index % len(_SERIES_LOOKS)]
            _draw_series(above, rows, "token_ms", tr_label(str(name)), COLORS[color], marker)
            look: dict[str, Any] = {
                "color": COLORS[color],
                "linewidth": pt(0.8 + 0.9 * index),
                "zorder": 2 - index / 10,
            }
            above.plot(rows["context_tokens"], rows["floor_ms"], **look)
            ratio = rows["token_ms"] / rows["floor_ms"]
            below.plot(rows["context_tokens"], ratio, color=COLORS[color], marker=marker, linestyle=":", ms=pt(5))
            words.append(
                tr(
                    "{name}: {ms:.2f} ms at {tokens:,} tokens",
                    name=tr_label(str(name)), ms=rows["token_ms"].iloc[0], tokens=rows["context_tokens"].iloc[0],
                )
            )  # fmt: skip
        below.axhline(1, color=COLORS["used"])
        above.set_ylabel(tr("time of a token (ms)"))
        below.set_ylabel(tr("times the floor"))
        below.set_xlabel(tr("context length (tokens)"))
        for axes in (above, below):
            _logarithmic(axes)
        handles, labels = above.get_legend_handles_labels()
        (floor_line,) = above.plot([], [], color=COLORS["reserved"])
        legend_below(figure, [*handles, floor_line], [*labels, tr("floor (computed)")], ncols=5)
    times = table["token_ms"] / table["floor_ms"]
    figure.alt_text = tr(
        "Time of a token against context length. {series}. The measured times are {least:.3g} to {most:.3g} times the "
        "floor.",
        series="; ".join(words), least=times.min(), most=times.max(),
    )  # fmt: skip
    return figure


def first_token_curve(table: pd.DataFrame, *, by: str = "precision") -> SuiteFigure:
    """Draw the time to the first token against the length of the prompt.

    Args:
        table: rows of ``measure_first_token`` with a column ``by`` that names the series.
        by: the column that tells the series apart.

    Returns:
        A figure of one panel with logarithmic scales; the grey line grows in proportion to the prompt.

    Raises:
        FigureError: no rows, or a column that is missing.
    """
    _need(table, by, "prompt_tokens", "first_token_ms", "p10_ms", "p90_ms")
    with drawing(6.3, 3.6) as figure:
        axes = figure.subplots()
        words = []
        for index, (name, rows) in enumerate(table.groupby(by, sort=False)):
            color, marker = _SERIES_LOOKS[index % len(_SERIES_LOOKS)]
            _draw_series(axes, rows, "first_token_ms", tr_label(str(name)), COLORS[color], marker)
            last = rows.iloc[-1]
            words.append(
                tr(
                    "{name}: {ms:.0f} ms for {tokens:,.0f} tokens",
                    name=tr_label(str(name)), ms=last["first_token_ms"], tokens=last["prompt_tokens"],
                )
            )  # fmt: skip
        lengths = np.array([table["prompt_tokens"].min(), table["prompt_tokens"].max()], float)
        start = table["first_token_ms"].iloc[int(table["prompt_tokens"].argmin())]
        look: dict[str, Any] = {"color": "#999999", "linestyle": "--", "zorder": 0}
        axes.plot(lengths, start * lengths / lengths[0], label=tr("in proportion"), **look)
        axes.set_xlabel(tr("prompt (tokens)"))
        axes.set_ylabel(tr("time to the first token (ms)"))
        _logarithmic(axes)
        legend_below(figure, *axes.get_legend_handles_labels(), ncols=5)
    figure.alt_text = tr(
        "Time to the first token against the length of the prompt. {series}.", series="; ".join(words)
    )  # fmt: skip
    return figure


def token_parts_chart(table: pd.DataFrame, *, by: str = "precision") -> SuiteFigure:
    """Draw where the time of one token goes: one stacked bar a series, as long as the step.

    Args:
        table: rows of ``profile_token`` with a column ``by`` that names the series.
        by: the column that tells the series apart.

    Returns:
        A figure of horizontal bars in milliseconds; the bar's end says their sum.

    Raises:
        FigureError: no rows, a column that is missing, or a part without a look.
    """
    _need(table, by, "part", "ms")
    if unknown := sorted(set(table["part"]) - set(PART_LOOKS)):
        raise FigureError(f"part {unknown[0]!r} has no look. Known are {', '.join(PART_LOOKS)}.")
    names = list(dict.fromkeys(table[by]))
    with drawing(6.3, 1.4 + 0.5 * len(names), axes_grid_axis="x") as figure:
        axes = figure.subplots()
        words, ends = [], []
        for row, name in enumerate(names):
            parts = table[table[by] == name]
            left = 0.0
            for part, ms in zip(parts["part"], parts["ms"], strict=True):
                axes.barh(row, ms, left=left, height=0.6, **_bar_look(PART_LOOKS[part]))
                left += ms
            ends.append(axes.text(left, row, tr(" {ms:.2f} ms", ms=left), va="center", fontsize=pt(8)))
            shares = [
                tr("{part} {share:.0%}", part=tr(part), share=ms / left)
                for part, ms in zip(parts["part"], parts["ms"], strict=True)
            ]
            words.append(
                tr(
                    "{name}: {ms:.2f} ms, of which {shares}",
                    name=tr_label(str(name)),
                    ms=left,
                    shares=", ".join(shares),
                )
            )
        axes.set_yticks(range(len(names)), [tr_label(str(name)) for name in names])
        axes.invert_yaxis()
        axes.set_axisbelow(True)
        axes.set_xlabel(tr("time of one token (ms)"))
        _legend_of_looks(figure, PART_LOOKS)
        _make_room(figure, axes, ends)
    figure.alt_text = tr("Where the time of one token goes. {series}.", series="; ".join(words))
    return figure


def polling_chart(table: pd.DataFrame) -> SuiteFigure:
    """Draw what it costs to ask for the memory in use, on a logarithmic scale.

    Args:
        table: from ``measure_polling``. A way that got no answer is drawn hollow.

    Returns:
        A figure of one bar a way, in milliseconds.

    Raises:
        FigureError: no rows, or a column that is missing.
    """
    _need(table, "way", "poll_ms", "answers")
    with drawing(6.3, 1.2 + 0.45 * len(table), axes_grid_axis="x") as figure:
        axes = figure.subplots()
        words, ends = [], []
        for row, (way, ms, answers) in enumerate(zip(table["way"], table["poll_ms"], table["answers"], strict=True)):
            axes.barh(row, ms, height=0.55, **_polling_look(answers))
            ends.append(axes.text(ms, row, tr(" {ms:,.3g} ms", ms=ms), va="center", fontsize=pt(8)))
            words.append(
                tr("{name}: {ms:,.3g} ms", name=tr(way), ms=ms)
                if answers
                else tr("{name}: {ms:,.3g} ms, no driver", name=tr(way), ms=ms)
            )
        axes.set_yticks(range(len(table)), _names_in_lines(figure, table["way"]))
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(table["poll_ms"].min() / 5, table["poll_ms"].max())
        axes.xaxis.set_major_locator(LogLocator(numticks=most_ticks(figure)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_axisbelow(True)
        axes.set_xlabel(tr("time of one reading (ms)"))
        axes.xaxis.set_major_formatter(_PLAIN)
        kinds = sorted({bool(answers) for answers in table["answers"]}, reverse=True)
        names = [tr("answered") if answers else tr("no answer: no driver there") for answers in kinds]
        legend_below(figure, [Patch(**_polling_look(answers)) for answers in kinds], names, ncols=2)
        _make_room(figure, axes, ends)
    figure.alt_text = tr("What one reading of the memory costs. {series}.", series="; ".join(words))
    return figure


def account_chart(account: pd.DataFrame) -> SuiteFigure:
    """Draw an account of a token's time as a waterfall: every part begins where the one above it ends.

    Args:
        account: from ``chapter_account``.

    Returns:
        A figure of one bar a part in milliseconds; floor, estimate, measurement and the rest have looks of their own.

    Raises:
        FigureError: no rows, a column that is missing, or a kind without a look.
    """
    _need(account, "part", "kind", "seconds")
    if unknown := sorted(set(account["kind"]) - set(_KIND_LOOKS)):
        raise FigureError(f"kind {unknown[0]!r} has no look. Known are {', '.join(_KIND_LOOKS)}.")
    total_ms = account["seconds"].sum() * 1e3
    with drawing(6.3, 1.4 + 0.42 * len(account), axes_grid_axis="x") as figure:
        axes = figure.subplots()
        left, ends = 0.0, []
        for row, (kind, seconds) in enumerate(zip(account["kind"], account["seconds"], strict=True)):
            ms = seconds * 1e3
            axes.barh(row, ms, left=left, height=0.6, **_bar_look(_KIND_LOOKS[kind]))
            ends.append(axes.text(max(left, left + ms), row, f" {ms:,.0f} ms", va="center", fontsize=pt(8)))
            left += ms
            below = row + (1.3 if row < len(account) - 1 else 0.3)
            axes.plot([left, left], [row - 0.3, below], color="#999999", linewidth=pt(0.6))
        axes.axvline(total_ms, color=COLORS["used"], linewidth=pt(0.8))
        axes.set_yticks(range(len(account)), _names_in_lines(figure, account["part"]))
        axes.invert_yaxis()
        axes.set_xlim(0, max(total_ms, left))
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter(_PLAIN)
        axes.set_xlabel(
            tr("time of a token (ms); the black line is the reported {total_s:.1f} s", total_s=total_ms / 1e3)
        )
        _legend_of_looks(figure, _KIND_LOOKS)
        _make_room(figure, axes, ends)
    parts = zip(account["part"], account["kind"], account["seconds"], strict=True)
    figure.alt_text = tr(
        "An account of {total_s:.1f} s a token. {parts}.",
        total_s=total_ms / 1e3,
        parts="; ".join(
            tr("{part} ({kind}): {ms:.0f} ms", part=tr(part), kind=tr(kind), ms=seconds * 1e3)
            for part, kind, seconds in parts
        ),
    )
    return figure


_PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}")


def _need(table: pd.DataFrame, *columns: str) -> None:
    if missing := [column for column in columns if column not in table.columns]:
        raise FigureError(f"the table has no column {missing[0]!r}; it has {', '.join(table.columns) or 'none'}.")
    if table.empty:
        raise FigureError("no rows to draw: measure something first.")


def _logarithmic(axes: Axes) -> None:
    """Logarithmic scales of what is drawn, with plain numbers; lengths double from mark to mark.

    Where times span less than two powers of ten, 2 and 5 have their marks, too.
    """
    axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(_PLAIN)
    least, most = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 100 * least else (1,)))
    axes.yaxis.set_major_formatter(_PLAIN)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _polling_look(answers: bool) -> dict[str, Any]:
    """Arguments of a way's bar: hollow where it got no answer."""
    return {"facecolor": COLORS["kv"] if answers else "white", "edgecolor": COLORS["kv"]}


def _bar_look(look: tuple[str, str]) -> dict[str, Any]:
    """Arguments of a bar or a legend's patch, from its colour and pattern."""
    color, hatch = look
    return {"facecolor": color, "hatch": hatch, "edgecolor": COLORS["context"], "linewidth": pt(0.5)}


def _legend_of_looks(figure: SuiteFigure, looks: Mapping[str, tuple[str, str]]) -> None:
    legend_below(figure, [Patch(**_bar_look(look)) for look in looks.values()], [tr(name) for name in looks], ncols=4)


def _names_in_lines(figure: SuiteFigure, names: "pd.Series[str]") -> list[str]:
    """Names of bars, in lines that leave the larger part of the width to the bars."""
    return [wrapped(tr(name), 0.38 * figure.get_figwidth(), pt(9)) for name in names]


def _make_room(figure: SuiteFigure, axes: Axes, ends: Sequence[Text]) -> None:
    """Lengthen the horizontal axis until what is written behind the bars has room inside it."""
    for text in ends:
        text.set_in_layout(False)  # the panel gets the width that it has in the end
    figure.draw_without_rendering()
    scale, panel = axes.xaxis.get_transform(), axes.get_window_extent().width
    left, right = scale.transform(axes.get_xlim())
    for text in ends:
        start = float(scale.transform([text.get_position()[0]])[0]) - left
        right = max(right, left + start * panel / (panel - text.get_window_extent().width))
    axes.set_xlim(right=float(scale.inverted().transform([right])[0]))


def _draw_series(axes: Axes, rows: pd.DataFrame, column: str, label: str, color: str, marker: str) -> None:
    """Dots of the medians with whiskers from p10 to p90."""
    lengths = rows["context_tokens" if "context_tokens" in rows else "prompt_tokens"]
    whiskers = [rows[column] - rows["p10_ms"], rows["p90_ms"] - rows[column]]
    look: dict[str, Any] = {"color": color, "markersize": pt(5), "elinewidth": pt(0.8)}
    axes.errorbar(lengths, rows[column], yerr=whiskers, fmt=marker, label=label, **look)
