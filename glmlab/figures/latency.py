"""Time in pictures: measured against the floor, the parts of a token, the cost of polling, an account of 1.5 s.

Measured times are dots, floors (computed) solid lines, thicker from series to series. The bytes of each precision
against a card stand here, too: what fits comes before how fast it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from glmlab.core.units import MIB
from glmlab.figures.saving import Arguments, draws
from glmlab.figures.style import (
    COLORS,
    GRID_COLOR,
    HATCHES,
    PLAIN_NUMBERS,
    FigureError,
    Look,
    SuiteFigure,
    drawing,
    ink_on,
    legend_below,
    most_ticks,
    pt,
    wrapped,
)
from glmlab.figures.translations import msg, tr, tr_label

_SERIES_LOOKS = (
    (COLORS["allocated"], "o"),
    (COLORS["kv"], "s"),
    (COLORS["activations"], "^"),
    (COLORS["inactive large"], "D"),
    (COLORS["used"], "v"),
    (COLORS["kv copies"], "p"),
)
TIME_LOOKS = {
    msg("weights"): (COLORS["weights"], ""),
    msg("attention"): (COLORS["kv"], HATCHES["kv"]),
    msg("head"): (COLORS["allocated"], HATCHES["kv copies"]),
    msg("norms, activations, rest"): (COLORS["activations"], HATCHES["activations"]),
    msg("Python and launching"): (COLORS["kv copies"], "xx"),
    msg("sampling"): (COLORS["inactive large"], HATCHES["inactive large"]),
    msg("unexplained"): (COLORS["unexplained"], ""),
}
"""Colour and pattern of every part of a token's time."""

_KIND_LOOKS = {  # kind of a row of an account -> colour, hatch
    msg("floor"): (COLORS["allocated"], "////"),
    msg("estimated"): (COLORS["inactive small"], "...."),
    msg("measured here"): (COLORS["kv"], ""),
    "unexplained": (COLORS["unexplained"], ""),
}
PRECISION_LOOKS = {
    msg("MLP"): (COLORS["MLP"], ""),
    "attention": (COLORS["attention"], ""),
    msg("embedding"): (COLORS["embedding"], ""),
    "head": (COLORS["head"], "...."),
    msg("norms"): (COLORS["weights"], ""),
    msg("other"): (COLORS["unexplained"], ""),
    msg("quantisation state"): (COLORS["quantisation state"], "xxxx"),
    msg("KV payload"): (COLORS["kv"], HATCHES["kv"]),
    msg("CUDA context"): (COLORS["context"], ""),
}
"""Colour and pattern of every part of a model's bytes, in the order in which they are stacked."""

_LISTED_FROM = 0.002  # a part below this share of the axis is too thin to be seen: the legend leaves it out
_NAMES = (  # of bars: ways to read the memory, parts of an account
    msg("gpustat --json (a process)"), msg("floor: read the weights once"), msg("dequantise them to fp16, read those"),
    msg("weights in host memory"), msg("the log: gpustat --json"),
)  # fmt: skip


# -- against lengths ---------------------------------------------------------------------------------------------------


