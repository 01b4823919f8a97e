"""Prompts: tokens as chips coloured by role, formats side by side, the rules of the roles, growth from turn to turn."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from glmlab.figures.labels import (
    AreaLook,
    legend_of_areas,
    msg,
    printable,
    stack_bars,
    tr,
    tr_label,
)
from glmlab.figures.saving import Arguments, draws
from glmlab.figures.style import (
    COLORS,
    GRID_COLOR,
    FigureError,
    Look,
    SuiteFigure,
    current_settings,
    drawing,
    pt,
    set_size,
    sheet,
    text_width_in,
)
from glmlab.prompts.format import ROLE_COLORS

_WIDTH_IN = 6.3
_MOST_TOKENS = 400  # about two pages
_NO_ROLE = msg("prefix")
_KINDS = (msg("role"), msg("metadata"), msg("text"), msg("generation prompt"), msg("start"))
_TEXT_PT, _ID_PT = 7.0, 6.0
_LEAST_COLUMN_IN = 1.6  # of a chat format
_MIDDLE: Look = {"ha": "center", "va": "center_baseline"}


def _with_hex(table: pd.DataFrame) -> tuple[pd.DataFrame, Arguments]:
    """The table of ``dissect`` with its bytes in hex, as a file keeps them."""
    if not any(isinstance(held, bytes) for held in table.get("bytes", [])):
        return table, {}
    return pd.DataFrame(table).assign(bytes=[held.hex() for held in table["bytes"]]), {}


@draws(
    {"id": int, "piece": str, "text": str, "bytes": str, "message": str, "role": str, "kind": str, "special": bool},
    empty=f"0 tokens cannot be drawn: a figure shows 1 to {_MOST_TOKENS}.",
    convert=_with_hex,
)
def prompt_figure(table: pd.DataFrame) -> SuiteFigure:
    """Draw every token of a prompt (``dissect``) as a chip on its role's colour, its id below: at most 400 tokens.

    Special tokens have the full colour. A message is a paragraph, wrapped to the width of a page.

    Raises:
        FigureError: no token, or more than 400.

    Example:
        >>> table = pd.DataFrame({"id": [64795], "piece": ["<|user|>"], "text": [""], "bytes": [b""], "role": ["user"],
        ...     "message": [0], "kind": ["role"], "special": [True]})
        >>> [text.get_text() for text in prompt_figure(table).axes[0].texts]
        ['user', '<|user|>', '64795']
    """
    if len(table) > _MOST_TOKENS:
        raise FigureError(
            f"{len(table)} tokens cannot be drawn: a figure shows 1 to {_MOST_TOKENS}. "
            f"Give a part of the table, such as table.head({_MOST_TOKENS})."
        )
    _check_roles(table)
    page = current_settings().layout_width_in(_WIDTH_IN)
    with drawing(_WIDTH_IN, 1, layout=None) as figure:
        axes = sheet(figure)
        height = _draw_paragraphs(axes, table, page)
        set_size(figure, page, height)
        axes.set(xlim=(0, page), ylim=(height, 0))  # inches of the paper style from the upper edge
    tokens = ", ".join(f"{count} {tr_label(str(kind))}" for kind, count in table["kind"].value_counts().items())
    roles = ", ".join(role for role in table["role"].drop_duplicates() if role)
    figure.alt_text = tr(
        "The {count} tokens of a prompt as chips, coloured by role ({roles}): {tokens}.",
        count=len(table), roles=roles, tokens=tokens,
    )  # fmt: skip
    figure.caption = tr(
        "A role is one token, a text is many: a prompt as the model reads it. A chip is a token, its id below; "
        "strong colours are special tokens, tints are text, and the role stands at the left. Blanks are ␣, line "
        "breaks ↵, and ∅ is the blank that the tokenizer puts before a text. <0xF0> is one byte of a character that"
        " has no token of its own."
    )
    return figure


def _check_roles(table: pd.DataFrame) -> None:
    if unknown := sorted(set(table["role"]) - set(ROLE_COLORS)):
        raise FigureError(f"role {unknown[0]!r} has no colour. Known are {', '.join(filter(None, ROLE_COLORS))}.")


def _draw_paragraphs(axes: Axes, table: pd.DataFrame, page: float) -> float:
    """Draw the chips and return the height they take, in inches."""
    margin, label_width, gap, line, chip_height = 0.06, 0.95, 0.025, 0.36, 0.19
    x, y = margin + label_width, margin
    paragraph: tuple[str, str] | None = None
    for row in table.to_dict("records"):
        beginning = (row["role"], str(row["message"]))
        if beginning != paragraph:
            y += line if paragraph is not None else 0
            x, paragraph = margin + label_width, beginning
            label = tr("answer") if row["kind"] == "generation prompt" else row["role"] or tr(_NO_ROLE)
            axes.text(margin, y + chip_height / 2, label, fontsize=pt(_TEXT_PT), va="center", color="#333333")
        shown, number = _chip_text(row), str(row["id"])
        width = max(text_width_in(shown, _TEXT_PT), text_width_in(number, _ID_PT)) + 0.06
        if x + width > page - margin:
            x, y = margin + label_width, y + line
        look: Look = {"facecolor": ROLE_COLORS[row["role"]], "alpha": 0.75 if row["special"] else 0.25, "linewidth": 0}
        axes.add_patch(Rectangle((x, y), width, chip_height, **look))
        middle = x + width / 2
        axes.text(middle, y + chip_height / 2, shown, fontsize=pt(_TEXT_PT), **_MIDDLE)
        axes.text(middle, y + chip_height + 0.06, number, fontsize=pt(_ID_PT), color="#555555", **_MIDDLE)
        x += width + gap
    return y + line + margin


def _chip_text(row: Mapping[Any, Any]) -> str:
    """What a chip says: the piece of a special token, the text of another, a byte in hex where it is only a part."""
    if row["special"]:
        return printable(row["piece"])
    if not row["text"]:
        return "∅"  # the blank that the tokenizer puts before a text
    part = len(row["bytes"]) < 2 * len(row["text"].encode("utf-8", "surrogatepass"))
    return f"<0x{row['bytes'].upper()}>" if part else printable(row["text"])


@draws(
    {"format": str, "kind": str, "role": str, "text": str},
    empty="no segments to draw: give the parts of at least one prompt.",
)
def format_figure(segments: pd.DataFrame) -> SuiteFigure:
    """Draw the same conversation in several chat formats (``segment_table``), side by side, on the roles' colours.

    What the format adds to the message texts has the full colour.

    Example:
        >>> table = pd.DataFrame({"format": ["GLM-4"] * 2, "kind": ["role", "text"], "role": ["user"] * 2,
        ...     "text": ["<|user|>\\n", "你好"]})
        >>> [text.get_text() for text in format_figure(table).axes[0].texts]
        ['GLM-4', '<|user|>↵', '你好']
    """
    _check_roles(segments)
    formats = {str(name): of_format for name, of_format in segments.groupby("format", sort=False)}
    page = current_settings().layout_width_in(_WIDTH_IN)
    with drawing(_WIDTH_IN, 1, layout=None) as figure:
        axes = sheet(figure)
        abreast = max(1, min(len(formats), int(page / _LEAST_COLUMN_IN)))
        top, bottoms = 0.0, [0.0]
        for index, (name, of_format) in enumerate(formats.items()):
            if index and index % abreast == 0:
                top, bottoms = max(bottoms), [0.0]
            column = page / abreast
            bottoms.append(_draw_column(axes, of_format, name, index % abreast * column, top, column))
        height = max(bottoms) + 0.3
        set_size(figure, page, height)
        axes.set(xlim=(0, page), ylim=(height, 0))
        roles = list(dict.fromkeys(segments["role"]))
        handles = [Patch(facecolor=ROLE_COLORS[role], alpha=0.75, label=role or tr(_NO_ROLE)) for role in roles]
        figure.legend(handles=handles, loc="lower center", ncols=len(roles), fontsize=pt(_TEXT_PT), columnspacing=1)
    figure.alt_text = tr("The same conversation in several chat formats: ") + "; ".join(
        f"{name}: {''.join(of_format['text'])!r}" for name, of_format in formats.items()
    )
    figure.caption = tr(
        "Model families put different frames around the same messages. Strong colours are what the format adds, "
        "tints are the messages."
    )
    return figure


def _draw_column(axes: Axes, segments: pd.DataFrame, title: str, left: float, top: float, width: float) -> float:
    """Draw one format's text and return where it ends, in inches from the upper edge."""
    margin, line = 0.08, 0.19
    start, right = left + margin, left + width - margin
    axes.text(start, top + margin + 0.06, title, fontsize=pt(9), va="center", fontweight="bold")
    x, y = start, top + margin + 0.22
    for row in segments.to_dict("records"):
        runs: dict[tuple[float, float], str] = {}  # where a line of the segment begins -> its text
        place = x, y
        for word in _words(row["text"], right - start):
            if x + text_width_in(word, _TEXT_PT) > right + 1e-6 and x > start:
                place = x, y = start, y + line
            runs[place] = runs.get(place, "") + word
            x = place[0] + text_width_in(runs[place], _TEXT_PT)
            if word == "↵":
                place = x, y = start, y + line
        alpha = 0.25 if row["kind"] == "text" else 0.75
        for (run_x, run_y), text in runs.items():
            look: Look = {"facecolor": ROLE_COLORS[row["role"]], "alpha": alpha, "linewidth": 0}
            axes.add_patch(Rectangle((run_x, run_y), text_width_in(text, _TEXT_PT), line * 0.9, **look))
            axes.text(run_x, run_y + line * 0.45, text, fontsize=pt(_TEXT_PT), va="center_baseline")
    return y + line


