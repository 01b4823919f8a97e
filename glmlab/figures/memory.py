"""Memory in pictures: curves against context, a forecast by component, the allocator's pools.

What was measured is drawn as dots, what was forecast as a solid line, what others reported as hollow marks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from glmlab.allocator.blocks import SegmentView
from glmlab.core.curve import COMPONENTS, WEIGHT_COLUMNS, Curve
from glmlab.core.units import MIB
from glmlab.figures.labels import WHITE_GROUND, End, label_ends, legend_of_areas, msg, tr, tr_label
from glmlab.figures.saving import Arguments, draws
from glmlab.figures.style import (
    COLORS,
    GRID_COLOR,
    HATCH_COLOR,
    HATCHES,
    PLAIN_NUMBERS,
    FigureError,
    Look,
    SuiteFigure,
    drawing,
    pt,
    text_width_in,
    wrapped,
)

_KINDS = (msg("measured"), msg("forecast"), msg("reported"))
_MEMORY_COLUMNS = ("used_mib", "rss_mib")  # the first that a curve has is drawn
_FORECAST_LOOKS = ((COLORS["allocated"], 1.2), (COLORS["activations"], 4.2), (COLORS["inactive large"], 2.4))
"""Colour and width of the solid lines in turn; a thin one lies on a thick one."""

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
        FigureError: a curve has neither used_mib nor rss_mib, or counts no tokens.

    Example:
        >>> table = pd.DataFrame({"step": [0], "turn": [0], "context_tokens": [0], "used_mib": [1.0]})
        >>> curves_table([Curve(table, label="a"), Curve(table, label="b")])["curve"].tolist()
        ['a', 'b']
    """
    if isinstance(curves, pd.DataFrame):
        return curves
    first = ["number", "curve", "kind", "context_tokens"]
    parts = [pd.DataFrame(columns=first)]
    for number, curve in enumerate(curves, start=1):
        table = curve.table.rename(columns={} if "kv_mib" in curve.table else {"kv_payload_mib": "kv_mib"})
        memory = next((name for name in _MEMORY_COLUMNS if name in table and table[name].notna().any()), None)
        if memory is None or "context_tokens" not in table.columns:
            needed = "context_tokens" if memory else "used_mib nor rss_mib"
            raise FigureError(f"curve {curve.label!r} has no {needed}, only {', '.join(table.columns)}.")
        table = table.loc[table[memory].notna(), table.columns.intersection(["turn", *first, memory, "kv_mib"])]
        if curve.kind == "forecast":
            table = _corners(table)
        parts.append(table.assign(number=number, curve=curve.label, kind=curve.kind))
    table = pd.concat(parts[1:] or parts, ignore_index=True)
    return table[[*first, *table.columns.drop(first)]]


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
    {"number": int, "curve": str, "kind": str, "context_tokens": float},
    empty="no curve to draw: give at least one recording or forecast.",
    convert=lambda data: (curves_table(data), {}),
)
def memory_curve(curves: pd.DataFrame) -> SuiteFigure:
    """Draw memory against context length: what others reported over its forecast, and growth beside the KV payload.

    Args:
        curves: Curves, measured, forecast or reported, or their ``curves_table``. Each is drawn from its ``used_mib``,
            or ``rss_mib`` where it has no GPU.

    Returns:
        A figure of one or two panels; memory in MiB over context tokens. What was reported and the forecasts beside it
        share the upper one; all else is drawn in the lower one, as growth since loading beside the exact KV payload.

    Example:
        >>> table = pd.DataFrame({"step": [0, 9], "turn": [0, 1], "context_tokens": [0, 900],
        ...     "used_mib": [4710.0, 4736.0], "kv_mib": [0.0, 24.6]})
        >>> figure = memory_curve([Curve(table, label="ChatGLM3-6B, int4")])
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['growth since loading (MiB)']
    """
    each = [rows.dropna(axis="columns", how="all") for _, rows in curves.groupby("number", sort=False)]
    compared = [rows for rows in each if _kind(rows) != "measured"]
    if not any(_kind(rows) == "reported" for rows in each):
        compared = []
    grown = [rows for rows in each if not any(rows is other for other in compared)]
    n_panels = bool(compared) + bool(grown)
    with drawing(6.3, 3.0 * n_panels) as figure:
        panels = figure.subplots(n_panels, 1, squeeze=False)[:, 0]
        if compared:
            _draw_curves(figure, panels[0], compared, grows=False)
            panels[0].set_ylabel(tr("GPU memory used (MiB)"))
        if grown:
            _draw_curves(figure, panels[-1], grown, grows=True)
            panels[-1].set_ylabel(tr("growth since loading (MiB)"))
        panels[-1].set_xlabel(tr("context length (tokens)"))
    words = [
        tr("{label} ({kind}): {first:.0f} MiB at first, {last:.0f} MiB at {length:.0f} tokens.",
           label=tr_label(rows["curve"].iloc[0]), kind=tr(_kind(rows)), first=_memory(rows).iloc[0],
           last=_memory(rows).iloc[-1], length=rows["context_tokens"].iloc[-1])
        for rows in each
    ]  # fmt: skip
    figure.alt_text = " ".join([tr("Memory against context length."), *words])
    figure.caption = tr(
        "Memory rises in steps, while keys and values grow evenly with the context. Dots are measured, solid lines are "
        "forecast, hollow marks are what others reported; dashed lines are the exact KV payload."
    )
    return figure