@draws(
    {"context_tokens": int, "token_ms": float, "p10_ms": float, "p90_ms": float, "floor_ms": float},
    empty="no rows to draw: measure something first.",
)
def latency_curve(table: pd.DataFrame, *, by: str = "precision") -> SuiteFigure:
    """Draw milliseconds a token against context length: above measured (dots) and floor (line), below their ratio.

    Args:
        table: rows of ``measure_decode`` with floor_ms (``roofline``) and a column that names the series.
        by: that column.

    Example:
        >>> table = pd.DataFrame({"precision": ["fp32"] * 2, "context_tokens": [64, 1024], "token_ms": [1.0, 2.0],
        ...     "p10_ms": [0.9, 1.9], "p90_ms": [1.2, 2.5], "floor_ms": [0.1, 0.2]})
        >>> [axes.get_ylabel() for axes in latency_curve(table).axes]
        ['time of a token (ms)', 'times the floor']
    """
    table = table.reset_index(drop=True)
    ratio = table["token_ms"] / table["floor_ms"]
    with drawing(6.3, 5.6) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        series = _draw_series(above, table, by, "context_tokens", "token_ms")
        for index, (_, color, marker, rows) in enumerate(series):
            floor: Look = {"linewidth": pt(0.8 + 0.9 * index), "zorder": 2 - index / 10}
            above.plot(rows["context_tokens"], rows["floor_ms"], color=color, **floor)
            times = rows["token_ms"] / rows["floor_ms"]
            below.plot(rows["context_tokens"], times, color=color, marker=marker, linestyle=":", ms=pt(5))
        below.axhline(1, color=COLORS["used"])
        above.set_ylabel(tr("time of a token (ms)"))
        below.set_ylabel(tr("times the floor"))
        below.set_xlabel(tr("context length (tokens)"))
        for axes in (above, below):
            _logarithmic(axes)
        handles, labels = above.get_legend_handles_labels()
        (floor_line,) = above.plot([], [], color=COLORS["reserved"])
        legend_below(figure, [*handles, floor_line], [*labels, tr("floor (computed)")], ncols=5)
    words = [
        tr("{name}: {ms:.2f} ms at {tokens:,} tokens", name=name, ms=rows["token_ms"].iloc[0],
           tokens=rows["context_tokens"].iloc[0])
        for name, _, _, rows in series
    ]  # fmt: skip
    figure.alt_text = tr(
        "Time of a token against context length. {series}. The measured times are {least:.3g} to {most:.3g} times the "
        "floor.",
        series="; ".join(words), least=ratio.min(), most=ratio.max(),
    )  # fmt: skip
    figure.caption = tr(
        "Time of a token against the length of the context. Above, marks are medians with whiskers from the 10th to "
        "the 90th percentile; lines are the floor, bytes and operations over what the machine moves and computes, "
        "thicker from series to series. Below, how many times the floor each is."
    )
    return figure


@draws(
    {"prompt_tokens": int, "first_token_ms": float, "p10_ms": float, "p90_ms": float},
    empty="no rows to draw: measure something first.",
)
def first_token_curve(table: pd.DataFrame, *, by: str = "precision") -> SuiteFigure:
    """Draw the time to the first token against the length of the prompt.

    Args:
        table: rows of ``measure_first_token`` with a column that names the series.
        by: that column.
    """
    with drawing(6.3, 3.6) as figure:
        axes = figure.subplots()
        series = _draw_series(axes, table, by, "prompt_tokens", "first_token_ms")
        lengths = np.array([table["prompt_tokens"].min(), table["prompt_tokens"].max()], float)
        start = table["first_token_ms"].iloc[int(table["prompt_tokens"].argmin())]
        look: Look = {"color": GRID_COLOR, "linestyle": "--", "zorder": 0}
        axes.plot(lengths, start * lengths / lengths[0], label=tr("in proportion"), **look)
        axes.set_xlabel(tr("prompt (tokens)"))
        axes.set_ylabel(tr("time to the first token (ms)"))
        _logarithmic(axes)
        legend_below(figure, *axes.get_legend_handles_labels(), ncols=5)
    words = [
        tr("{name}: {ms:.0f} ms for {tokens:,.0f} tokens", name=name, ms=rows["first_token_ms"].iloc[-1],
           tokens=rows["prompt_tokens"].iloc[-1])
        for name, _, _, rows in series
    ]  # fmt: skip
    figure.alt_text = tr(
        "Time to the first token against the length of the prompt. {series}.", series="; ".join(words)
    )  # fmt: skip
    figure.caption = tr(
        "Time to the first token against the length of the prompt. On the dashed line a prompt twice as long takes "
        "twice the time."
    )
    return figure


def _draw_series(axes: Axes, table: pd.DataFrame, by: str, x: str, y: str) -> list[tuple[str, str, str, pd.DataFrame]]:
    """Dots of the medians with whiskers from p10 to p90; returns name, colour, mark and rows of every series."""
    series = []
    for index, (name, rows) in enumerate(table.reset_index(drop=True).groupby(by, sort=False)):
        color, marker = _SERIES_LOOKS[index % len(_SERIES_LOOKS)]
        whiskers = [rows[y] - rows["p10_ms"], rows["p90_ms"] - rows[y]]
        look: Look = {"color": color, "markersize": pt(5), "elinewidth": pt(0.8)}
        axes.errorbar(rows[x], rows[y], yerr=whiskers, fmt=marker, label=tr_label(str(name)), **look)
        series.append((tr_label(str(name)), color, marker, rows))
    return series


