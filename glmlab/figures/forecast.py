"""What a forecast is made of: memory by component, and the allocator's pools."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.typing import LineStyleType

from glmlab.allocator.caching import SegmentView
from glmlab.core.curve import Curve
from glmlab.core.units import mib
from glmlab.figures.settings import FigureError, current_settings, pt, tr, tr_label
from glmlab.figures.style import COLORS, HATCHES, SuiteFigure, drawing, legend_below

_HATCH_COLOR = "#333333"

_Floats = npt.NDArray[np.float64]

COMPONENT_STYLES: Mapping[str, tuple[str, str, LineStyleType, str]] = {  # label, colour, line of its change, hatch
    "weights_mib": ("weights", COLORS["weights"], "-", ""),
    "quantisation_state_mib": ("quantisation state", COLORS["quantisation state"], "-", ""),
    "kv_payload_mib": ("KV payload", COLORS["kv"], "-", HATCHES["kv"]),
    "kv_copies_mib": ("KV copies", COLORS["kv copies"], "--", HATCHES["kv copies"]),
    "activations_mib": ("activations, workspace", COLORS["activations"], ":", HATCHES["activations"]),
    "inactive_small_mib": ("idle, small pool", COLORS["slack small"], "-.", HATCHES["slack small"]),
    "inactive_large_mib": ("idle, large pool", COLORS["slack large"], (0, (5, 1, 1, 1, 1, 1)), HATCHES["slack large"]),
    "cuda_context_mib": ("CUDA context", COLORS["context"], "-", ""),
}
"""Components of a forecast in the order in which they are stacked; the weights of all kinds are one."""


def components(curve: Curve) -> pd.DataFrame:
    """Components of a forecast in MiB, one column each, adding up to ``used_mib`` in every row.

    Raises:
        FigureError: the curve has no components, or they do not add up.
    """
    table = curve.table
    kinds = [column for column in table.columns if column.startswith("weights_")]
    missing = [column for column in COMPONENT_STYLES if column != "weights_mib" and column not in table.columns]
    if missing or not kinds:
        raise FigureError(f"curve {curve.label!r} has no components ({(missing or ['weights'])[0]}). Give a forecast.")
    parts = table[[column for column in COMPONENT_STYLES if column in table.columns]].assign(
        weights_mib=table[kinds].sum(axis=1)
    )[list(COMPONENT_STYLES)]
    unexplained = float((parts.sum(axis=1) - table["used_mib"]).abs().max())
    if unexplained > 1e-6:
        raise FigureError(f"the components of {curve.label!r} miss used_mib by up to {unexplained:.3f} MiB.")
    return parts


def component_chart(curve: Curve) -> SuiteFigure:
    """Draw a forecast by component: above stacked up to what is used, below how each changed since the first step.

    Args:
        curve: of a forecast (``Forecast.curve``).

    Returns:
        A figure of two panels over steps of context; memory in MiB. Turns begin at the vertical lines.

    Raises:
        FigureError: the curve has no components.
    """
    parts = components(curve)
    table = curve.table
    tokens = table["context_tokens"].to_numpy(float)
    with drawing(6.3, 6.0) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        above.stackplot(
            tokens,
            parts.T.to_numpy(),
            labels=[tr(label) for label, _, _, _ in COMPONENT_STYLES.values()],
            colors=[color for _, color, _, _ in COMPONENT_STYLES.values()],
            hatch=[hatch for _, _, _, hatch in COMPONENT_STYLES.values()],
            edgecolor=_HATCH_COLOR,
            linewidth=0,
        )
        used_label = tr("used (forecast)")
        above.plot(tokens, table["used_mib"], color=COLORS["used"], label=used_label, drawstyle="steps-post")
        above.set_ylabel(tr("memory (MiB)"))
        _draw_changes(below, parts, tokens, table["used_mib"].to_numpy(float))
        below.set_ylabel(tr("change since the first step (MiB)"))
        below.set_xlabel(tr("context length (tokens)"))
        for start in _turn_starts(table):
            below.axvline(start, color="#999999", linewidth=pt(0.5), zorder=0)
        for axes in (above, below):
            axes.margins(x=0)
        legend_below(figure, *above.get_legend_handles_labels(), ncols=3)
    last = parts.iloc[-1]
    shares = [f"{tr(COMPONENT_STYLES[str(name)][0])} {value:.0f}" for name, value in last.items() if value >= 0.5]
    figure.alt_text = tr(
        "{label} (forecast): {first:.0f} MiB after loading, {last:.0f} MiB at {tokens:.0f} tokens, of which "
        "{parts} MiB.",
        label=tr_label(curve.label), first=table["used_mib"].iloc[0], last=table["used_mib"].iloc[-1],
        tokens=tokens[-1], parts=", ".join(shares),
    )  # fmt: skip
    return figure


def _draw_changes(axes: Axes, parts: pd.DataFrame, tokens: _Floats, used_mib: _Floats) -> None:
    first = min(1, len(parts) - 1)
    for column, (_, color, line, _) in COMPONENT_STYLES.items():
        change = parts[column].to_numpy(float) - parts[column].iloc[first]
        if np.abs(change[first:]).max() >= 0.5:
            axes.plot(tokens[first:], change[first:], color=color, linestyle=line)
    axes.plot(tokens[first:], used_mib[first:] - used_mib[first], color=COLORS["used"], drawstyle="steps-post")


def _turn_starts(table: pd.DataFrame) -> list[float]:
    """Context lengths at which the turns after the first begin."""
    starts = table["turn"].diff().fillna(0) > 0
    return [float(tokens) for tokens in table.loc[starts, "context_tokens"].iloc[1:]]


def pool_map(segments: Sequence[SegmentView], owners: Sequence[str], *, title: str = "") -> SuiteFigure:
    """Draw the allocator's segments that are not full: every segment a bar, every block coloured by its owner.

    Args:
        segments: from ``Forecast.segments`` or ``CachingAllocator.segments``.
        owners: names of the owners that blocks refer to (``EventProgram.owners``).
        title: what moment it is.

    Returns:
        A figure of two panels, small pool and large pool; bars in MiB from each segment's start. Full segments, such as
        those of the weights, are counted in the panel's title only.

    Raises:
        FigureError: no segments.
    """
    if not segments:
        raise FigureError("no segments to draw: the allocator has not taken any memory yet.")
    beside = current_settings().layout_width_in(6.3) >= _LEAST_WIDTH_BESIDE_IN
    with drawing(6.3, 4.6 if beside else 7.0, axes_grid=False) as figure:
        left, right = (
            figure.subplots(1, 2, width_ratios=(1, 2)) if beside else figure.subplots(2, 1, height_ratios=(1, 2))
        )
        words = [_draw_pool(axes, pool, segments, owners) for axes, pool in ((left, "small"), (right, "large"))]
        kinds = {kind for kind, _, _ in map(_look, owners)} | {"idle"}
        handles = [Patch(facecolor=color, hatch=hatch, edgecolor=_HATCH_COLOR, linewidth=pt(0.3))
                   for kind, color, hatch in _LOOKS if kind in kinds]  # fmt: skip
        legend_below(figure, handles, [tr(kind) for kind, _, _ in _LOOKS if kind in kinds], ncols=5)
        figure.suptitle(title, fontsize=pt(9))
    figure.alt_text = " ".join([tr("Map of the allocator's pools."), title, *words])
    return figure


_LOOKS = (  # kind of owner, colour, hatch
    ("weights", COLORS["weights"], ""),
    ("quantisation state", COLORS["quantisation state"], ""),
    ("KV cache", COLORS["kv"], HATCHES["kv"]),
    ("in flight", COLORS["activations"], HATCHES["activations"]),
    ("idle", "#ffffff", ""),
)


def _look(owner: str) -> tuple[str, str, str]:
    """Kind, colour and hatch of an owner's blocks."""
    name = owner.replace("_", " ")
    for look in _LOOKS[:3]:
        if look[0].split()[0].lower() in name.lower():
            return look
    return _LOOKS[3]