def _kind(rows: pd.DataFrame) -> str:
    return str(rows["kind"].iloc[0])


def _memory(rows: pd.DataFrame) -> "pd.Series[float]":
    return rows[next(column for column in _MEMORY_COLUMNS if column in rows.columns)].astype(float)


def _draw_curves(figure: SuiteFigure, axes: Axes, each: Sequence[pd.DataFrame], *, grows: bool) -> None:
    """Draw curves as they are, or less their first point and beside their payload; what they share is the title."""
    parts = [rows["curve"].iloc[0].split(", ") for rows in each]
    shared = [part for part in parts[0] if all(part in other for other in parts)]
    axes.set_title(tr_label(", ".join(shared)) if shared else "", loc="left")
    ends: list[End] = []
    for index, (rows, own) in enumerate(zip(each, parts, strict=True)):
        tokens, memory, kind = rows["context_tokens"].astype(float), _memory(rows), _kind(rows)
        drawn = memory - memory.iloc[0] if grows else memory
        color, width = (COLORS["used"], 1.4) if not grows else _FORECAST_LOOKS[index % len(_FORECAST_LOOKS)]
        look: Look = {"color": color, "linewidth": pt(width), "drawstyle": "steps-post", "zorder": 3 - width / 10}
        if kind != "forecast":
            look = {"color": COLORS["used"], "marker": "s", "markersize": pt(4), "linestyle": ":", "linewidth": pt(0.8)}
        if kind == "reported":
            look |= {"color": COLORS["kv"], "marker": "o", "markerfacecolor": "white", "linestyle": "none", "zorder": 3}
        axes.plot(tokens, drawn, **look)
        name = ", ".join(part for part in own if part not in shared)
        label = tr("{label} ({kind})", label=tr_label(name), kind=tr(kind)) if name else tr(kind)
        if grows:
            label += tr(": {first:,.0f} to {last:,.0f} MiB", first=memory.iloc[0], last=memory.iloc[-1])
        ends.append((tokens.iloc[-1], drawn.iloc[-1], label, look["color"]))
        if grows and "kv_mib" in rows:
            payload = (rows["kv_mib"] - rows["kv_mib"].iloc[0]).astype(float)
            axes.plot(tokens, payload, color=COLORS["kv"], linestyle="--", zorder=3)
            end = (tokens.iloc[-1], payload.iloc[-1], tr("KV payload (exact)"), COLORS["kv"])
            ends += [end] if end not in ends else []
    axes.margins(x=0.03, y=0.12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PLAIN_NUMBERS)
    label_ends(figure, axes, ends)


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
    missed = float((parts[list(COMPONENT_LOOKS)].sum(axis=1) - parts["used_mib"]).abs().max())
    if not missed <= 1e-6:
        raise FigureError(f"the components of {label!r} miss used_mib by up to {missed:.3f} MiB.")
    with drawing(6.3, 5.6, axes_axisbelow=True) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        for axes in (above, below):
            axes.margins(x=0)
            axes.yaxis.set_major_formatter(PLAIN_NUMBERS)
        _stack(figure, above, parts)
        _draw_changes(figure, below, parts[min(1, len(parts) - 1) :])
        below.xaxis.set_major_formatter(PLAIN_NUMBERS)
        below.set_xlabel(tr("context length (tokens)"))
        for start in parts.loc[parts["turn"].diff() > 0, "context_tokens"].iloc[1:]:
            below.axvline(start, color=GRID_COLOR, linewidth=pt(0.5), zorder=0)
        _point_out(figure, below, marks)
    last = parts.iloc[-1]
    shares = [f"{tr(look[0])} {last[name]:.0f}" for name, look in COMPONENT_LOOKS.items() if last[name] >= 0.5]
    figure.alt_text = tr(
        "{label} (forecast): {first:.0f} MiB after loading, {last:.0f} MiB at {tokens:.0f} tokens, of which "
        "{parts} MiB.",
        label=tr_label(label), first=parts["used_mib"].iloc[0], last=last["used_mib"], tokens=last["context_tokens"],
        parts=", ".join(shares),
    )  # fmt: skip
    figure.caption = tr(
        "Used memory rises only where no inactive block fits; below that line parts trade places. Forecast of "
        "{label}: above, stacked up to what gpustat would show; below, the change of each part since the first "
        "step. Vertical lines are turns.",
        label=tr_label(label),
    )
    return figure