def _words(text: str, most_in: float) -> Iterator[str]:
    """Printable words with the blank behind them; a character from CJK on, or of a too long word, is one of its own."""
    for word in re.findall(r"\n|[\u2e80-\U0010ffff]|[^ \n\u2e80-\U0010ffff]* |[^ \n\u2e80-\U0010ffff]+", text):
        shown = printable(word)
        yield from [shown] if text_width_in(shown, _TEXT_PT) <= most_in else shown


def _with_last(transitions: pd.DataFrame) -> tuple[pd.DataFrame, Arguments]:
    """The table of ``role_transitions`` with its index as a column, as a file keeps it."""
    return (transitions if "last" in transitions else transitions.reset_index(names="last")), {}


_PLACES = {"start": (0, 1), "system": (0, 0), "user": (1, 1), "assistant": (2, 1), "observation": (2, 0)}
"""Column and row of every state."""


@draws({"last": str}, empty="no roles to draw: role_transitions gives the table.", convert=_with_last)
def roles_figure(transitions: pd.DataFrame) -> SuiteFigure:
    """Draw which role may follow which (``role_transitions``) as a state diagram: an arrow leads to what may come next.

    Raises:
        FigureError: a role other than the four of ChatGLM3, or "start".

    Example:
        >>> roles_figure(pd.DataFrame({"user": [True, False]}, index=["start", "user"])).alt_text
        'Which role may follow which. After start: user. After user: nothing.'
    """
    nexts = {row["last"]: [str(role) for role, allowed in row.items() if role != "last" and allowed]
             for row in transitions.to_dict("records")}  # fmt: skip
    if unknown := [role for role in [*transitions.columns.drop("last"), *nexts] if role not in _PLACES]:
        raise FigureError(f"role {unknown[0]!r} has no place. Known are {', '.join(_PLACES)}.")
    width, height = current_settings().layout_width_in(4.6), 1.7
    box_width, box_height = 0.9, 0.3
    with drawing(4.6, height, layout=None) as figure:
        axes = sheet(figure)
        axes.set(xlim=(0, width), ylim=(0, height))  # inches of the paper style
        boxes = {}
        for role in dict.fromkeys([*nexts, *(role for roles in nexts.values() for role in roles)]):
            column, row = _PLACES[role]
            x, y = 0.55 + column * (width - 1.1) / 2, 0.3 + row * 0.75
            color = ROLE_COLORS.get(role, "#ffffff")
            look: Look = {"facecolor": (*to_rgb(color), 0.5), "edgecolor": GRID_COLOR, "linewidth": pt(0.6)}
            boxes[role] = Rectangle((x - box_width / 2, y - box_height / 2), box_width, box_height, **look)
            axes.add_patch(boxes[role])
            axes.text(x, y, tr_label(role), fontsize=pt(8), **_MIDDLE)
        arrow: Look = {"arrowstyle": "-|>", "mutation_scale": pt(9), "linewidth": pt(0.9), "color": COLORS["context"]}
        for last, roles in nexts.items():
            for role in roles:
                x, y = boxes[last].get_center()
                ends: Look = {"posA": (x, y), "posB": boxes[role].get_center()}
                bend = 0.2 if last in nexts.get(role, []) else 0.0  # beside the arrow back
                if role == last:
                    ends = {"posA": (x + 0.2, y + box_height / 2), "posB": (x - 0.2, y + box_height / 2)}
                    bend = 1.1
                else:
                    ends |= {"patchA": boxes[last], "patchB": boxes[role]}
                axes.add_patch(FancyArrowPatch(**ends, connectionstyle=f"arc3,rad={bend}", **arrow))
    sentences = [
        tr("After {before}: {roles}.", before=tr_label(last), roles=", ".join(roles) or tr("nothing"))
        for last, roles in nexts.items()
    ]
    figure.alt_text = " ".join([tr("Which role may follow which."), *sentences])
    figure.caption = tr(
        "Roles follow a fixed order: every arrow leads to a role that may come next. Computed by asking the checker"
        " pair by pair."
    )
    return figure