def _logarithmic(axes: Axes) -> None:
    """Logarithmic scales with plain numbers; lengths double from mark to mark.

    Where times span less than two powers of ten, 2 and 5 have their marks, too.
    """
    axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
    least, most = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 100 * least else (1,)))
    axes.yaxis.set_major_formatter(PLAIN_NUMBERS)
    axes.yaxis.set_minor_formatter(NullFormatter())


# -- bars --------------------------------------------------------------------------------------------------------------


@draws({"part": str, "ms": float}, empty="no rows to draw: measure something first.")
def token_parts_chart(table: pd.DataFrame, *, by: str = "precision") -> SuiteFigure:
    """Draw where the time of one token goes: one stacked bar a series, as long as the step.

    Args:
        table: rows of ``profile_token`` with a column that names the series.
        by: that column.
    """
    _check_looks("part", table["part"], TIME_LOOKS)
    series = {tr_label(str(name)): rows for name, rows in table.groupby(by, sort=False)}
    totals = {name: rows["ms"].sum() for name, rows in series.items()}
    with drawing(6.3, 1.4 + 0.5 * len(series), axes_grid_axis="x", axes_axisbelow=True) as figure:
        axes = figure.subplots()
        for row, parts in enumerate(series.values()):
            starts = parts["ms"].cumsum() - parts["ms"]
            for part, ms, left in zip(parts["part"], parts["ms"], starts, strict=True):
                axes.barh(row, ms, left=left, height=0.6, **_bar_look(TIME_LOOKS[part]))
        axes.set_xlabel(tr("time of one token (ms)"))
        _name_bars(axes, list(series))
        _legend_of_looks(figure, TIME_LOOKS)
        _write_ends(figure, axes, list(totals.values()), [f" {ms:.2f} ms" for ms in totals.values()])
    words = []
    for name, rows in series.items():
        shares = [f"{tr(part)} {ms / totals[name]:.0%}" for part, ms in zip(rows["part"], rows["ms"], strict=True)]
        words.append(tr("{name}: {ms:.2f} ms, of which {shares}", name=name, ms=totals[name], shares=", ".join(shares)))
    figure.alt_text = tr("Where the time of one token goes. {series}.", series="; ".join(words))
    figure.caption = tr(
        "Where the time of one token goes. Operations are counted by layer; between them lie Python and the launching"
        " of operations."
    )
    return figure