def _stack(figure: SuiteFigure, axes: Axes, parts: pd.DataFrame) -> None:
    """Components as areas up to what is used, with what was reported on top."""
    tokens = parts["context_tokens"].to_numpy(float)
    names, colors, _, hatches = zip(*COMPONENT_LOOKS.values(), strict=True)
    stacked = parts[list(COMPONENT_LOOKS)].T.to_numpy(float)
    axes.stackplot(tokens, stacked, colors=colors, hatch=hatches, edgecolor=HATCH_COLOR, linewidth=0)
    axes.plot(tokens, parts["used_mib"], color=COLORS["used"], drawstyle="steps-post")
    constant = float((parts["weights_mib"] + parts["quantisation_state_mib"]).min())
    bottom, top = constant - (constant % 200 or 200), 1.02 * float(parts["used_mib"].max())
    axes.set_ylim(bottom, top)
    axes.set_ylabel(tr("memory (MiB)"))
    borders = np.maximum(bottom, np.cumsum([0, *stacked[:, -1]]))
    visible = [index for index, height in enumerate(np.diff(borders)) if height > 0.005 * (top - bottom)]
    middles = (borders[1:] + borders[:-1]) / 2
    ends: list[End] = [(tokens[-1], middles[index], tr(names[index]), colors[index]) for index in visible]
    ends.append((tokens[-1], float(parts["used_mib"].iloc[-1]), tr("used (forecast)"), COLORS["used"]))
    if "reported_mib" in parts:
        hollow: Look = {"color": COLORS["used"], "markerfacecolor": "white", "marker": "o", "linestyle": "none"}
        axes.plot(tokens, parts["reported_mib"], markersize=pt(3.5), **hollow)
        ends.append((tokens[-1], top, "○ " + tr("used (reported)"), COLORS["used"]))
    label_ends(figure, axes, ends)


