"""What a forecast is made of: memory by component, and the allocator's pools."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from glmlab.figures.style import COLORS, STYLE, FigureError, SuiteFigure
from glmlab.memory.allocator import SegmentView
from glmlab.memory.curve import Curve
from glmlab.units import mib

_Floats = npt.NDArray[np.float64]

COMPONENT_STYLES: Mapping[str, tuple[str, str, str]] = {  # column -> label, colour, line style of its change
    "weights_mib": ("weights", COLORS["weights"], "-"),
    "quantisation_state_mib": ("quantisation state", COLORS["quantisation state"], "-"),
    "kv_payload_mib": ("KV payload", COLORS["kv"], "-"),
    "kv_copies_mib": ("KV copies", COLORS["kv copies"], "--"),
    "activations_mib": ("activations, workspace", COLORS["activations"], ":"),
    "slack_small_mib": ("idle, small pool", COLORS["slack small"], "-."),
    "slack_large_mib": ("idle, large pool", COLORS["slack large"], (0, (5, 1, 1, 1, 1, 1))),  # type: ignore[dict-item]
    "cuda_context_mib": ("CUDA context", COLORS["context"], "-"),
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
        curve: a forecast (``glmlab.memory.forecast.forecast``).

    Returns:
        A figure of two panels over steps of context; memory in MiB. Turns begin at the vertical lines.

    Raises:
        FigureError: the curve has no components.
    """
    parts = components(curve)
    table = curve.table
    tokens = table["context_tokens"].to_numpy(float)
    with matplotlib.rc_context(STYLE):
        figure = SuiteFigure(figsize=(6.3, 6.0), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        above.stackplot(
            tokens,
            parts.T.to_numpy(),
            labels=[label for label, _, _ in COMPONENT_STYLES.values()],
            colors=[color for _, color, _ in COMPONENT_STYLES.values()],
            linewidth=0,
        )
        above.plot(tokens, table["used_mib"], color=COLORS["used"], label="used (forecast)", drawstyle="steps-post")
        above.set_ylabel("memory (MiB)")
        _draw_changes(below, parts, tokens, table["used_mib"].to_numpy(float))
        below.set_ylabel("change since the first step (MiB)")
        below.set_xlabel("context length (tokens)")
        for start in _turn_starts(table):
            below.axvline(start, color="#999999", linewidth=0.5, zorder=0)
        for axes in (above, below):
            axes.margins(x=0)
        figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    last = parts.iloc[-1]
    figure.alt_text = (
        f"{curve.label} (forecast): {table['used_mib'].iloc[0]:.0f} MiB after loading, "
        f"{table['used_mib'].iloc[-1]:.0f} MiB at {tokens[-1]:.0f} tokens, of which "
        + ", ".join(f"{COMPONENT_STYLES[name][0]} {value:.0f}" for name, value in last.items() if value >= 0.5)  # type: ignore[index]
        + " MiB."
    )
    return figure


def _draw_changes(axes: Axes, parts: pd.DataFrame, tokens: _Floats, used_mib: _Floats) -> None:
    first = min(1, len(parts) - 1)
    for column, (_, color, line) in COMPONENT_STYLES.items():
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
        segments: from ``Run.segments_after`` or ``CachingAllocator.segments``.
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
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = SuiteFigure(figsize=(6.3, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 2))
        words = [_draw_pool(axes, pool, segments, owners) for axes, pool in ((left, "small"), (right, "large"))]
        kinds = {kind for kind, _, _ in map(_look, owners)} | {"idle"}
        handles = [Patch(facecolor=color, hatch=hatch, edgecolor="#666666", linewidth=0.3, label=kind)
                   for kind, color, hatch in _LOOKS if kind in kinds]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        figure.suptitle(title, fontsize=STYLE["axes.titlesize"])
    figure.alt_text = f"Map of the allocator's pools. {title} {' '.join(words)}"
    return figure


_LOOKS = (  # kind of owner, colour, hatch
    ("weights", COLORS["weights"], ""),
    ("quantisation state", COLORS["quantisation state"], ""),
    ("KV cache", COLORS["kv"], ""),
    ("in flight", COLORS["activations"], ""),
    ("idle", "#ffffff", "////"),
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
                edgecolor="#666666",
                linewidth=0.2,
            )
    full, idle_mib = len(of_pool) - len(open_segments), mib(sum(idle_bytes.values()))
    axes.set_title(f"{pool} pool: {idle_mib:.0f} MiB idle\n{len(of_pool)} segments, {full} of them full")
    axes.set_xlabel("MiB from the segment's start")
    axes.set_yticks([])
    axes.set_ylabel("segments with room")
    return f"The {pool} pool has {idle_mib:.0f} MiB idle in {len(open_segments)} of {len(of_pool)} segments."