@draws(
    {"turn": int, "prompt_tokens": int, "kept_tokens": int, "answer_tokens": int, "fed_tokens": int},
    empty="no turns to draw: give messages of at least one turn.",
)
def growth_figure(growth: pd.DataFrame) -> SuiteFigure:
    """Draw a ``prompt_growth``: what of every turn's prompt is the old prompt, the answer to it, and new to the model.

    Example:
        >>> growth = pd.DataFrame({"turn": [1, 2], "prompt_tokens": [7, 20], "kept_tokens": [0, 7],
        ...     "answer_tokens": [0, 8], "fed_tokens": [7, 5]})
        >>> growth_figure(growth).axes[0].get_xlabel()
        'prompt (tokens)'
    """
    looks: dict[str, AreaLook] = {
        "kept_tokens": (ROLE_COLORS[""], ""),
        "answer_tokens": (ROLE_COLORS["assistant"], "////"),
        "fed_tokens": (ROLE_COLORS["user"], "...."),
    }
    names = tr("old prompt, cached"), tr("answer, cached as it was generated"), tr("new, still to be read")
    with drawing(_WIDTH_IN, 1.1 + 0.28 * len(growth), axes_grid_axis="x", axes_axisbelow=True) as figure:
        axes = figure.subplots()
        stack_bars(axes, growth[list(looks)], looks, growth["turn"].map(str).tolist())
        axes.set(xlabel=tr("prompt (tokens)"), ylabel=tr("turn"))
        legend_of_areas(figure, dict(zip(names, looks.values(), strict=True)))
    figure.alt_text = tr(
        "The prompt of each of {turns} turns, as a bar of tokens. Turn {turn}: {prompt_tokens} tokens, of which "
        "{kept_tokens} are the old prompt, {answer_tokens} the answer to it and {fed_tokens} are new.",
        turns=len(growth), **growth.iloc[-1],
    )  # fmt: skip
    figure.caption = tr(
        "Of every prompt only the new part is read. The plain part is the prompt of the turn before and the hatched"
        " part its answer: both are in the KV cache. Only the dotted part is read anew."
    )
    return figure
