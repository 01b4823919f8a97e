"""Time in pictures: measured against the floor, the parts of a token, the cost of asking, an account of 1.5 s.

Measured times are dots, floors (computed) solid lines; in bars, what is computed or estimated is hatched.
"""

from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from glmlab.figures.settings import FigureError
from glmlab.figures.style import COLORS, STYLE, SuiteFigure

_SERIES_LOOKS = (
    ("allocated", "o"),
    ("kv", "s"),
    ("activations", "^"),
    ("slack large", "D"),
    ("used", "v"),
    ("kv copies", "p"),
)
PART_COLORS = {
    "weights": COLORS["weights"],
    "attention": COLORS["kv"],
    "head": COLORS["allocated"],
    "norms, activations, rest": COLORS["activations"],
    "Python and launching": COLORS["kv copies"],
    "sampling": COLORS["slack large"],
    "unexplained": COLORS["unexplained"],
}
"""Colour of every part of a token's time."""

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
    with matplotlib.rc_context(STYLE):
        figure = SuiteFigure(figsize=(6.3, 5.6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        words = []
        for (name, rows), (color, marker) in zip(table.groupby(by, sort=False), _SERIES_LOOKS * 9, strict=False):
            _draw_series(above, rows, "token_ms", str(name), COLORS[color], marker)
            above.plot(rows["context_tokens"], rows["floor_ms"], color=COLORS[color])
            ratio = rows["token_ms"] / rows["floor_ms"]
            below.plot(rows["context_tokens"], ratio, color=COLORS[color], marker=marker, linestyle=":", markersize=5)
            words.append(f"{name}: {rows['token_ms'].iloc[0]:.2f} ms at {rows['context_tokens'].iloc[0]:,} tokens")
        below.axhline(1, color=COLORS["used"])
        above.set_ylabel("time of a token (ms)")
        below.set_ylabel("times the floor")
        below.set_xlabel("context length (tokens)")
        for axes in (above, below):
            axes.set_yscale("log")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(_PLAIN)
            axes.yaxis.set_major_formatter(_PLAIN)
        handles, labels = above.get_legend_handles_labels()
        (floor_line,) = above.plot([], [], color=COLORS["reserved"])
        figure.legend([*handles, floor_line], [*labels, "floor (computed)"], loc="outside lower center", ncols=5)
    times = table["token_ms"] / table["floor_ms"]
    figure.alt_text = (
        f"Time of a token against context length, by {by}. {'; '.join(words)}. The measured times are "
        f"{times.min():.3g} to {times.max():.3g} times the floor."
    )
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
    with matplotlib.rc_context(STYLE):
        figure = SuiteFigure(figsize=(6.3, 3.4), layout="constrained")
        axes = figure.subplots()
        words = []
        for (name, rows), (color, marker) in zip(table.groupby(by, sort=False), _SERIES_LOOKS * 9, strict=False):
            _draw_series(axes, rows, "first_token_ms", str(name), COLORS[color], marker)
            last = rows.iloc[-1]
            words.append(f"{name}: {last['first_token_ms']:.0f} ms for {last['prompt_tokens']:,.0f} tokens")
        lengths = np.array([table["prompt_tokens"].min(), table["prompt_tokens"].max()], float)
        start = table["first_token_ms"].iloc[int(table["prompt_tokens"].argmin())]
        axes.plot(
            lengths, start * lengths / lengths[0], color="#999999", linestyle="--", label="in proportion", zorder=0
        )
        axes.set_xlabel("prompt (tokens)")
        axes.set_ylabel("time to the first token (ms)")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(_PLAIN)
        axes.yaxis.set_major_formatter(_PLAIN)
        axes.legend(loc="upper left")
    figure.alt_text = f"Time to the first token against the length of the prompt. {'; '.join(words)}."
    return figure


def token_parts_chart(table: pd.DataFrame, *, by: str = "precision") -> SuiteFigure:
    """Draw where the time of one token goes: one stacked bar a series, as long as the step.

    Args:
        table: rows of ``profile_token`` with a column ``by`` that names the series.
        by: the column that tells the series apart.

    Returns:
        A figure of horizontal bars in milliseconds; the bar's end says their sum.

    Raises:
        FigureError: no rows, a column that is missing, or a part without a colour.
    """
    _need(table, by, "part", "ms")
    if unknown := sorted(set(table["part"]) - set(PART_COLORS)):
        raise FigureError(f"part {unknown[0]!r} has no colour. Known are {', '.join(PART_COLORS)}.")
    names = list(dict.fromkeys(table[by]))
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = SuiteFigure(figsize=(6.3, 1.2 + 0.55 * len(names)), layout="constrained")
        axes = figure.subplots()
        words = []
        for row, name in enumerate(names):
            parts = table[table[by] == name]
            left = 0.0
            for part, ms in zip(parts["part"], parts["ms"], strict=True):
                axes.barh(row, ms, left=left, height=0.6, color=PART_COLORS[part], edgecolor="white", linewidth=0.4)
                left += ms
            axes.text(left, row, f" {left:.2f} ms", va="center", fontsize=8)
            largest = parts.iloc[int(parts["ms"].argmax())]
            words.append(f"{name}: {left:.2f} ms, most of it {largest['part']} ({largest['ms'] / left:.0%})")
        axes.set_yticks(range(len(names)), [str(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlabel("time of one token (ms)")
        axes.margins(x=0.12)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0] if (table["ms"] < 0).any() else 0.0))
        handles = [Patch(facecolor=color, label=part) for part, color in PART_COLORS.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    figure.alt_text = f"Where the time of one token goes, by {by}. {'; '.join(words)}."
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
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = SuiteFigure(figsize=(6.3, 0.9 + 0.45 * len(table)), layout="constrained")
        axes = figure.subplots()
        words = []
        for row, (way, ms, answers) in enumerate(zip(table["way"], table["poll_ms"], table["answers"], strict=True)):
            look: dict[str, Any] = {"facecolor": COLORS["kv"] if answers else "white", "edgecolor": COLORS["kv"]}
            axes.barh(row, ms, height=0.55, **look)
            note = "" if answers else ", no driver"
            axes.text(ms, row, f" {ms:,.3g} ms{note}", va="center", fontsize=8)
            words.append(f"{way}: {ms:,.3g} ms{note}")
        axes.set_yticks(range(len(table)), table["way"])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(table["poll_ms"].min() / 5, table["poll_ms"].max() * 100)
        axes.set_axisbelow(True)
        axes.set_xlabel("time of one reading (ms)")
        axes.xaxis.set_major_formatter(_PLAIN)
    figure.alt_text = f"What one reading of the memory costs. {'; '.join(words)}."
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
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = SuiteFigure(figsize=(6.3, 1.3 + 0.4 * len(account)), layout="constrained")
        axes = figure.subplots()
        left = 0.0
        for row, (kind, seconds) in enumerate(zip(account["kind"], account["seconds"], strict=True)):
            color, hatch = _KIND_LOOKS[kind]
            ms = seconds * 1e3
            axes.barh(row, ms, left=left, height=0.6, facecolor=color, hatch=hatch, edgecolor=COLORS["context"], lw=0.6)
            axes.text(max(left, left + ms), row, f" {ms:,.0f} ms", va="center", fontsize=8)
            left += ms
            axes.plot(
                [left, left], [row - 0.3, row + 1.3 if row < len(account) - 1 else row + 0.3], color="#999999", lw=0.6
            )
        axes.axvline(total_ms, color=COLORS["used"], lw=0.8)
        axes.set_yticks(range(len(account)), account["part"])
        axes.invert_yaxis()
        axes.set_xlim(0, max(total_ms, left) * 1.15)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"time of a token (ms); the black line is the reported {total_ms / 1e3:.1f} s")
        handles = [
            Patch(facecolor=color, hatch=hatch, edgecolor=COLORS["context"], linewidth=0.6, label=kind)
            for kind, (color, hatch) in _KIND_LOOKS.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    figure.alt_text = f"An account of {total_ms / 1e3:.1f} s a token. " + "; ".join(
        f"{part} ({kind}): {seconds * 1e3:.0f} ms"
        for part, kind, seconds in zip(account["part"], account["kind"], account["seconds"], strict=True)
    )
    return figure


_PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}")


def _need(table: pd.DataFrame, *columns: str) -> None:
    if missing := [column for column in columns if column not in table.columns]:
        raise FigureError(f"the table has no column {missing[0]!r}; it has {', '.join(table.columns) or 'none'}.")
    if table.empty:
        raise FigureError("no rows to draw: measure something first.")


def _draw_series(axes: Axes, rows: pd.DataFrame, column: str, label: str, color: str, marker: str) -> None:
    """Dots of the medians with whiskers from p10 to p90."""
    lengths = rows["context_tokens" if "context_tokens" in rows else "prompt_tokens"]
    whiskers = [rows[column] - rows["p10_ms"], rows["p90_ms"] - rows[column]]
    axes.errorbar(
        lengths, rows[column], yerr=whiskers, fmt=marker, color=color, markersize=5, elinewidth=0.8, label=label
    )
