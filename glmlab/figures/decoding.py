"""One decode step in pictures: all steps of a run, the candidates after each processor and warper, the logit lens."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from glmlab.core.units import MIB
from glmlab.figures.saving import draws
from glmlab.figures.style import (
    COLORS,
    PLAIN_NUMBERS,
    Look,
    SuiteFigure,
    current_settings,
    drawing,
    ink_on,
    pt,
    text_width_in,
)
from glmlab.figures.translations import msg, printable, tr, tr_label

_WIDTH_IN = 6.3
_STEPS_AN_INCH = 7.6  # more tokens than these cannot be read side by side
_PANEL_IN = 1.0  # least width of a panel of candidates
_CELL_PT = 8.0
_LEAST_WIDTH_BESIDE_IN = 4.5  # below, the scale of colours stands under the map
_ACTS = {
    "forward_ms": (msg("1 forward pass"), COLORS["allocated"], ""),
    "choose_ms": (msg("2 choose"), COLORS["kv copies"], "////"),
    "stop_check_ms": (msg("4 stop check"), COLORS["inactive large"], "...."),
}
_STAGE_COLORS = [COLORS[name] for name in ("used", "inactive large", "allocated", "kv copies", "activations", "kv")]
_CHOSEN = COLORS["kv"]


@draws(
    {"text": str, "surprisal_bits": float, "kv_bytes": float, **dict.fromkeys(_ACTS, float)},
    empty="no steps to draw: generate at least one token.",
)
def decode_strip(steps: pd.DataFrame) -> SuiteFigure:
    """Draw a ``steps_table`` side by side: tokens, surprisal, surviving candidates, the cache, the time of the acts.

    Example:
        >>> steps = pd.DataFrame({"text": ["Hi", "!"], "surprisal_bits": [0.1, 2.0], "kv_bytes": [4096, 5120],
        ...     "survivors: logits": [96, 96], "forward_ms": [5, 2], "choose_ms": [1, 1], "stop_check_ms": [0, 0]})
        >>> [axes.get_ylabel() for axes in decode_strip(steps).axes]
        ['surprisal\\n(bits)', 'surviving\\ncandidates', 'KV cache\\n(MiB)', 'time of act\\n(ms)']
    """
    x = np.arange(len(steps))
    cache_mib, acts_ms = steps["kv_bytes"] / MIB, steps[list(_ACTS)]
    with drawing(_WIDTH_IN, 5.4, axes_axisbelow=True) as figure:
        surprisal, survivors, cache, acts = figure.subplots(4, 1, sharex=True, height_ratios=(2, 2, 1.5, 2))
        surprisal.bar(x, steps["surprisal_bits"], color=COLORS["used"], width=0.7)
        surprisal.set_ylabel(tr("surprisal\n(bits)"))
        surprisal.set_ylim(0, max(1.0, steps["surprisal_bits"].max() * 1.1))
        _draw_survivors(figure, survivors, steps)
        cache.bar(x, cache_mib, color=COLORS["kv"], width=0.7)
        cache.set_ylabel(tr("KV cache\n(MiB)"))
        below = np.zeros(len(steps))
        for column, (label, color, hatch) in _ACTS.items():
            acts.bar(x, steps[column], bottom=below, color=color, hatch=hatch, width=0.7, label=tr(label))
            below = below + steps[column].to_numpy(float)
        acts.set_ylabel(tr("time of act\n(ms)"))
        _legend_inside(figure, acts)
        acts.set_ylim(0, below.max() * 1.1)
        for axes in figure.axes:
            axes.grid(visible=False, axis="x")
        if len(steps) <= _STEPS_AN_INCH * current_settings().layout_width_in(_WIDTH_IN):
            acts.set_xticks(x, [printable(text) for text in steps["text"]], rotation=90, fontsize=pt(7))
            acts.set_xlabel(tr("token chosen by each step (the first step is the prefill)"))
        else:
            acts.set_xlabel(tr("step (0 is the prefill)"))
    hardest = steps.iloc[int(steps["surprisal_bits"].argmax())]
    figure.alt_text = tr(
        "{count} decode steps. Tokens in order: {tokens}. Most surprising: {hardest} with {bits:.1f} bits. The cache "
        "grows from {first:.2f} to {last:.2f} MiB. The forward pass takes {share:.0%} of the time.",
        count=len(steps), tokens=" ".join(steps["text"]), hardest=hardest["text"], bits=hardest["surprisal_bits"],
        first=cache_mib.iloc[0], last=cache_mib.iloc[-1], share=acts_ms["forward_ms"].sum() / acts_ms.to_numpy().sum(),
    )  # fmt: skip
    figure.caption = tr(
        "Decode steps of one answer. From top to bottom: how surprising the chosen token was, how many candidates "
        "each processor or warper leaves, the KV cache, and the measured time of the acts of a step."
    )
    return figure


def _draw_survivors(figure: SuiteFigure, axes: Axes, steps: pd.DataFrame) -> None:
    columns = [column for column in steps.columns if column.startswith("survivors: ")]
    size = pt(6.5)
    for column, color, marker in zip(columns, _STAGE_COLORS * len(columns), "os^Dvp" * len(columns), strict=False):
        look: Look = {"marker": marker, "markersize": size, "color": color, "mfc": "none"}
        label = tr_label(column.removeprefix("survivors: "))
        axes.plot(np.arange(len(steps)), steps[column], linestyle="none", label=label, **look)
        size -= pt(0.9)  # one that lies on another shows inside it
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PLAIN_NUMBERS)
    axes.set_ylim(0.7, float(steps[columns].to_numpy(float).max(initial=1.0)) * 3)
    axes.set_ylabel(tr("surviving\ncandidates"))
    _legend_inside(figure, axes, handletextpad=0, columnspacing=0.6)


def _legend_inside(figure: SuiteFigure, axes: Axes, **place: Any) -> None:
    """A legend on one line above the panel, on two where the figure is narrow."""
    labels = axes.get_legend_handles_labels()[1]
    points = pt(7)
    taken_in = sum(text_width_in(label, points) + 3.5 * points / 72 for label in labels)
    lines = int(np.ceil(taken_in / (figure.get_figwidth() - pt(36) / 72)))
    if labels:
        columns = -(-len(labels) // lines)
        axes.legend(ncols=columns, fontsize=points, loc="lower right", bbox_to_anchor=(1, 0.95), **place)


@draws(
    {"stage": str, "survivors": int, "token_id": int, "text": str, "probability": float, "chosen": bool},
    empty="no candidates to draw: record the step with Keep(top_k=...) of at least 1.",
)
def candidates_chart(candidates: pd.DataFrame) -> SuiteFigure:
    """Draw a ``candidates_table``: the best candidates before and after each processor and warper, one panel a stage.

    A token has the same row everywhere; a cross is a candidate that was cut, the chosen token is orange.

    Example:
        >>> table = pd.DataFrame({"stage": ["logits"] * 2, "survivors": [96] * 2, "rank": [1, 2], "token_id": [5, 7],
        ...     "text": ["a", "b"], "probability": [0.7, 0.2], "chosen": [True, False]})
        >>> candidates_chart(table).axes[0].get_title()
        'logits\\n96 survive'
    """
    rows = candidates.drop_duplicates("token_id").reset_index(drop=True)  # in the order of the raw logits
    stages = {str(stage): here for stage, here in candidates.groupby("stage", sort=False)}
    columns = min(len(stages), int(current_settings().layout_width_in(_WIDTH_IN) / _PANEL_IN))
    lines = -(-len(stages) // columns)
    colors = [_CHOSEN if chosen else COLORS["allocated"] for chosen in rows["chosen"]]
    hatches = ["////" if chosen else "" for chosen in rows["chosen"]]
    with drawing(_WIDTH_IN, (0.9 + 0.2 * len(rows)) * lines, axes_axisbelow=True) as figure:
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for unused in panels[len(stages) :]:
            unused.remove()
        for axes, (stage, here) in zip(panels, stages.items(), strict=False):
            probability = here.set_index("token_id")["probability"].reindex(rows["token_id"]).to_numpy(float)
            axes.barh(rows.index, np.nan_to_num(probability), color=colors, hatch=hatches, height=0.7)
            cut = np.flatnonzero(~(probability > 0))
            cross: Look = {"linestyle": "none", "marker": "x", "markersize": pt(4)}
            axes.plot(np.full(len(cut), 0.02), cut, color=COLORS["reserved"], **cross)
            surviving = tr("{count:,} survive", count=here["survivors"].iloc[0])
            axes.set_title(f"{tr_label(stage)}\n{surviving}")
            axes.grid(visible=False, axis="y")
        panels[0].set_yticks(rows.index, [printable(text) for text in rows["text"]])
        panels[0].invert_yaxis()
        panels[0].xaxis.set_major_locator(MaxNLocator(3))
        panels[0].set_xlim(0, min(1.0, candidates["probability"].max() * 1.08))
        note = tr("probability of the candidate (cross: cut, or no longer among the best)")
        figure.supxlabel(note, fontsize=pt(9))
    figure.alt_text = tr("Candidates for the next token. ") + " ".join(
        tr("After {stage}: {best}.", stage=tr_label(stage), best=_in_words(here)) for stage, here in stages.items()
    )
    figure.caption = tr(
        "The best candidates of one decode step, before and after each processor and warper. A row is the same token "
        "in every panel; the hatched orange bar is the token that was chosen."
    )
    return figure


def _in_words(stage: pd.DataFrame) -> str:
    best = ", ".join(f"{text} {p:.0%}" for text, p in zip(stage["text"][:3], stage["probability"][:3], strict=True))
    return tr("{count} survive, best {best}", count=stage["survivors"].iloc[0], best=best)


@draws(
    {"layer": int, "name": str, "normed": bool, "rank": int, "text": str, "probability": float, "chosen": bool},
    empty="no layers to draw: logit_lens gives the table.",
)
def lens_heatmap(lens: pd.DataFrame) -> SuiteFigure:
    """Draw what each layer would have predicted (``logit_lens``): a row a layer, its best tokens from left to right.

    Darker is likelier; the token that the step chose is framed wherever it shows.

    Example:
        >>> lens = pd.DataFrame({"layer": [0, 1], "name": ["embeddings", "layer 1"], "normed": [False, True],
        ...     "rank": [1, 1], "text": ["a", "b"], "probability": [0.1, 0.9], "chosen": [False, True]})
        >>> [label.get_text() for label in lens_heatmap(lens).axes[0].get_yticklabels()]
        ['embeddings', 'layer 1 (normed)']
    """
    probability = lens.pivot(index="layer", columns="rank", values="probability").to_numpy(float)
    layers = lens.drop_duplicates("layer")
    width_in = current_settings().layout_width_in(_WIDTH_IN)
    beside = width_in >= _LEAST_WIDTH_BESIDE_IN
    n_layers, n_ranks = (
        len(layers),
        min(probability.shape[1], _readable_ranks(lens, width_in - (2.2 if beside else 1.4))),
    )
    with drawing(_WIDTH_IN, 1.1 + 0.32 * n_layers if beside else 2.4 + 0.45 * n_layers, axes_grid=False) as figure:
        axes = figure.subplots()
        image = axes.imshow(probability[:, :n_ranks], cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
        for line in lens[lens["rank"] <= n_ranks].to_dict("records"):
            x, y = line["rank"] - 1, line["layer"]
            ink = ink_on(image.cmap(float(line["probability"])))
            axes.text(x, y, printable(line["text"]), ha="center", va="center", fontsize=pt(_CELL_PT), color=ink)
            if line["chosen"]:
                frame: Look = {"fill": False, "edgecolor": _CHOSEN, "linewidth": pt(1.8)}
                axes.add_patch(Rectangle((x - 0.47, y - 0.44), 0.94, 0.88, **frame))
        names = [_layer_name(name) for name in layers["name"]]
        labels = [tr("{layer} (normed)", layer=name) if normed else name
                  for name, normed in zip(names, layers["normed"], strict=True)]  # fmt: skip
        axes.set_yticks(range(n_layers), labels)
        axes.set_xticks(range(n_ranks), [str(rank) for rank in range(1, n_ranks + 1)])
        axes.set_xlabel(tr("rank of the candidate after this layer (orange frame: the token that was chosen)"))
        figure.colorbar(image, ax=axes, label=tr("probability"), location="right" if beside else "bottom")
    best = lens[lens["rank"] == 1]
    figure.alt_text = tr("Best token after each layer: ") + ", ".join(
        f"{_layer_name(name)} {text} {p:.0%}"
        for name, text, p in zip(best["name"], best["text"], best["probability"], strict=True)
    )
    figure.caption = tr(
        "Logit lens on one decode step: the best tokens if norm and head were applied after each layer, darker where "
        "they are likelier. The frame marks the token that the step chose."
    )
    return figure


def _layer_name(name: str) -> str:
    """Name of a layer in the language of the figure."""
    word, _, number = name.partition(" ")
    return tr("layer {number}", number=number) if word == "layer" else tr_label(name)


def _readable_ranks(lens: pd.DataFrame, room_in: float) -> int:
    """How many candidates of a layer fit side by side, at least the best one."""
    widest_in = max(text_width_in(printable(text), _CELL_PT) for text in lens["text"])
    return max(1, int(room_in / (widest_in + 0.04)))
