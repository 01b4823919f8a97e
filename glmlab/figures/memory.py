"""Memory in pictures: curves against context, a forecast by component, the allocator's pools.

What was measured is drawn as dots, what was forecast as a solid line, what others reported as hollow markers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from glmlab.allocator.blocks import SegmentView
from glmlab.core.curve import COMPONENTS, WEIGHT_COLUMNS, Curve
from glmlab.core.units import MIB
from glmlab.figures.saving import Arguments, draws
from glmlab.figures.style import (
    COLORS,
    GRID_COLOR,
    HATCH_COLOR,
    HATCHES,
    FigureError,
    Look,
    SuiteFigure,
    current_settings,
    drawing,
    legend_below,
    most_ticks,
    pt,
)
from glmlab.figures.translations import msg, tr, tr_label

_MARKERS = "os^Dvp"
_MEMORY_COLUMNS = {"used_mib": msg("GPU memory used"), "rss_mib": msg("process memory")}
_KINDS = (msg("measured"), msg("forecast"), msg("reported"))
_CONTEXT_COLUMNS = {"context_tokens": msg("tokens"), "context_characters": msg("characters")}

_Ruler = tuple["pd.Series[float]", ...]
"""Tokens and characters, rising in both; empty where no curve counts both."""

COMPONENT_LOOKS: dict[str, tuple[str, str, Any, str]] = {  # label, colour, line of its change, hatch
    "weights_mib": (msg("weights"), COLORS["weights"], "-", ""),
    "quantisation_state_mib": (msg("quantisation state"), COLORS["quantisation state"], "-", ""),
    "kv_payload_mib": (msg("KV payload"), COLORS["kv"], "-", HATCHES["kv"]),
    "kv_copies_mib": (msg("KV copies"), COLORS["kv copies"], "--", HATCHES["kv copies"]),
    "activations_mib": (msg("activations, workspace"), COLORS["activations"], ":", HATCHES["activations"]),
    "inactive_small_mib": (
        msg("inactive, small pool"), COLORS["inactive small"], "-.", HATCHES["inactive small"],
    ),
    "inactive_large_mib": (
        msg("inactive, large pool"), COLORS["inactive large"], (0, (5, 1, 1, 1, 1, 1)), HATCHES["inactive large"],
    ),
    "cuda_context_mib": (msg("CUDA context"), COLORS["context"], "-", ""),
}  # fmt: skip
"""Components of a forecast in the order in which they are stacked; the weights of all kinds are one."""


# -- curves ------------------------------------------------------------------------------------------------------------


def curves_table(curves: Sequence[Curve] | pd.DataFrame) -> pd.DataFrame:
    """What :func:`memory_curve` shows of several curves, one row a point, each with its curve's number, label and kind.

    Of a forecast, which has a row for every step, the points between which nothing changes are left out.

    Raises:
        FigureError: a curve has neither used_mib nor rss_mib.

    Example:
        >>> table = pd.DataFrame({"step": [0], "turn": [0], "context_tokens": [0], "used_mib": [1.0]})
        >>> curves_table([Curve(table, label="a"), Curve(table, label="b")])["curve"].tolist()
        ['a', 'b']
    """
    if isinstance(curves, pd.DataFrame):
        return curves
    parts = [pd.DataFrame(columns=["number", "curve", "kind"])]
    for number, curve in enumerate(curves, start=1):
        memory = next((column for column in _MEMORY_COLUMNS if column in curve.memory_columns), None)
        if memory is None:
            raise FigureError(
                f"curve {curve.label!r} has neither used_mib nor rss_mib, only "
                f"{', '.join(curve.memory_columns)}: nothing to draw."
            )
        columns = [name for name in ("turn", *_CONTEXT_COLUMNS, memory, "kv_mib") if name in curve.table.columns]
        table = curve.table.loc[curve.table[memory].notna(), columns]
        if curve.kind == "forecast":
            table = _corners(table)
        parts.append(table.assign(number=number, curve=curve.label, kind=curve.kind))
    table = pd.concat(parts[1:] or parts, ignore_index=True)
    return table[["number", "curve", "kind", *table.columns.drop(["number", "curve", "kind"])]]


def _corners(table: pd.DataFrame) -> pd.DataFrame:
    """The rows at which a line through any column bends, or used_mib steps: lines through them are the same."""
    change = table.drop(columns="reported_mib", errors="ignore").diff()
    bends = (change.diff().shift(-1).abs() > 1e-9).any(axis=1)
    steps = change["used_mib"] != 0
    keep = bends | steps | steps.shift(-1, fill_value=True)
    keep.iloc[[0, min(1, len(keep) - 1), -1]] = True
    if "reported_mib" in table:
        keep |= table["reported_mib"].notna()
    return table[keep]


@draws(
    {"number": int, "curve": str, "kind": str},
    empty="no curve to draw: give at least one recording or forecast.",
    convert=lambda data: (curves_table(data), {}),
)
def memory_curve(curves: pd.DataFrame) -> SuiteFigure:
    """Draw memory against context length: above what is used, below how much it grew, beside the exact KV payload.

    Args:
        curves: Curves, measured, forecast or reported, or their ``curves_table``. Each is drawn from its ``used_mib``,
            or ``rss_mib`` where it has no GPU. A curve that counts characters only is placed by the first curve that
            counts both.

    Example:
        >>> table = pd.DataFrame({"step": [0, 9], "turn": [0, 1], "context_tokens": [0, 900],
        ...     "context_characters": [0, 1500], "used_mib": [4710.0, 4736.0], "kv_mib": [0.0, 24.6]})
        >>> figure = memory_curve([Curve(table, label="ChatGLM3-6B, int4")])
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['memory (MiB)', 'growth since loading (MiB)']
    """
    numbers = curves.columns.intersection([*_CONTEXT_COLUMNS, *_MEMORY_COLUMNS, "kv_mib"])
    curves = curves.astype(dict.fromkeys(numbers, float))
    each = [rows.dropna(axis="columns", how="all") for _, rows in curves.groupby("number", sort=False)]
    ruler = _token_ruler(each)
    n_forecasts = 0
    with drawing(6.3, 5.6) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        for index, rows in enumerate(each):
            look: Look = {"color": COLORS["used"], "marker": _MARKERS[index % len(_MARKERS)]}
            if rows["kind"].iloc[0] == "forecast":
                look = _forecast_look(n_forecasts)
                n_forecasts += 1
            _draw_memory(above, below, rows, ruler, look)
        above.set_ylabel(tr("memory (MiB)"))
        below.set_ylabel(tr("growth since loading (MiB)"))
        below.set_xlabel(tr("context length (tokens)"))
        _add_character_axis(figure, above, ruler)
        for axes in (above, below):
            axes.margins(x=0.03, y=0.12)
        legend_below(figure, *below.get_legend_handles_labels())
    figure.alt_text = " ".join([tr("Memory against context length."), *map(_in_words, each)])
    figure.caption = tr(
        "Memory against the length of the context. Dots are measured, solid lines are forecast, thicker from one to "
        "the next, and hollow marks are what others report. Dashed lines are the exact KV payload."
    )
    return figure


@draws(
    {"number": int, "curve": str, "kind": str, "context_tokens": float},
    empty="no curve to draw: give at least one recording or forecast.",
    convert=lambda data: (curves_table(data), {}),
)
def memory_vs_context(curves: pd.DataFrame) -> SuiteFigure:
    """Draw the chapter's chart: a log that others reported over its forecast, and below what was measured here.

    Args:
        curves: Curves, or their ``curves_table``; each counts tokens. Reported and forecast ones share the upper panel,
            measured ones the lower, which has axes of its own.

    Returns:
        A figure of at most two panels; memory in MiB over context tokens. The lower panel shows growth since loading
        beside the exact KV payload.
    """
    each = [rows.dropna(axis="columns", how="all") for _, rows in curves.groupby("number", sort=False)]
    measured = [rows for rows in each if (rows["kind"] == "measured").all()]
    others = [rows for rows in each if not (rows["kind"] == "measured").all()]
    n_panels = bool(measured) + bool(others)
    with drawing(6.3, 2.9 * n_panels) as figure:
        panels = figure.subplots(n_panels, 1, squeeze=False)[:, 0]
        for rows in others:
            _draw_used(panels[0], rows)
        for rows in measured:
            _draw_growth(panels[-1], rows)
        for axes in panels:
            axes.margins(x=0.03, y=0.12)
            axes.legend(loc="lower right" if others and axes is panels[0] else "upper left", fontsize=pt(7))
        panels[-1].set_xlabel(tr("context length (tokens)"))
    figure.alt_text = " ".join([tr("Memory against context length."), *map(_in_words, each)])
    figure.caption = tr(
        "Memory against the length of the context. Above, what others reported (hollow marks) over a forecast (solid "
        "line); below, on axes of its own, what was measured (dots) beside the exact KV payload (dashed)."
    )
    return figure


def _draw_used(axes: Axes, rows: pd.DataFrame) -> None:
    """A forecast as a line, or what others reported as hollow marks."""
    look: Look = {"color": COLORS["used"], "drawstyle": "steps-post"}
    if rows["kind"].iloc[0] == "reported":
        look = {"color": COLORS["kv copies"], "marker": "o", "markerfacecolor": "white", "linestyle": "none"}
        look |= {"markersize": pt(4), "zorder": 3}
    axes.plot(rows["context_tokens"].astype(float), rows[_memory_of(rows)].astype(float), label=_label(rows), **look)
    axes.set_ylabel(tr("GPU memory used (MiB)"))


def _draw_growth(axes: Axes, rows: pd.DataFrame) -> None:
    """What was measured, from its first row on, beside the exact payload."""
    tokens, memory = rows["context_tokens"].astype(float), rows[_memory_of(rows)].astype(float)
    look: Look = {"color": COLORS["used"], "marker": "s", "markersize": pt(4), "linestyle": ":", "linewidth": pt(0.8)}
    axes.plot(tokens, memory - memory.iloc[0], label=_label(rows), **look)
    if "kv_mib" in rows:
        payload = rows["kv_mib"].astype(float)
        label = tr("{label}, KV payload (exact)", label=tr_label(rows["curve"].iloc[0]))
        axes.plot(tokens, payload - payload.iloc[0], color=COLORS["kv"], linestyle="--", label=label)
    axes.set_ylabel(tr("growth since loading (MiB)"))


def _label(rows: pd.DataFrame) -> str:
    return tr("{label} ({kind})", label=tr_label(rows["curve"].iloc[0]), kind=tr_label(rows["kind"].iloc[0]))


def _memory_of(rows: pd.DataFrame) -> str:
    """Name of the column that stands for memory."""
    column = next((name for name in _MEMORY_COLUMNS if name in rows.columns), None)
    if column is None:
        raise FigureError(f"curve {rows['curve'].iloc[0]!r} has neither used_mib nor rss_mib: nothing to draw.")
    return column


def _in_words(rows: pd.DataFrame) -> str:
    """One sentence on a curve: from where to where, over how long a context."""
    memory = rows[_memory_of(rows)]
    ruler = next(column for column in _CONTEXT_COLUMNS if column in rows.columns)
    return tr(
        "{label} ({kind}): {first:.0f} MiB at first, {last:.0f} MiB at {length:.0f} {unit}.",
        label=tr_label(rows["curve"].iloc[0]), kind=tr_label(rows["kind"].iloc[0]), first=memory.iloc[0],
        last=memory.iloc[-1], length=rows[ruler].iloc[-1], unit=tr(_CONTEXT_COLUMNS[ruler]),
    )  # fmt: skip


def _forecast_look(index: int) -> Look:
    """Colour and width of the n-th solid line, distinct without colour, too."""
    colors = (COLORS["allocated"], COLORS["activations"], COLORS["inactive large"])
    linewidth = 0.9 + 0.9 * (index % 4)
    return {"color": colors[index % len(colors)], "linewidth": pt(linewidth), "zorder": 3 - linewidth / 10}


def _draw_memory(above: Axes, below: Axes, rows: pd.DataFrame, ruler: _Ruler, look: Look) -> None:
    column, kind, name = _memory_of(rows), rows["kind"].iloc[0], tr_label(rows["curve"].iloc[0])
    tokens = rows["context_tokens"] if "context_tokens" in rows else _convert(rows["context_characters"], *ruler[::-1])
    memory = rows[column].to_numpy(float)
    label = tr("{label}, {what} ({kind})", label=name, what=tr(_MEMORY_COLUMNS[column]), kind=tr_label(kind))
    if kind == "measured":
        look |= {"markersize": pt(4), "linewidth": pt(0.8), "linestyle": ":"}
    elif kind == "forecast":
        look |= {"drawstyle": "steps-post"}
    else:
        look |= {"markersize": pt(6), "linestyle": "none", "markerfacecolor": "white"}
    if kind != "reported":
        above.plot(tokens, memory, label=label, **look)
    below.plot(tokens, memory - memory[0], label=label, **look)
    if "kv_mib" in rows:
        payload = rows["kv_mib"] - rows["kv_mib"].iloc[0]
        label = tr("{label}, KV payload (exact)", label=name)
        below.plot(tokens, payload, color=COLORS["kv"], linestyle="--", label=label)


def _token_ruler(curves: Sequence[pd.DataFrame]) -> _Ruler:
    """That of the first curve that counts both."""
    for rows in curves:
        if set(_CONTEXT_COLUMNS) <= set(rows.columns):
            both = rows[list(_CONTEXT_COLUMNS)].dropna().astype(float)
            both = both.sort_values("context_tokens").drop_duplicates("context_tokens", keep="last")
            both = both[both["context_characters"].diff().fillna(1) > 0]
            if len(both) >= 2:
                return both["context_tokens"], both["context_characters"]
    if not all("context_tokens" in rows.columns for rows in curves):
        raise FigureError(
            "a curve counts characters only, and no other counts both tokens and characters to place it by. "
            "Draw it together with a recording."
        )
    return ()


def _convert(values: Any, known: "pd.Series[float]", wanted: "pd.Series[float]") -> Any:
    """Linear interpolation; beyond the last known point at the mean rate of the whole."""
    x, y = known.to_numpy(float), wanted.to_numpy(float)
    rate = (y[-1] - y[0]) / (x[-1] - x[0])
    values = np.asarray(values, float)
    beyond = np.where(values > x[-1], (values - x[-1]) * rate, 0) + np.where(values < x[0], (values - x[0]) * rate, 0)
    return np.interp(values, x, y) + beyond


def _add_character_axis(figure: SuiteFigure, axes: Axes, ruler: _Ruler) -> None:
    if ruler:
        tokens, characters = ruler
        functions = (lambda x: _convert(x, tokens, characters), lambda x: _convert(x, characters, tokens))
        upper = axes.secondary_xaxis("top", functions=functions)
        upper.xaxis.set_major_locator(MaxNLocator(most_ticks(figure)))
        upper.set_xlabel(tr("conversation length (characters)"))


# -- components --------------------------------------------------------------------------------------------------------


def components_table(curve: Curve | pd.DataFrame) -> tuple[pd.DataFrame, Arguments]:
    """What :func:`component_chart` shows of a forecast: used_mib and its components, at the steps where a line bends.

    A column ``reported_mib`` (what others measured, where they did) is kept.

    Raises:
        FigureError: the curve has no components.
    """
    if isinstance(curve, pd.DataFrame):
        return curve, {}
    missing = [column for column in COMPONENTS if column not in curve.table.columns]
    if missing:
        raise FigureError(f"curve {curve.label!r} has no components ({missing[0]}). Give a forecast.")
    table = curve.table.assign(weights_mib=curve.table[list(WEIGHT_COLUMNS)].sum(axis=1))
    reported = table.columns.intersection(["reported_mib"])
    return _corners(table[["turn", "context_tokens", "used_mib", *COMPONENT_LOOKS, *reported]]), {"label": curve.label}


@draws(
    {"turn": int, "context_tokens": float, "used_mib": float, **dict.fromkeys(COMPONENT_LOOKS, float)},
    empty="no step to draw: give a forecast of at least one.",
    convert=components_table,
)
def component_chart(parts: pd.DataFrame, *, label: str = "", marks: str = "") -> SuiteFigure:
    """Draw a forecast by component: above stacked up to what is used, below how each changed since the first step.

    Args:
        parts: a forecast, or its ``components_table``; ``reported_mib`` is drawn over it as hollow marks.
        label: what is forecast; that of the Curve.
        marks: contexts to point out, such as ``"1923: last rise; 2049: K and V leave the small pool"``.

    Returns:
        A figure of two panels over steps of context; memory in MiB. Turns begin at the vertical lines. The upper axis
        starts below the top of weights and quantisation state, which do not change.

    Raises:
        FigureError: components that do not add up to used_mib, or a mark without a number of tokens.
    """
    stacked = parts[list(COMPONENT_LOOKS)]
    missed = float((stacked.sum(axis=1) - parts["used_mib"]).abs().max())
    if not missed <= 1e-6:
        raise FigureError(f"the components of {label!r} miss used_mib by up to {missed:.3f} MiB.")
    tokens = parts["context_tokens"].to_numpy(float)
    names, colors, _, hatches = zip(*COMPONENT_LOOKS.values(), strict=True)
    with drawing(6.3, 6.0) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        above.stackplot(
            tokens, stacked.T.to_numpy(float), labels=[tr(name) for name in names], colors=colors, hatch=hatches,
            edgecolor=HATCH_COLOR, linewidth=0,
        )  # fmt: skip
        used: Look = {"color": COLORS["used"], "drawstyle": "steps-post"}
        above.plot(tokens, parts["used_mib"], label=tr("used (forecast)"), **used)
        if "reported_mib" in parts:
            hollow: Look = {"color": COLORS["used"], "markerfacecolor": "white", "marker": "o", "linestyle": "none"}
            above.plot(tokens, parts["reported_mib"], label=tr("used (reported)"), markersize=pt(3.5), **hollow)
        above.set_ylabel(tr("memory (MiB)"))
        constant = float((parts["weights_mib"] + parts["quantisation_state_mib"]).min())
        above.set_ylim(bottom=constant - (constant % 200 or 200), top=1.02 * float(parts["used_mib"].max()))
        first = min(1, len(parts) - 1)
        changes = (parts - parts.iloc[first])[first:]
        for column, (_, color, line, _) in COMPONENT_LOOKS.items():
            if changes[column].abs().max() >= 0.5:
                below.plot(tokens[first:], changes[column], color=color, linestyle=line)
        below.plot(tokens[first:], changes["used_mib"], **used)
        below.set_ylabel(tr("change since the first step (MiB)"))
        below.set_xlabel(tr("context length (tokens)"))
        turns = parts["turn"].diff() > 0
        for start in parts.loc[turns, "context_tokens"].iloc[1:]:
            below.axvline(start, color=GRID_COLOR, linewidth=pt(0.5), zorder=0)
        for axes in (above, below):
            axes.margins(x=0)
        _point_out(below, marks)
        legend_below(figure, *above.get_legend_handles_labels(), ncols=3)
    last = parts.iloc[-1]
    shares = [f"{tr(look[0])} {last[name]:.0f}" for name, look in COMPONENT_LOOKS.items() if last[name] >= 0.5]
    figure.alt_text = tr(
        "{label} (forecast): {first:.0f} MiB after loading, {last:.0f} MiB at {tokens:.0f} tokens, of which "
        "{parts} MiB.",
        label=tr_label(label), first=parts["used_mib"].iloc[0], last=last["used_mib"], tokens=tokens[-1],
        parts=", ".join(shares),
    )  # fmt: skip
    figure.caption = tr(
        "Forecast of {label} by component. Above, stacked up to what gpustat would show; below, the change of each "
        "part since the first step. Vertical lines are turns.",
        label=tr_label(label),
    )
    return figure


def _point_out(axes: Axes, marks: str) -> None:
    """Dotted lines with words beside them, at contexts such as ``"1923: last rise; 2049: ..."``."""
    left, right = axes.get_xlim()
    for row, mark in enumerate(filter(None, marks.split(";"))):
        tokens, colon, words = mark.partition(":")
        if not (colon and tokens.strip().isdecimal()):
            raise FigureError(f"the mark {mark.strip()!r} is not 'tokens: words', such as '2049: pools change'.")
        at = int(tokens)
        axes.axvline(at, color=COLORS["used"], linestyle=":", linewidth=pt(0.8), zorder=1)
        is_left = at - left > 0.25 * (right - left)  # its words stand left of the line, where curves are still low
        axes.annotate(
            f"{at:,}: {tr_label(words.strip())}", (at, 0.34 - 0.09 * row), xycoords=("data", "axes fraction"),
            xytext=(pt(-3 if is_left else 3), 0), textcoords="offset points", ha="right" if is_left else "left",
            va="top", fontsize=pt(7), bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip


# -- pools -------------------------------------------------------------------------------------------------------------

_POOL_LOOKS = {  # what a block holds -> colour, hatch
    "weights": (msg("weights"), COLORS["weights"], ""),
    "quantisation": (msg("quantisation state"), COLORS["quantisation state"], ""),
    "kv": (msg("KV cache"), COLORS["kv"], HATCHES["kv"]),
    "": (msg("in flight"), COLORS["activations"], HATCHES["activations"]),
    "inactive": (msg("inactive"), "#ffffff", ""),
}
_POOL_TITLES = {
    "small": msg("small pool: {inactive:.0f} MiB inactive\n{segments} segments, {full} of them full"),
    "large": msg("large pool: {inactive:.0f} MiB inactive\n{segments} segments, {full} of them full"),
}
_POOL_SENTENCES = {
    "small": msg("The small pool has {inactive:.0f} MiB inactive in {open} of {segments} segments."),
    "large": msg("The large pool has {inactive:.0f} MiB inactive in {open} of {segments} segments."),
}
_LEAST_WIDTH_BESIDE_IN = 4.5  # below, the pools stand one under the other


def segments_table(segments: Sequence[SegmentView], owners: Sequence[str]) -> pd.DataFrame:
    """The blocks of segments as a table, one row a block: what :func:`pool_map` shows.

    Args:
        segments: from ``CachingAllocator.segments`` or a replay.
        owners: names of the owners that blocks refer to (``EventProgram.owners``).

    Example:
        >>> from glmlab.allocator.caching import CachingAllocator
        >>> allocator = CachingAllocator()
        >>> _ = allocator.malloc(600, owner=0)
        >>> segments_table(allocator.segments(), ["kv_cache"])[["pool", "block_bytes", "holds"]].values.tolist()
        [['small', 1024, 'kv_cache'], ['small', 2096128, 'inactive']]
    """
    rows = [
        (number, segment.pool, segment.size, block.address - segment.address, block.size,
         owners[block.owner] if block.live else "inactive")
        for number, segment in enumerate(segments)
        for block in segment.blocks
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["segment", "pool", "segment_bytes", "offset_bytes", "block_bytes", "holds"])


@draws(
    {"segment": int, "pool": str, "segment_bytes": float, "offset_bytes": float, "block_bytes": float, "holds": str},
    empty="no segments to draw: the allocator has not taken any memory yet.",
)
def pool_map(blocks: pd.DataFrame, *, tokens: int | None = None) -> SuiteFigure:
    """Draw the allocator's segments that are not full: every segment a bar, every block coloured by its owner.

    Full segments, such as those of the weights, are counted in the titles only.

    Args:
        blocks: from ``segments_table``.
        tokens: the context length at that moment.
    """
    looks = blocks["holds"].map(_pool_look)
    beside = current_settings().layout_width_in(6.3) >= _LEAST_WIDTH_BESIDE_IN
    title = "" if tokens is None else tr("after the step to {tokens:,} tokens", tokens=tokens)
    with drawing(6.3, 4.6 if beside else 7.0, axes_grid=False) as figure:
        panels = figure.subplots(1, 2, width_ratios=(1, 2)) if beside else figure.subplots(2, 1, height_ratios=(1, 2))
        words = [
            _draw_pool(axes, pool, blocks.assign(look=looks)[blocks["pool"] == pool])
            for axes, pool in zip(panels, _POOL_TITLES, strict=True)
        ]
        shown = [look for kind, look in _POOL_LOOKS.items() if kind == "inactive" or kind in set(looks)]
        handles = [Patch(facecolor=color, hatch=hatch, edgecolor=HATCH_COLOR, linewidth=pt(0.3))
                   for _, color, hatch in shown]  # fmt: skip
        legend_below(figure, handles, [tr(name) for name, _, _ in shown], ncols=5)
        figure.suptitle(title, fontsize=pt(9))
    figure.alt_text = " ".join([tr("Map of the allocator's pools."), title, *words])
    figure.caption = tr(
        "Segments of the allocator that are not full, {moment}. A bar is a segment that the driver gave, its blocks "
        "coloured and hatched by what they hold; white is inactive.",
        moment=title or tr("at one moment"),
    )
    return figure


def _pool_look(holds: str) -> str:
    """Key of a look: the kind of an owner such as ``weights_mlp``."""
    return next(kind for kind in ("inactive", "weights", "quantisation", "kv", "") if kind in holds.lower())


def _draw_pool(axes: Axes, pool: str, blocks: pd.DataFrame) -> str:
    """Bars of the segments of one pool that are not full; returns the panel in words."""
    inactive = blocks[blocks["look"] == "inactive"]
    n_segments, n_open = blocks["segment"].nunique(), inactive["segment"].nunique()
    open_blocks = blocks[blocks["segment"].isin(inactive["segment"])].sort_values("segment_bytes", kind="stable")
    rows = open_blocks.groupby("segment", sort=False).ngroup()
    for look, of_look in open_blocks.assign(row=rows).groupby("look"):
        left, right = of_look["offset_bytes"] / MIB, (of_look["offset_bytes"] + of_look["block_bytes"]) / MIB
        corners = [
            [(x0, y - 0.4), (x0, y + 0.4), (x1, y + 0.4), (x1, y - 0.4)]
            for x0, x1, y in zip(left, right, of_look["row"], strict=True)
        ]
        _, color, hatch = _POOL_LOOKS[str(look)]
        bars: Look = {"facecolor": color, "hatch": hatch, "edgecolor": HATCH_COLOR, "linewidth": pt(0.2)}
        axes.add_collection(PolyCollection(corners, **bars))
    axes.autoscale_view()
    counts = {"inactive": inactive["block_bytes"].sum() / MIB, "segments": n_segments, "full": n_segments - n_open}
    axes.set_title(tr(_POOL_TITLES[pool], **counts))
    axes.set_xlabel(tr("MiB from the segment's start"))
    axes.set_yticks([])
    axes.set_ylabel(tr("segments with room"))
    return tr(_POOL_SENTENCES[pool], **counts, open=n_open)