def _draw_changes(figure: SuiteFigure, axes: Axes, parts: pd.DataFrame) -> None:
    """What changed since the first row, component by component."""
    tokens, changes = parts["context_tokens"].astype(float), parts - parts.iloc[0]
    used: Look = {"color": COLORS["used"], "drawstyle": "steps-post"}
    axes.plot(tokens, changes["used_mib"], **used)
    ends: list[End] = [(tokens.iloc[-1], changes["used_mib"].iloc[-1], tr("used (forecast)"), COLORS["used"])]
    for column, (name, color, line, _) in COMPONENT_LOOKS.items():
        if changes[column].abs().max() >= 0.5:
            axes.plot(tokens, changes[column], color=color, linestyle=line)
            ends.append((tokens.iloc[-1], changes[column].iloc[-1], tr(name), color))
    axes.set_ylabel(tr("change since the first step (MiB)"))
    label_ends(figure, axes, ends)


def _point_out(figure: SuiteFigure, axes: Axes, marks: str) -> None:
    """Dotted lines with words beside them, at contexts such as ``"1923: last rise; 2049: ..."``."""
    figure.draw_without_rendering()
    left, right = axes.get_xlim()
    panel_in, y = axes.get_window_extent().width / figure.dpi, 0.52
    for mark in filter(None, marks.split(";")):
        tokens, colon, words = mark.partition(":")
        if not (colon and tokens.strip().isdecimal()):
            raise FigureError(f"the mark {mark.strip()!r} is not 'tokens: words', such as '2049: pools change'.")
        at = int(tokens)
        axes.axvline(at, color=COLORS["used"], linestyle=":", linewidth=pt(0.8), zorder=1)
        room_in = (at - left) / (right - left) * panel_in  # left of the line, where curves are still low
        text = wrapped(f"{at:,}: {tr_label(words.strip())}", max(room_in, panel_in / 2), pt(7))
        fits = max(text_width_in(line, pt(7)) for line in text.split("\n")) + pt(5) / 72 < room_in
        axes.annotate(
            text, (at if fits else left, y), xycoords=("data", "axes fraction"), xytext=(pt(-3 if fits else 2), 0),
            textcoords="offset points", ha="right" if fits else "left", va="top", fontsize=pt(7),
            bbox=WHITE_GROUND,
        )  # fmt: skip
        y -= 0.01 + 0.06 * len(text.split("\n"))


# -- pools -------------------------------------------------------------------------------------------------------------

_POOL_LOOKS = {  # what a block holds -> its name, colour, hatch
    "weights": (msg("weights"), COLORS["weights"], ""),
    "quantisation": (msg("quantisation state"), COLORS["quantisation state"], ""),
    "kv": (msg("KV cache"), COLORS["kv"], HATCHES["kv"]),
    "": (msg("in flight"), COLORS["activations"], HATCHES["activations"]),
    "inactive": (msg("inactive"), "#ffffff", ""),
}
_POOLS = {"small": msg("small pool"), "large": msg("large pool")}


def segments_table(segments: Sequence[SegmentView], owners: Sequence[str], *, tokens: int) -> pd.DataFrame:
    """The blocks of segments as a table, one row a block: what :func:`pool_map` shows.

    Args:
        segments: from ``CachingAllocator.segments`` or a replay.
        owners: names of the owners that blocks refer to (``EventProgram.owners``).
        tokens: the context length at that moment.

    Example:
        >>> from glmlab.allocator.caching import CachingAllocator
        >>> allocator = CachingAllocator()
        >>> _ = allocator.malloc(600, owner=0)
        >>> table = segments_table(allocator.segments(), ["kv_cache"], tokens=9)
        >>> table[["tokens", "pool", "block_bytes", "holds"]].values.tolist()
        [[9, 'small', 1024, 'kv_cache'], [9, 'small', 2096128, 'inactive']]
    """
    rows = [
        (tokens, segment.address, segment.pool, segment.size, block.address - segment.address, block.size,
         owners[block.owner] if block.live else "inactive")
        for segment in segments
        for block in segment.blocks
    ]  # fmt: skip
    columns = ["tokens", "segment", "pool", "segment_bytes", "offset_bytes", "block_bytes", "holds"]
    return pd.DataFrame(rows, columns=columns)