def _draw_pool(axes: Axes, pool: str, segments: Sequence[SegmentView], owners: Sequence[str]) -> str:
    """Bars of the segments of one pool that have room; returns the panel in words."""
    of_pool = [segment for segment in segments if segment.pool == pool]
    idle_bytes = {id(s): sum(block.size for block in s.blocks if not block.live) for s in of_pool}
    open_segments = sorted((s for s in of_pool if idle_bytes[id(s)]), key=lambda s: (s.size, s.address))
    for row, segment in enumerate(open_segments):
        for block in segment.blocks:
            _, color, hatch = _look(owners[block.owner]) if block.live else _LOOKS[-1]
            axes.broken_barh(
                [(mib(block.address - segment.address), mib(block.size))],
                (row - 0.4, 0.8),
                facecolor=color,
                hatch=hatch,
                edgecolor=_HATCH_COLOR,
                linewidth=pt(0.2),
            )
    full, idle_mib = len(of_pool) - len(open_segments), mib(sum(idle_bytes.values()))
    counts = {"idle": idle_mib, "segments": len(of_pool), "full": full, "open": len(open_segments)}
    axes.set_title(tr(_POOL_TITLES[pool], **counts))
    axes.set_xlabel(tr("MiB from the segment's start"))
    axes.set_yticks([])
    axes.set_ylabel(tr("segments with room"))
    return tr(_POOL_SENTENCES[pool], **counts)


def segments_table(segments: Sequence[SegmentView], owners: Sequence[str]) -> pd.DataFrame:
    """The blocks of segments as a table, one row a block: what a map of the pools shows, as one CSV.

    Example:
        >>> from glmlab.allocator.caching import CachingAllocator
        >>> allocator = CachingAllocator()
        >>> _ = allocator.malloc(600, owner=0)
        >>> segments_table(allocator.segments(), ["kv_cache"])[["pool", "block_bytes", "holds"]].values.tolist()
        [['small', 1024, 'kv_cache'], ['small', 2096128, 'idle']]
    """
    rows = [
        (number, segment.pool, segment.size, block.address - segment.address, block.size,
         owners[block.owner] if block.live else "idle")
        for number, segment in enumerate(segments)
        for block in segment.blocks
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["segment", "pool", "segment_bytes", "offset_bytes", "block_bytes", "holds"])


_POOL_TITLES = {
    "small": "small pool: {idle:.0f} MiB idle\n{segments} segments, {full} of them full",
    "large": "large pool: {idle:.0f} MiB idle\n{segments} segments, {full} of them full",
}
_POOL_SENTENCES = {
    "small": "The small pool has {idle:.0f} MiB idle in {open} of {segments} segments.",
    "large": "The large pool has {idle:.0f} MiB idle in {open} of {segments} segments.",
}
_LEAST_WIDTH_BESIDE_IN = 4.5  # below, the pools stand one under the other
