"""One decode step in pictures: all steps of a run, the candidates after each processor and warper, the logit lens."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from glmlab.core.units import MIB
from glmlab.figures.labels import AreaLook, End, area, ink_on, label_ends, legend_of_areas, msg, printable, tr, tr_label
from glmlab.figures.saving import draws
from glmlab.figures.style import COLORS, PLAIN_NUMBERS, Look, SuiteFigure, current_settings, drawing, pt, text_width_in

_WIDTH_IN = 6.3
_ACTS: dict[str, tuple[str, AreaLook]] = {
    "forward_ms": (msg("1 forward pass"), (COLORS["allocated"], "")),
    "choose_ms": (msg("2 choose"), (COLORS["kv copies"], "////")),
    "stop_check_ms": (msg("4 stop check"), (COLORS["inactive large"], "....")),
}
_STAGE_LOOKS = [(COLORS["used"], "-"), (COLORS["allocated"], "--"), (COLORS["kv"], "-."), (COLORS["activations"], ":")]
_CHOSEN = COLORS["kv"]
_PANEL_IN = 1.1  # least width of a panel of candidates
_MOST_CANDIDATES = 8


@draws(
    {"text": str, "surprisal_bits": float, "kv_bytes": float, **dict.fromkeys(_ACTS, float)},
    empty="no steps to draw: generate at least one token.",
)
def decode_strip(steps: pd.DataFrame) -> SuiteFigure:
    """Draw a ``steps_table`` side by side: surprisal, surviving candidates, the cache, the time of the acts.

    Tokens that were not expected stand at their bars.

    Example:
        >>> steps = pd.DataFrame({"text": ["Hi", "!"], "surprisal_bits": [0.1, 2.0], "kv_bytes": [4096, 5120],
        ...     "survivors: logits": [96, 96], "forward_ms": [5, 2], "choose_ms": [1, 1], "stop_check_ms": [0, 0]})
        >>> [axes.get_ylabel() for axes in decode_strip(steps).axes]
        ['surprisal\\n(bits)', 'surviving\\ncandidates', 'KV cache\\n(MiB)', 'time of act\\n(ms)']
    """
    x, cache_mib, acts_ms = np.arange(len(steps)), steps["kv_bytes"] / MIB, steps[list(_ACTS)]
    with drawing(_WIDTH_IN, 5.2, axes_axisbelow=True, axes_grid_axis="y") as figure:
        surprisal, survivors, cache, acts = figure.subplots(4, 1, sharex=True, height_ratios=(2, 2, 1, 2))
        surprisal.bar(x, steps["surprisal_bits"], color=COLORS["used"], width=0.7)
        surprisal.plot(x, steps["surprisal_bits"], "o", color=COLORS["used"], markersize=pt(1.8))
        surprisal.set_ylabel(tr("surprisal\n(bits)"))
        surprisal.set_ylim(0, max(1.0, steps["surprisal_bits"].max() * 1.25))
        cache.bar(x, cache_mib, color=COLORS["kv"], width=0.7)
        cache.set_ylabel(tr("KV cache\n(MiB)"))
        below = np.zeros(len(steps))
        for column, (_, look) in _ACTS.items():
            acts.bar(x, steps[column], bottom=below, width=0.7, **area(look) | {"linewidth": 0})
            below = below + steps[column].to_numpy(float)
        acts.set_ylabel(tr("time of act\n(ms)"))
        acts.set_xlabel(tr("step (0 is the prefill)"))
        acts.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        means = [f"{tr(name)}: {acts_ms[column].mean():.2f} ms"
                 for column, (name, _) in _ACTS.items()]  # fmt: skip
        legend_of_areas(figure, dict(zip(means, (look for _, look in _ACTS.values()), strict=True)))
        _draw_survivors(figure, survivors, steps)
        _name_surprising(figure, surprisal, steps)
    hardest = steps.iloc[int(steps["surprisal_bits"].argmax())]
    figure.alt_text = tr(
        "{count} decode steps. Tokens in order: {tokens}. Most surprising: {hardest} with {bits:.1f} bits. The cache "
        "grows from {first:.2f} to {last:.2f} MiB. The forward pass takes {share:.0%} of the time.",
        count=len(steps), tokens=" ".join(steps["text"]), hardest=hardest["text"], bits=hardest["surprisal_bits"],
        first=cache_mib.iloc[0], last=cache_mib.iloc[-1], share=acts_ms["forward_ms"].sum() / acts_ms.to_numpy().sum(),
    )  # fmt: skip
    figure.caption = tr(
        "The cache grows evenly; how free the choice of a token is differs from step to step. From top to bottom: "
        "how surprising the chosen token was, how many candidates each processor or warper leaves, the KV cache, "
        "and the measured time of the acts of a step."
    )
    return figure


def _draw_survivors(figure: SuiteFigure, axes: Axes, steps: pd.DataFrame) -> None:
    """A line a stage; stages that cut nothing share the line of the one before them."""
    lines: list[tuple[list[str], list[int]]] = []
    for column in (column for column in steps.columns if column.startswith("survivors: ")):
        name, left = tr_label(column.removeprefix("survivors: ")), steps[column].tolist()
        if lines and left == lines[-1][1]:
            lines[-1][0].append(name)
        else:
            lines.append(([name], left))
    ends: list[End] = []
    for (names, left), (color, style) in zip(lines, _STAGE_LOOKS * len(lines), strict=False):
        look: Look = {"color": color, "linestyle": style, "marker": "o", "markersize": pt(2), "linewidth": pt(1)}
        axes.plot(np.arange(len(steps)), left, drawstyle="steps-mid", **look)
        ends.append((len(steps) - 1, left[-1], ", ".join(names), color))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PLAIN_NUMBERS)
    axes.set_ylim(0.7, max([1, *(max(left) for _, left in lines)]) * 3)
    axes.set_ylabel(tr("surviving\ncandidates"))
    if ends:
        label_ends(figure, axes, ends)


def _name_surprising(figure: SuiteFigure, axes: Axes, steps: pd.DataFrame) -> None:
    """Write tokens of 0.1 bits and more over their bars, the most surprising first, where they touch nothing."""
    figure.draw_without_rendering()
    taken = [bar.get_window_extent() for bar in axes.patches]
    bits = steps["surprisal_bits"].reset_index(drop=True)
    for x in bits[bits >= 0.1].sort_values(ascending=False).index:
        text = axes.annotate(
            printable(steps["text"].iloc[x]), (x, bits[x]), (0, pt(2)), textcoords="offset points", ha="center",
            va="bottom", fontsize=pt(7),
        )  # fmt: skip
        box = text.get_window_extent()
        text.set_visible(not any(box.overlaps(other) for other in taken) and box.x0 > axes.bbox.x0)
        taken += [box] if text.get_visible() else []


@draws(
    {"stage": str, "survivors": int, "token_id": int, "text": str, "probability": float, "chosen": bool},
    empty="no candidates to draw: record the step with Keep(top_k=...) of at least 1.",
)
def candidates_chart(candidates: pd.DataFrame) -> SuiteFigure:
    """Draw a ``candidates_table``: the best candidates before and after each processor and warper, one panel a stage.

    A token has the same row everywhere, with its probability or "cut"; the chosen token is orange.

    Example:
        >>> table = pd.DataFrame({"stage": ["logits"] * 2, "survivors": [96] * 2, "rank": [1, 2], "token_id": [5, 7],
        ...     "text": ["a", "b"], "probability": [0.7, 0.2], "chosen": [True, False]})
        >>> candidates_chart(table).axes[0].get_title()
        'logits\\n96 survive'
    """
    stages = {str(stage): here for stage, here in candidates.groupby("stage", sort=False)}
    *_, last = stages.values()
    wanted = {*last["token_id"][:_MOST_CANDIDATES], *candidates.loc[candidates["chosen"], "token_id"]}
    wanted |= set(candidates["token_id"][: max(2, _MOST_CANDIDATES - len(wanted))])
    rows = candidates[candidates["token_id"].isin(wanted)].drop_duplicates("token_id").reset_index(drop=True)
    columns = min(len(stages), int(current_settings().layout_width_in(_WIDTH_IN) / _PANEL_IN))
    lines = -(-len(stages) // columns)
    with drawing(_WIDTH_IN, (0.8 + 0.2 * len(rows)) * lines, axes_grid=False) as figure:
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for unused in panels[len(stages) :]:
            unused.remove()
        for axes, (stage, here) in zip(panels, stages.items(), strict=False):
            _draw_candidates(axes, rows, here)
            surviving = tr("{count:,} survive", count=here["survivors"].iloc[0])
            axes.set_title(f"{tr_label(stage)}\n{surviving}")
        panels[0].set_yticks(rows.index, [printable(text) for text in rows["text"]])
        panels[0].invert_yaxis()
        panels[0].set(xticks=[], xlim=(0, candidates["probability"].max() * 1.8))
        figure.supxlabel(tr("probability of the candidate; orange: chosen"), fontsize=pt(9))
    figure.alt_text = tr("Candidates for the next token. ") + " ".join(
        tr("After {stage}: {best}.", stage=tr_label(stage), best=_in_words(here)) for stage, here in stages.items()
    )
    figure.caption = tr(
        "Processors and warpers change or cut the candidates, and one of those left is drawn: the best ones, before"
        " and after each. A row is the same token in every panel; the hatched orange bar is the token that was "
        "chosen."
    )
    return figure


def _draw_candidates(axes: Axes, rows: pd.DataFrame, here: pd.DataFrame) -> None:
    """Bars of one stage with their percentages; what is not in its table was cut, or is less likely than all in it."""
    probability = here.set_index("token_id")["probability"].reindex(rows["token_id"]).fillna(0.0)
    is_whole = len(here) >= here["survivors"].iloc[0]
    absent = tr("cut") if is_whole else f"<{_percent(here['probability'].min())}"
    for row, (p, chosen) in enumerate(zip(probability, rows["chosen"], strict=True)):
        axes.barh(row, p, height=0.7, **area((_CHOSEN, "////") if chosen else (COLORS["allocated"], "")))
        axes.annotate(_percent(p) if p > 0 else absent, (p, row), (pt(2), 0), textcoords="offset points", va="center",
                      fontsize=pt(7), color="#000000" if p > 0 else COLORS["reserved"])  # fmt: skip
    axes.tick_params(left=False)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}"


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
        ['embeddings', 'layer 1: output']
    """
    probability = lens.pivot(index="layer", columns="rank", values="probability").to_numpy(float)
    layers = lens.drop_duplicates("layer")
    widest_in = max(text_width_in(printable(text), 8) for text in lens["text"]) + 0.08
    fitting = int((current_settings().layout_width_in(_WIDTH_IN) - 1.2) / widest_in)
    n_ranks = max(1, min(probability.shape[1], fitting))
    with drawing(_WIDTH_IN, 0.7 + 0.36 * len(layers), axes_grid=False) as figure:
        axes = figure.subplots()
        image = axes.imshow(probability[:, :n_ranks], cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
        for cell in lens[lens["rank"] <= n_ranks].to_dict("records"):
            x, y = cell["rank"] - 1, cell["layer"]
            text = f"{printable(cell['text'])}\n{_percent(cell['probability'])}"
            ink = ink_on(image.cmap(float(cell["probability"])))
            axes.text(x, y, text, ha="center", va="center", fontsize=pt(7.5), color=ink)
            if cell["chosen"]:
                frame: Look = {"fill": False, "edgecolor": _CHOSEN, "linewidth": pt(1.8)}
                axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, **frame))
        names = [_layer_name(name) for name in layers["name"]]
        labels = [tr("{layer}: output", layer=name) if normed else name
                  for name, normed in zip(names, layers["normed"], strict=True)]  # fmt: skip
        axes.set_yticks(range(len(layers)), labels)
        axes.set_xticks(range(n_ranks), [str(rank) for rank in range(1, n_ranks + 1)])
        axes.set_xlabel(tr("rank of the candidate after this layer (orange frame: the token that was chosen)"))
    best = lens[lens["rank"] == 1]
    figure.alt_text = tr("Best token after each layer: ") + ", ".join(
        f"{_layer_name(name)} {text} {p:.0%}"
        for name, text, p in zip(best["name"], best["text"], best["probability"], strict=True)
    )
    figure.caption = tr(
        "The model's guess changes from layer to layer: the best tokens if norm and head were applied after each "
        "layer, darker where they are likelier. The frame marks the token that the step chose."
    )
    return figure


def _layer_name(name: str) -> str:
    """Name of a layer in the language of the figure."""
    word, _, number = name.partition(" ")
    return tr("layer {number}", number=number) if word == "layer" else tr_label(name)
