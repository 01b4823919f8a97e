"""Time in pictures: measured against the floor, the parts of a token, the cost of polling, an account of 1.5 s.

Measured times are dots, floors (computed) solid lines, thicker from series to series. The bytes of each precision
against a card stand here, too: what fits comes before how fast it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from glmlab.core.units import MIB
from glmlab.figures.labels import (
    AreaLook,
    End,
    area,
    ink_on,
    label_ends,
    legend_of_areas,
    msg,
    name_bars,
    stack_bars,
    tr,
    tr_label,
    write_ends,
)
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
    pt,
)

_SERIES_LOOKS = (
    (COLORS["allocated"], "o"),
    (COLORS["kv"], "s"),
    (COLORS["activations"], "^"),
    (COLORS["inactive large"], "D"),
    (COLORS["used"], "v"),
    (COLORS["kv copies"], "p"),
)
TIME_LOOKS: dict[str, AreaLook] = {
    msg("weights"): (COLORS["weights"], ""),
    msg("attention"): (COLORS["kv"], HATCHES["kv"]),
    msg("head"): (COLORS["allocated"], HATCHES["kv copies"]),
    msg("norms, activations, rest"): (COLORS["activations"], HATCHES["activations"]),
    msg("Python and launching"): (COLORS["kv copies"], "xx"),
    msg("sampling"): (COLORS["inactive large"], HATCHES["inactive large"]),
    msg("unexplained"): (COLORS["unexplained"], ""),
}
"""Colour and pattern of every part of a token's time."""