@draws({"way": str, "poll_ms": float, "answers": bool}, empty="no rows to draw: measure something first.")
def polling_chart(table: pd.DataFrame) -> SuiteFigure:
    """Draw what it costs to read the memory in use (``measure_polling``); a way that got no answer is drawn hollow."""
    looks: dict[bool, Look] = {answers: {"facecolor": COLORS["kv"] if answers else "white", "edgecolor": COLORS["kv"]}
             for answers in sorted({bool(answers) for answers in table["answers"]}, reverse=True)}  # fmt: skip
    times_ms = table["poll_ms"].tolist()
    with drawing(6.3, 1.2 + 0.45 * len(table), axes_grid_axis="x", axes_axisbelow=True) as figure:
        axes = figure.subplots()
        for row, (ms, answers) in enumerate(zip(times_ms, table["answers"], strict=True)):
            axes.barh(row, ms, height=0.55, **looks[bool(answers)])
        axes.set_xscale("log")
        axes.set_xlim(min(times_ms) / 5, max(times_ms))
        axes.xaxis.set_major_locator(LogLocator(numticks=most_ticks(figure)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
        axes.set_xlabel(tr("time of one reading (ms)"))
        _name_bars(axes, [wrapped(tr_label(way), 0.38 * figure.get_figwidth(), pt(9)) for way in table["way"]])
        names = [tr("answered") if answers else tr("no answer: no driver there") for answers in looks]
        legend_below(figure, [Patch(**look) for look in looks.values()], names, ncols=2)
        _write_ends(figure, axes, times_ms, [f" {ms:,.3g} ms" for ms in times_ms])
    words = [
        tr("{name}: {ms:,.3g} ms", name=tr_label(way), ms=ms) if answers
        else tr("{name}: {ms:,.3g} ms, no driver", name=tr_label(way), ms=ms)
        for way, ms, answers in zip(table["way"], times_ms, table["answers"], strict=True)
    ]  # fmt: skip
    figure.alt_text = tr("What one reading of the memory costs. {series}.", series="; ".join(words))
    figure.caption = tr(
        "What one reading of the memory in use costs in several ways, on a logarithmic scale. Hollow bars got no "
        "answer, since the machine has no NVIDIA driver: a lower bound of what they cost with one."
    )
    return figure


@draws({"part": str, "kind": str, "seconds": float}, empty="no rows to draw: measure something first.")
def account_chart(account: pd.DataFrame) -> SuiteFigure:
    """Draw a ``chapter_account`` of a token's time as a waterfall: every part begins where the one above it ends."""
    _check_looks("kind", account["kind"], _KIND_LOOKS)
    times_ms = account["seconds"] * 1e3
    ends_ms, total_ms = times_ms.cumsum(), times_ms.sum()
    starts_ms = ends_ms - times_ms
    with drawing(6.3, 1.4 + 0.42 * len(account), axes_grid_axis="x", axes_axisbelow=True) as figure:
        axes = figure.subplots()
        for row, (kind, ms, left, end) in enumerate(zip(account["kind"], times_ms, starts_ms, ends_ms, strict=True)):
            axes.barh(row, ms, left=left, height=0.6, **_bar_look(_KIND_LOOKS[kind]))
            below = row + (1.3 if row < len(account) - 1 else 0.3)
            axes.plot([end, end], [row - 0.3, below], color=GRID_COLOR, linewidth=pt(0.6))
        axes.axvline(total_ms, color=COLORS["used"], linewidth=pt(0.8))
        axes.set_xlim(0, max(total_ms, ends_ms.iloc[-1]))
        axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
        axes.set_xlabel(
            tr("time of a token (ms); the black line is the reported {total_s:.1f} s", total_s=total_ms / 1e3)
        )
        _name_bars(axes, [wrapped(tr_label(part), 0.38 * figure.get_figwidth(), pt(9)) for part in account["part"]])
        _legend_of_looks(figure, _KIND_LOOKS)
        _write_ends(figure, axes, np.maximum(starts_ms, ends_ms).tolist(), [f" {ms:,.0f} ms" for ms in times_ms])
    words = [
        tr("{part} ({kind}): {ms:.0f} ms", part=tr_label(part), kind=tr(kind), ms=ms)
        for part, kind, ms in zip(account["part"], account["kind"], times_ms, strict=True)
    ]
    figure.alt_text = tr(
        "An account of {total_s:.1f} s a token. {parts}.", total_s=total_ms / 1e3, parts="; ".join(words)
    )
    figure.caption = tr(
        "An account of the {total_s:.1f} s that a token is reported to take. Each bar begins where the one above it "
        "ends. The floor and the estimates are computed from the card's published figures; Python and polling were "
        "measured, not on that card; the rest is unexplained.",
        total_s=total_ms / 1e3,
    )
    return figure


def _with_names(parts: pd.DataFrame) -> tuple[pd.DataFrame, Arguments]:
    """The table with its index, the precisions, as a column, as a file keeps it."""
    return (parts if "precision" in parts else parts.rename_axis("precision").reset_index()), {}


@draws({"precision": str}, empty="no precision to draw: give at least one row.", convert=_with_names)
def precision_chart(parts: pd.DataFrame, *, card: str, card_mib: float) -> SuiteFigure:
    """Draw the bytes of each precision, stacked by part, with a card's memory as a line.

    Args:
        parts: a row per precision, a column per part of :data:`PRECISION_LOOKS`, in bytes.
        card: what the line is called.
        card_mib: the card's memory.

    Example:
        >>> parts = pd.DataFrame({"MLP": [2**30, 2**28], "KV payload": [2**20, 2**20]}, index=["bf16", "int4"])
        >>> precision_chart(parts, card="a card", card_mib=512).alt_text
        'Memory by precision: bf16 1,025 MiB (does not fit), int4 257 MiB (fits), against 512 MiB of a card.'
    """
    stacked = _in_mib(parts)
    totals = stacked.sum(axis=1)
    widest = max(float(totals.max()), card_mib)
    with drawing(6.3, 1.7 + 0.55 * len(stacked), axes_grid_axis="x", axes_axisbelow=True) as figure:
        axes = figure.subplots()
        left = pd.Series(0.0, index=stacked.index)
        for part, (color, hatch) in PRECISION_LOOKS.items():
            if part in stacked:
                label = tr(part) if stacked[part].max() >= _LISTED_FROM * widest else "_nolegend_"
                look: Look = {"color": color, "hatch": hatch, "label": label, "height": 0.62}
                axes.barh(range(len(stacked)), stacked[part], left=left, **look)
                left = left + stacked[part]
        label = tr("{card}: {card_mib:,.0f} MiB", card=card, card_mib=card_mib)
        axes.axvline(card_mib, color=COLORS["used"], linestyle="--", label=label, zorder=3)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(most_ticks(figure)))
        axes.set_xlim(0, widest * 1.02)
        axes.set_xlabel(tr("memory (MiB)"))
        _name_bars(axes, [f"{precision}\n{total:,.0f} MiB" for precision, total in totals.items()])
        legend_below(figure, *axes.get_legend_handles_labels(), ncols=4)
        _write_lengths(figure, axes)
    verdicts = []
    for precision, total in totals.items():
        told = {"total": total, "verdict": tr("fits") if total <= card_mib else tr("does not fit")}
        verdicts.append(tr("{precision} {total:,.0f} MiB ({verdict})", precision=precision, **told))
    figure.alt_text = tr(
        "Memory by precision: {verdicts}, against {card_mib:,.0f} MiB of {card}.",
        verdicts=", ".join(verdicts), card_mib=card_mib, card=card,
    )  # fmt: skip
    figure.caption = tr(
        "What a model needs in each precision: weights by component, what quantisation keeps beside them, keys and "
        "values, and a CUDA context. The dashed line is the memory of {card}; inactive blocks of the allocator are "
        "not counted.",
        card=card,
    )
    return figure


def _in_mib(parts: pd.DataFrame) -> pd.DataFrame:
    """The parts in MiB, a row a precision; FigureError for an unknown part or fewer than 0 bytes."""
    _check_looks("part", parts.columns.drop("precision"), PRECISION_LOOKS)
    if (parts.drop(columns="precision") < 0).any(axis=None):
        raise FigureError("a part has less than 0 bytes. Give bytes.")
    return parts.set_index("precision") / MIB


def _write_lengths(figure: SuiteFigure, axes: Axes) -> None:
    """Write each bar's length at its left, on a ground without pattern, where it has room."""
    figure.draw_without_rendering()
    for bar in (bar for bars in axes.containers for bar in bars):
        color = bar.get_facecolor()
        number = axes.annotate(
            f"{bar.get_width():,.0f}", (bar.get_x(), bar.get_y() + bar.get_height() / 2), (pt(3), 0),
            textcoords="offset points", va="center", fontsize=pt(7), color=ink_on(color),
            bbox={"facecolor": color, "edgecolor": "none", "pad": pt(1)},
        )  # fmt: skip
        number.set_visible(number.get_window_extent().x1 < bar.get_window_extent().x1)


def _check_looks(what: str, names: Any, looks: Mapping[str, Any]) -> None:
    if unknown := sorted(set(names) - set(looks)):
        raise FigureError(f"{what} {unknown[0]!r} is not known. Use {', '.join(looks)}.")


def _bar_look(look: tuple[str, str]) -> Look:
    """Arguments of a bar or a legend's patch, from its colour and pattern."""
    color, hatch = look
    return {"facecolor": color, "hatch": hatch, "edgecolor": COLORS["context"], "linewidth": pt(0.5)}


def _legend_of_looks(figure: SuiteFigure, looks: Mapping[str, tuple[str, str]]) -> None:
    legend_below(figure, [Patch(**_bar_look(look)) for look in looks.values()], [tr(name) for name in looks], ncols=4)


def _name_bars(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()


def _write_ends(figure: SuiteFigure, axes: Axes, ends: Sequence[float], labels: Sequence[str]) -> None:
    """Write a text after every bar, and lengthen the horizontal axis until all have room inside it."""
    written = [
        axes.text(end, row, label, va="center", fontsize=pt(8))
        for row, (end, label) in enumerate(zip(ends, labels, strict=True))
    ]
    for text in written:
        text.set_in_layout(False)  # the panel gets the width that it has in the end
    figure.draw_without_rendering()
    scale, panel = axes.xaxis.get_transform(), axes.get_window_extent().width
    left, right = scale.transform(axes.get_xlim())
    for text, end in zip(written, ends, strict=True):
        start = float(scale.transform([end])[0]) - left
        right = max(right, left + start * panel / (panel - text.get_window_extent().width))
    axes.set_xlim(right=float(scale.inverted().transform([right])[0]))
