"""One decode step in pictures: all steps of a run, the candidates behind each warper, the logit lens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from glmlab.core.units import MIB
from glmlab.figures.settings import FigureError, current_settings, pt, tr, tr_label
from glmlab.figures.style import COLORS, STYLE, SuiteFigure, drawing, ink_on, text_width_in

_WIDTH_IN = 6.3
_STEPS_AN_INCH = 7.6  # more tokens than these cannot be read side by side
_PANEL_IN = 1.0  # least width of a panel of candidates
_ACTS = {
    "forward_ms": ("1 forward pass", COLORS["allocated"], ""),
    "choose_ms": ("2 choose", COLORS["kv copies"], "////"),
    "stop_check_ms": ("4 stop check", COLORS["slack large"], "...."),
}
_CHOSEN = COLORS["kv"]


def decode_strip(steps: pd.DataFrame) -> SuiteFigure:
    """Draw all steps of a run side by side: tokens, surprisal, surviving candidates, the cache, the time of the acts.

    Args:
        steps: from ``steps_table``.

    Returns:
        A figure of four panels over the steps: bits, candidates, MiB, milliseconds.

    Raises:
        FigureError: no steps.

    Example:
        >>> steps = pd.DataFrame({"text": ["Hi", "!"], "surprisal_bits": [0.1, 2.0], "kv_bytes": [4096, 5120],
        ...     "survivors: logits": [96, 96], "forward_ms": [5, 2], "choose_ms": [1, 1], "stop_check_ms": [0, 0]})
        >>> [axes.get_ylabel() for axes in decode_strip(steps).axes]
        ['surprisal\\n(bits)', 'surviving\\ncandidates', 'KV cache\\n(MiB)', 'time of act\\n(ms)']
    """
    if steps.empty:
        raise FigureError("no steps to draw: generate at least one token.")
    x = np.arange(len(steps))
    with drawing(_WIDTH_IN, 5.4) as figure:
        surprisal, survivors, cache, acts = figure.subplots(4, 1, sharex=True, height_ratios=(2, 2, 1.5, 2))
        surprisal.bar(x, steps["surprisal_bits"], color=COLORS["used"], width=0.7)
        surprisal.set_ylabel(tr("surprisal\n(bits)"))
        surprisal.set_ylim(0, max(1.0, steps["surprisal_bits"].max() * 1.1))
        _draw_survivors(figure, survivors, x, steps)
        cache.bar(x, steps["kv_bytes"] / MIB, color=COLORS["kv"], width=0.7)
        cache.set_ylabel(tr("KV cache\n(MiB)"))
        below = np.zeros(len(steps))
        for column, (label, color, hatch) in _ACTS.items():
            acts.bar(x, steps[column], bottom=below, color=color, hatch=hatch, width=0.7, label=tr(label))
            below = below + steps[column].to_numpy(float)
        acts.set_ylabel(tr("time of act\n(ms)"))
        _legend_inside(figure, acts, loc="lower right", bbox_to_anchor=(1, 0.95))
        acts.set_ylim(0, below.max() * 1.1)
        for axes in figure.axes:
            axes.grid(visible=False, axis="x")
            axes.set_axisbelow(True)
        if len(steps) <= _STEPS_AN_INCH * current_settings().layout_width_in(_WIDTH_IN):
            texts = [drawable(text) for text in steps["text"]]
            acts.set_xticks(x, texts, rotation=90, fontsize=pt(7), parse_math=False)
            acts.set_xlabel(tr("token chosen by each step (the first step is the prefill)"))
        else:
            acts.set_xlabel(tr("step (0 is the prefill)"))
    hardest = steps.iloc[int(steps["surprisal_bits"].argmax())]
    cache_mib = steps["kv_bytes"] / MIB
    figure.alt_text = tr(
        "{count} decode steps. Tokens in order: {tokens}. Most surprising: {hardest} with {bits:.1f} bits. The cache "
        "grows from {first:.2f} to {last:.2f} MiB. The forward pass takes {share:.0%} of the time.",
        count=len(steps), tokens=" ".join(steps["text"]), hardest=hardest["text"], bits=hardest["surprisal_bits"],
        first=cache_mib.iloc[0], last=cache_mib.iloc[-1], share=_share_of_forward(steps),
    )  # fmt: skip
    return figure


def _draw_survivors(
    figure: SuiteFigure, axes: Axes, x: np.ndarray[tuple[int], np.dtype[np.int64]], steps: pd.DataFrame
) -> None:
    colors = [COLORS[name] for name in ("used", "slack large", "allocated", "kv copies", "activations", "kv")]
    columns = [column for column in steps.columns if column.startswith("survivors: ")]
    size = pt(6.5)
    for column, color, marker in zip(columns, colors * len(columns), "os^Dvp" * len(columns), strict=False):
        label = tr_label(column.removeprefix("survivors: "))
        axes.plot(
            x, steps[column], linestyle="none", marker=marker, markersize=size, color=color, label=label, mfc="none"
        )
        size -= pt(0.9)  # one that lies on another shows inside it
    axes.set_yscale("log")
    top = float(steps[columns].to_numpy(float).max())
    axes.set_ylim(0.7, top * 3)
    axes.set_ylabel(tr("surviving\ncandidates"))
    _legend_inside(figure, axes, loc="lower right", bbox_to_anchor=(1, 0.95), handletextpad=0, columnspacing=0.6)


def _legend_inside(figure: SuiteFigure, axes: Axes, **place: Any) -> None:
    """A legend on one line above the panel, on two where the figure is narrow."""
    labels = axes.get_legend_handles_labels()[1]
    points = pt(7)
    taken_in = sum(text_width_in(label, points) + 3.5 * points / 72 for label in labels)
    room_in = figure.get_figwidth() - pt(36) / 72
    lines = int(np.ceil(taken_in / room_in))
    axes.legend(ncols=-(-len(labels) // lines), fontsize=points, **place)


def _share_of_forward(steps: pd.DataFrame) -> float:
    return float(steps["forward_ms"].sum() / steps[list(_ACTS)].to_numpy(float).sum())


def candidates_chart(candidates: pd.DataFrame) -> SuiteFigure:
    """Draw the best candidates before and behind each processor and warper, the same token in the same row everywhere.

    Args:
        candidates: from ``candidates_table``.

    Returns:
        A figure of one panel a stage; bars are probabilities, a cross is a candidate that was cut, the chosen token is
        orange.

    Raises:
        FigureError: no candidates.

    Example:
        >>> table = pd.DataFrame({"stage": ["logits"] * 2, "survivors": [96] * 2, "rank": [1, 2], "token_id": [5, 7],
        ...     "text": ["a", "b"], "probability": [0.7, 0.2], "chosen": [True, False]})
        >>> candidates_chart(table).axes[0].get_title()
        'logits\\n96 survive'
    """
    if candidates.empty:
        raise FigureError("no candidates to draw: record the step with Keep(top_k=...) of at least 1.")
    rows = candidates.drop_duplicates("token_id").reset_index(drop=True)  # in the order of the raw logits
    stages = list(candidates["stage"].unique())
    columns = min(len(stages), int(current_settings().layout_width_in(_WIDTH_IN) / _PANEL_IN))
    lines = -(-len(stages) // columns)
    with drawing(_WIDTH_IN, (0.9 + 0.2 * len(rows)) * lines) as figure:
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for unused in panels[len(stages) :]:
            unused.remove()
        panels = panels[: len(stages)]
        for axes, stage in zip(panels, stages, strict=True):
            here = candidates[candidates["stage"] == stage]
            probability = here.set_index("token_id")["probability"].reindex(rows["token_id"]).to_numpy(float)
            colors = [_CHOSEN if chosen else COLORS["allocated"] for chosen in rows["chosen"]]
            hatches = ["////" if chosen else "" for chosen in rows["chosen"]]
            axes.barh(rows.index, np.nan_to_num(probability), color=colors, hatch=hatches, height=0.7)
            cut = np.flatnonzero(~(probability > 0))
            axes.plot(
                np.full(len(cut), 0.02), cut, linestyle="none", marker="x", markersize=pt(4), color=COLORS["reserved"]
            )
            axes.set_title(f"{tr_label(stage)}\n{tr('{count:,} survive', count=here['survivors'].iloc[0])}")
            axes.grid(visible=False, axis="y")
            axes.set_axisbelow(True)
        panels[0].set_yticks(rows.index, [drawable(text) for text in rows["text"]], parse_math=False)
        panels[0].invert_yaxis()
        panels[0].xaxis.set_major_locator(MaxNLocator(3))
        panels[0].set_xlim(0, min(1.0, candidates["probability"].max() * 1.08))
        note = tr("probability of the candidate (cross: cut, or no longer among the best)")
        figure.supxlabel(note, fontsize=pt(9))
    figure.alt_text = tr("Candidates for the next token. ") + " ".join(
        tr("Behind {stage}: {best}.", stage=tr_label(stage), best=_in_words(candidates[candidates["stage"] == stage]))
        for stage in stages
    )
    return figure


def _in_words(stage: pd.DataFrame) -> str:
    best = ", ".join(f"{text} {p:.0%}" for text, p in zip(stage["text"][:3], stage["probability"][:3], strict=True))
    return tr("{count} survive, best {best}", count=stage["survivors"].iloc[0], best=best)


def lens_heatmap(lens: pd.DataFrame) -> SuiteFigure:
    """Draw what each layer would have predicted: a row a layer, its best tokens from left to right, darker is likelier.

    Args:
        lens: from ``logit_lens``.

    Returns:
        A heat map; the token that the step chose is framed wherever it shows.

    Raises:
        FigureError: an empty table.

    Example:
        >>> lens = pd.DataFrame({"layer": [0, 1], "name": ["embeddings", "layer 1"], "normed": [False, True],
        ...     "rank": [1, 1], "text": ["a", "b"], "probability": [0.1, 0.9], "chosen": [False, True]})
        >>> [label.get_text() for label in lens_heatmap(lens).axes[0].get_yticklabels()]
        ['embeddings', 'layer 1 (normed)']
    """
    if lens.empty:
        raise FigureError("no layers to draw: logit_lens gives the table.")
    probability = lens.pivot(index="layer", columns="rank", values="probability").to_numpy(float)
    layers = lens.drop_duplicates("layer").reset_index(drop=True)
    n_layers, n_ranks = probability.shape
    beside = current_settings().layout_width_in(_WIDTH_IN) >= _LEAST_WIDTH_BESIDE_IN
    n_ranks = min(n_ranks, _readable_ranks(lens, beside=beside))
    with drawing(_WIDTH_IN, 1.1 + 0.32 * n_layers if beside else 2.4 + 0.45 * n_layers) as figure:
        axes = figure.subplots()
        image = axes.imshow(probability[:, :n_ranks], cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
        for line in lens[lens["rank"] <= n_ranks].itertuples():
            x, y = int(line.rank) - 1, int(line.layer)  # type: ignore[arg-type]
            ink = ink_on(image.cmap(float(probability[y, x])))
            shown = drawable(str(line.text))
            axes.text(x, y, shown, ha="center", va="center", fontsize=pt(_CELL_PT), color=ink, parse_math=False)
            if line.chosen:
                axes.add_patch(
                    Rectangle((x - 0.47, y - 0.44), 0.94, 0.88, fill=False, edgecolor=_CHOSEN, linewidth=pt(1.8))
                )
        labels = [_layer_label(name, normed) for name, normed in zip(layers["name"], layers["normed"], strict=True)]
        axes.set_yticks(range(n_layers), labels)
        axes.set_xticks(range(n_ranks), [str(rank) for rank in range(1, n_ranks + 1)])
        axes.set_xlabel(tr("rank of the candidate after this layer (orange frame: the token that was chosen)"))
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, label=tr("probability"), location="right" if beside else "bottom")
    best = lens[lens["rank"] == 1]
    figure.alt_text = tr("Best token after each layer: ") + ", ".join(
        f"{_layer_label(name, False)} {text} {p:.0%}"
        for name, text, p in zip(best["name"], best["text"], best["probability"], strict=True)
    )
    return figure


_CELL_PT = 8.0
_LEAST_WIDTH_BESIDE_IN = 4.5  # below, the scale of colours stands under the map


def _layer_label(name: str, normed: bool) -> str:
    """Name of a layer in the language of the figure, and whether the norm is in its output already."""
    word, _, number = name.partition(" ")
    shown = tr("layer {number}", number=number) if word == "layer" else tr(name)
    return tr("{layer} (normed)", layer=shown) if normed else shown


def _readable_ranks(lens: pd.DataFrame, *, beside: bool) -> int:
    """How many candidates of a layer fit side by side, at least the best one."""
    widest_in = max(text_width_in(drawable(str(text)), _CELL_PT) for text in lens["text"])
    room_in = current_settings().layout_width_in(_WIDTH_IN) - (2.2 if beside else 1.4)
    return max(1, int(room_in / (widest_in + 0.04)))


def drawable(text: str) -> str:
    """Return the text with characters that no font of the figures has as their code points.

    Example:
        >>> drawable("你好👋")
        '你好U+1F44B'
    """
    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in _families()]
    return "".join(
        character if any(font.get_char_index(ord(character)) for font in fonts) else f"U+{ord(character):04X}"
        for character in text
    )


def _families() -> Sequence[str]:
    families: Sequence[str] = STYLE["font.family"]
    return families