_KIND_LOOKS: dict[str, AreaLook] = {  # of a row of an account
    msg("computed"): (COLORS["allocated"], "////"),
    msg("measured here"): (COLORS["kv"], ""),
    "unexplained": (COLORS["unexplained"], ""),
}
PRECISION_LOOKS: dict[str, AreaLook] = {
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
    msg("gpustat --json (a process)"), msg("read the weights once"), msg("unpack them to fp16, read those"),
    msg("gpustat --json, if the log ran"), msg("starting Python, importing gpustat"),
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
    table = table.reset_index(drop=True).assign(times=table["token_ms"].to_numpy() / table["floor_ms"].to_numpy())
    with drawing(6.3, 5.2) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        series = _series(table, by)
        for index, (_, color, marker, rows) in enumerate(series):
            _draw_medians(above, rows, "context_tokens", "token_ms", color, marker)
            floor: Look = {"linewidth": pt(0.8 + 0.9 * index), "zorder": 2 - index / 10}
            above.plot(rows["context_tokens"], rows["floor_ms"], color=color, **floor)
            below.plot(rows["context_tokens"], rows["times"], color=color, marker=marker, linestyle=":", ms=pt(5))
        below.axhline(1, color=COLORS["used"])
        above.set_ylabel(tr("time of a token (ms)"))
        below.set_ylabel(tr("times the floor"))
        below.set_xlabel(tr("context length (tokens)"))
        for axes in (above, below):
            _logarithmic(axes)
        floors = [(rows["context_tokens"].iloc[-1], rows["floor_ms"].iloc[-1], tr("{name}, floor", name=name), color)
                  for name, color, _, rows in series]  # fmt: skip
        label_ends(figure, above, [*_ends(series, "context_tokens", "token_ms"), *floors])
        label_ends(figure, below, _ends(series, "context_tokens", "times"))
    words = [
        tr("{name}: {ms:.2f} ms at {tokens:,} tokens", name=name, ms=rows["token_ms"].iloc[0],
           tokens=rows["context_tokens"].iloc[0])
        for name, _, _, rows in series
    ]  # fmt: skip
    figure.alt_text = tr(
        "Time of a token against context length. {series}. The measured times are {least:,.1f} to {most:,.1f} times "
        "the floor.",
        series="; ".join(words), least=table["times"].min(), most=table["times"].max(),
    )  # fmt: skip
    figure.caption = tr(
        "A token takes longer than its bytes and operations alone would need. Above, marks are medians with "
        "whiskers from the 10th to the 90th percentile; lines are the floor, bytes and operations over what the "
        "machine moves and computes, thicker from series to series. Below, how many times the floor each is."
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
    with drawing(6.3, 3.2) as figure:
        axes = figure.subplots()
        series = _series(table, by)
        for _, color, marker, rows in series:
            _draw_medians(axes, rows, "prompt_tokens", "first_token_ms", color, marker)
        lengths = np.array([table["prompt_tokens"].min(), table["prompt_tokens"].max()], float)
        proportional = table["first_token_ms"].iloc[int(table["prompt_tokens"].argmin())] * lengths / lengths[0]
        axes.plot(lengths, proportional, color=GRID_COLOR, linestyle="--", zorder=0)
        axes.set_xlabel(tr("prompt (tokens)"))
        axes.set_ylabel(tr("time to the first token (ms)"))
        _logarithmic(axes)
        dashed: End = (lengths[1], proportional[1], tr("in proportion"), GRID_COLOR)
        label_ends(figure, axes, [*_ends(series, "prompt_tokens", "first_token_ms"), dashed])
    words = [
        tr("{name}: {ms:.0f} ms for {tokens:,.0f} tokens", name=name, ms=rows["first_token_ms"].iloc[-1],
           tokens=rows["prompt_tokens"].iloc[-1])
        for name, _, _, rows in series
    ]  # fmt: skip
    figure.alt_text = tr(
        "Time to the first token against the length of the prompt. {series}.", series="; ".join(words)
    )  # fmt: skip
    figure.caption = tr(
        "Short prompts cost about the same; long ones approach a time in proportion to their length. On the dashed "
        "line a prompt twice as long takes twice the time."
    )
    return figure


_Series = Sequence[tuple[str, str, str, pd.DataFrame]]
"""Name, colour, mark and rows of every series."""


def _series(table: pd.DataFrame, by: str) -> _Series:
    groups = enumerate(table.reset_index(drop=True).groupby(by, sort=False))
    return [(tr_label(str(name)), *_SERIES_LOOKS[i % len(_SERIES_LOOKS)], rows) for i, (name, rows) in groups]


def _draw_medians(axes: Axes, rows: pd.DataFrame, x: str, y: str, color: str, marker: str) -> None:
    """Dots of the medians with whiskers from p10 to p90."""
    whiskers = [rows[y] - rows["p10_ms"], rows["p90_ms"] - rows[y]]
    axes.errorbar(rows[x], rows[y], yerr=whiskers, fmt=marker, color=color, markersize=pt(5), elinewidth=pt(0.8))


def _ends(series: _Series, x: str, y: str) -> list[End]:
    return [(rows[x].iloc[-1], rows[y].iloc[-1], name, color) for name, color, _, rows in series]


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
    stacked = table.groupby([by, "part"], sort=False)["ms"].sum().unstack(fill_value=0)
    stacked.index = stacked.index.map(lambda name: tr_label(str(name)))
    totals = stacked.sum(axis=1)
    with drawing(6.3, 1.4 + 0.5 * len(stacked), axes_grid_axis="x", axes_axisbelow=True) as figure:
        axes = figure.subplots()
        stack_bars(axes, stacked, TIME_LOOKS, list(stacked.index))
        axes.set_xlabel(tr("time of one token (ms)"))
        legend_of_areas(figure, {tr(part): look for part, look in TIME_LOOKS.items()})
        write_ends(figure, axes, list(totals), [f"{ms:.2f} ms" for ms in totals])
    words = []
    for name, total, shares in zip(totals.index, totals, stacked.div(totals, axis=0).to_dict("records"), strict=True):
        told = ", ".join(f"{tr(str(part))} {share:.0%}" for part, share in shares.items())
        words.append(tr("{name}: {ms:.2f} ms, of which {shares}", name=name, ms=total, shares=told))
    figure.alt_text = tr("Where the time of one token goes. {series}.", series="; ".join(words))
    figure.caption = tr(
        "Part of a token's time lies between its operations. They are counted by layer; between them lie Python and"
        " the launching of operations."
    )
    return figure


@draws({"way": str, "poll_ms": float}, empty="no rows to draw: measure something first.")
def polling_chart(table: pd.DataFrame) -> SuiteFigure:
    """Draw what it costs to read the memory in use: a dot for every way that answered.

    Args:
        table: of ``measure_polling``; times in ms, drawn on a logarithmic axis.

    Raises:
        FigureError: no way answered.
    """
    table = table[table["poll_ms"].notna()]
    if table.empty:
        raise FigureError("no way of asking answered: there is no time to draw.")
    times_ms = table["poll_ms"].tolist()
    with drawing(6.3, 0.8 + 0.45 * len(table), axes_axisbelow=True) as figure:
        axes = figure.subplots()
        axes.plot(times_ms, range(len(table)), "o", color=COLORS["kv"], markersize=pt(7))
        axes.set_xscale("log")
        axes.set_xlim(min(0.01, *times_ms), max(1000.0, *times_ms))
        axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(tr("time of one reading (ms)"))
        words = [tr("{ms:,.3g} ms", ms=ms) for ms in times_ms]
        name_bars(axes, [f"{tr_label(way)}\n{word}" for way, word in zip(table["way"], words, strict=True)])
        axes.set_ylim(len(table) - 0.5, -0.5)
    series = "; ".join(f"{tr_label(way)}: {word}" for way, word in zip(table["way"], words, strict=True))
    figure.alt_text = tr("What one reading of the memory costs. {series}.", series=series)
    figure.caption = tr(
        "Reading the memory in use costs time, most of all in a process of its own (logarithmic scale). Ways that "
        "got no answer, as without an NVIDIA driver, are left out."
    )
    return figure


@draws({"part": str, "kind": str, "low_s": float, "high_s": float}, empty="no rows to draw: measure something first.")
def account_chart(account: pd.DataFrame, *, reported_s: float) -> SuiteFigure:
    """Draw the ranges of an account: thick bars up to the low end, thinner ones up to the high end, in ms.

    Args:
        account: of ``chapter_account``; an end below 0 is drawn as 0.
        reported_s: seconds that a token is reported to take, drawn as a line.

    Raises:
        FigureError: a kind of part that is not known.
    """
    _check_looks("kind", account["kind"], _KIND_LOOKS)
    lows_ms, highs_ms = account["low_s"].clip(lower=0) * 1e3, account["high_s"].clip(lower=0) * 1e3
    with drawing(6.3, 1.3 + 0.4 * len(account), axes_grid_axis="x", axes_axisbelow=True) as figure:
        axes = figure.subplots()
        for row, (kind, low, high) in enumerate(zip(account["kind"], lows_ms, highs_ms, strict=True)):
            look = area(_KIND_LOOKS[kind])
            axes.barh(row, low, height=0.6, **look)
            axes.barh(row, high - low, left=low, height=0.25, **{**look, "hatch": ""})
        axes.axvline(reported_s * 1e3, color=COLORS["used"], linewidth=pt(0.8))
        axes.set_xlim(0, max(reported_s * 1e3, highs_ms.max()))
        axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
        axes.set_xlabel(tr("time of a token (ms); the black line is the reported {total_s:.1f} s", total_s=reported_s))
        name_bars(axes, [tr_label(part) for part in account["part"]])
        legend_of_areas(figure, {tr(kind): look for kind, look in _KIND_LOOKS.items() if kind in set(account["kind"])})
        ranges = [f"{low:,.0f}–{high:,.0f} ms" for low, high in zip(lows_ms, highs_ms, strict=True)]
        write_ends(figure, axes, highs_ms.tolist(), ranges)
    words = [
        tr("{part} ({kind}): {range}", part=tr_label(part), kind=tr(kind), range=text)
        for part, kind, text in zip(account["part"], account["kind"], ranges, strict=True)
    ]
    figure.alt_text = tr("An account of {total_s:.1f} s a token. {parts}.", total_s=reported_s, parts="; ".join(words))
    figure.caption = tr(
        "What the card has to read explains a small part of the reported {total_s:.1f} s a token. Thick bars are "
        "the low end, computed from the card's published figures or measured, not on that card; thin bars reach to "
        "the high end, a guess.",
        total_s=reported_s,
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

    Raises:
        FigureError: a part that is not known, or has fewer than 0 bytes.

    Example:
        >>> parts = pd.DataFrame({"MLP": [2**30, 2**28], "KV payload": [2**20, 2**20]}, index=["bf16", "int4"])
        >>> precision_chart(parts, card="a card", card_mib=512).alt_text
        'Memory by precision: bf16 1,025 MiB (does not fit), int4 257 MiB (fits), against 512 MiB of a card.'
    """
    _check_looks("part", parts.columns.drop("precision"), PRECISION_LOOKS)
    stacked = parts.set_index("precision") / MIB
    if (stacked < 0).any(axis=None):
        raise FigureError("a part has less than 0 bytes. Give bytes.")
    stacked = stacked[[part for part in PRECISION_LOOKS if part in stacked]]
    totals = stacked.sum(axis=1)
    widest = max(float(totals.max()), card_mib)
    with drawing(6.3, 1.7 + 0.55 * len(stacked), axes_grid_axis="x", axes_axisbelow=True) as figure:
        axes = figure.subplots()
        stack_bars(
            axes, stacked, PRECISION_LOOKS, [f"{precision}\n{total:,.0f} MiB" for precision, total in totals.items()]
        )
        axes.axvline(card_mib, color=COLORS["used"], linestyle="--", zorder=3)
        axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlim(0, widest * 1.02)
        axes.set_xlabel(tr("memory (MiB)"))
        card_name: Look = {"ha": "left" if card_mib < widest / 2 else "right", "va": "bottom", "fontsize": pt(8)}
        line = tr("{card}: {card_mib:,.0f} MiB", card=card, card_mib=card_mib)
        axes.text(card_mib, 1.01, line, transform=axes.get_xaxis_transform(), **card_name)
        visible = [part for part in stacked if stacked[part].max() >= _LISTED_FROM * widest]
        legend_of_areas(figure, {tr(str(part)): PRECISION_LOOKS[str(part)] for part in visible})
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
        "Weights shrink with the bits, what lies beside them does not: weights by component, what quantisation "
        "keeps beside them, keys and values, and a CUDA context. The dashed line is the memory of {card}; inactive "
        "blocks of the allocator are not counted.",
        card=card,
    )
    return figure


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