@draws(
    {"tokens": int, "segment": int, "pool": str, "segment_bytes": float, "offset_bytes": float, "block_bytes": float,
     "holds": str},
    empty="no segments to draw: the allocator has not taken any memory yet.",
)  # fmt: skip
def pool_map(blocks: pd.DataFrame) -> SuiteFigure:
    """Draw the allocator's segments that have room: a bar each, its blocks coloured by owner, moments side by side.

    A segment has the same row at every moment. Those that are always full, such as many of the weights, are left out.

    Args:
        blocks: from ``segments_table``, of one or more context lengths.
    """
    blocks = blocks.assign(look=blocks["holds"].map(_pool_look))
    moments = blocks["tokens"].drop_duplicates().tolist()
    words = []
    with drawing(6.3, 5.6, axes_grid=False) as figure:
        panels = figure.subplots(2, len(moments), squeeze=False, sharex="row", sharey="row")
        for pool, row in zip(_POOLS, panels, strict=True):
            in_pool = blocks[blocks["pool"] == pool]
            with_room = in_pool[in_pool["segment"].isin(in_pool.loc[in_pool["look"] == "inactive", "segment"])]
            order = with_room.sort_values(["segment_bytes", "segment"])["segment"].drop_duplicates().tolist()
            row[0].set_ylabel(tr("segments with room"))
            row[0].set_yticks([])
            for axes, tokens in zip(row, moments, strict=True):
                _draw_blocks(axes, with_room[with_room["tokens"] == tokens], order)
                axes.set_xlabel(tr("MiB from the segment's start"))
                now = in_pool[in_pool["tokens"] == tokens]
                inactive = now[now["look"] == "inactive"]
                facts = {"tokens": tokens, "pool": tr(_POOLS[pool]), "mib": inactive["block_bytes"].sum() / MIB}
                axes.set_title(tr("{tokens:,} tokens, {pool}:\n{mib:.0f} MiB inactive", **facts), fontsize=pt(8))
                facts |= {"open": inactive["segment"].nunique(), "segments": now["segment"].nunique()}
                word = tr(
                    "At {tokens:,} tokens, {pool}: {mib:.0f} MiB inactive in {open} of {segments} segments.", **facts
                )
                words.append(word)
        held = set(blocks["look"])
        shown = [look for kind, look in _POOL_LOOKS.items() if kind in {*held, "inactive"}]
        legend_of_areas(figure, {tr(name): look for name, *look in shown}, ncols=5)
    figure.alt_text = " ".join([tr("Map of the allocator's pools."), *words])
    figure.caption = tr(
        "Inactive blocks lie where earlier tensors were and serve requests of their own pool: segments that have "
        "room at one of these moments, each in the same row. A bar is a segment that the driver gave, its blocks "
        "coloured and hatched by what they hold; white is inactive."
    )
    return figure


def _pool_look(holds: str) -> str:
    """Key of a look: the kind of an owner such as ``weights_mlp``."""
    return next(kind for kind in ("inactive", "weights", "quantisation", "kv", "") if kind in holds.lower())


def _draw_blocks(axes: Axes, blocks: pd.DataFrame, order: Sequence[int]) -> None:
    """Blocks of one pool at one moment, their segments in the rows of ``order``."""
    rows = blocks["segment"].map({segment: row for row, segment in enumerate(order)})
    for look, of_look in blocks.assign(row=rows).groupby("look"):
        left, right = of_look["offset_bytes"] / MIB, (of_look["offset_bytes"] + of_look["block_bytes"]) / MIB
        corners = [
            [(x0, y - 0.4), (x0, y + 0.4), (x1, y + 0.4), (x1, y - 0.4)]
            for x0, x1, y in zip(left, right, of_look["row"], strict=True)
        ]
        _, color, hatch = _POOL_LOOKS[str(look)]
        bars: Look = {"facecolor": color, "hatch": hatch, "edgecolor": HATCH_COLOR, "linewidth": pt(0.2)}
        axes.add_collection(PolyCollection(corners, **bars))
    axes.autoscale_view()
