"""Prompts: tokens as chips coloured by role, formats side by side, the rules of the roles, growth from turn to turn."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pandas as pd
from matplotlib import font_manager, ft2font
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from glmlab.figures.settings import FigureError, current_settings, pt, tr
from glmlab.figures.style import STYLE, SuiteFigure, drawing, legend_below, set_size, text_width_in
from glmlab.prompts.format import ROLE_COLORS, visible

_WIDTH_INCHES = 6.3
_MOST_TOKENS = 400  # about two pages
_FIRST_EMOJI = 0x1F000  # from here on U+…: the few that a font has are line drawings of another meaning
_NO_ROLE = "prefix"
_START = "start"  # row of role_transitions before the first message
_TEXT_PT, _ID_PT = 7.0, 6.0
_LEAST_COLUMN_IN = 1.6  # of a chat format


def printable(text: str) -> str:
    """Text as a figure can draw it: white space as signs, and as U+… what none of the suite's fonts has, emoji first.

    Example:
        >>> printable("你好 👋")
        '你好␣U+1F44B'
    """
    return "".join(
        character if ord(character) in _drawable() and ord(character) < _FIRST_EMOJI else f"U+{ord(character):04X}"
        for character in visible(text)
    )


@cache
def _drawable() -> frozenset[int]:
    """Code points that the fonts of STYLE have a glyph for."""
    paths = [font_manager.findfont(family, fallback_to_default=False) for family in STYLE["font.family"]]
    return frozenset(code for path in paths for code in ft2font.FT2Font(path).get_charmap())


def prompt_figure(table: pd.DataFrame) -> SuiteFigure:
    """Draw every token of a prompt as a chip on its role's colour, its id below: special tokens in full colour.

    Args:
        table: from ``dissect``, or rows of one; at most 400 tokens.

    Returns:
        One paragraph a message, wrapped to the width of a page; as tall as it needs to be.

    Raises:
        FigureError: no token, or too many for print.

    Example:
        >>> table = pd.DataFrame({"id": [64795], "piece": ["<|user|>"], "text": [""], "bytes": [b""], "role": ["user"],
        ...     "message": [0], "kind": ["role"], "special": [True]})
        >>> [text.get_text() for text in prompt_figure(table).axes[0].texts]
        ['user', '<|user|>', '64795']
    """
    if not 0 < len(table) <= _MOST_TOKENS:
        raise FigureError(
            f"{len(table)} tokens cannot be drawn: a figure shows 1 to {_MOST_TOKENS}. "
            f"Give a part of the table, such as table.head({_MOST_TOKENS})."
        )
    page = current_settings().layout_width_in(_WIDTH_INCHES)
    with drawing(_WIDTH_INCHES, 1, layout=None) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        height = _draw_paragraphs(axes, table, page)
        set_size(figure, page, height)
        axes.set_xlim(0, page)
        axes.set_ylim(height, 0)  # inches of the paper style from the upper edge
    tokens = ", ".join(f"{count} {tr(str(kind))}" for kind, count in table["kind"].value_counts().items())
    roles = ", ".join(role for role in table["role"].drop_duplicates() if role)
    figure.alt_text = tr(
        "The {count} tokens of a prompt as chips, coloured by role ({roles}): {tokens}.",
        count=len(table), roles=roles, tokens=tokens,
    )  # fmt: skip
    return figure


def _draw_paragraphs(axes: Axes, table: pd.DataFrame, page: float) -> float:
    """Draw the chips and return the height they take, in inches."""
    margin, label_width, gap, line = 0.06, 0.95, 0.025, 0.36
    chip_height = 0.19
    x, y = margin + label_width, margin
    paragraph: tuple[str, str] | None = None
    for row in table.to_dict("records"):
        role = row["role"] or _NO_ROLE
        beginning = (role, str(row["message"]))
        if beginning != paragraph:
            y += line if paragraph is not None else 0
            x, paragraph = margin + label_width, beginning
            label = tr("answer") if row["kind"] == "generation prompt" else row["role"] or tr(_NO_ROLE)
            axes.text(margin, y + chip_height / 2, label, fontsize=pt(_TEXT_PT), va="center", color="#333333")
        shown = _chip_text(row)
        width = max(text_width_in(shown, _TEXT_PT), text_width_in(str(row["id"]), _ID_PT)) + 0.06
        if x + width > page - margin:
            x, y = margin + label_width, y + line
        color = ROLE_COLORS[row["role"]]
        axes.add_patch(
            Rectangle((x, y), width, chip_height, facecolor=color, alpha=0.75 if row["special"] else 0.25, linewidth=0)
        )
        middle = x + width / 2
        place: dict[str, Any] = {"ha": "center", "va": "center_baseline"}
        axes.text(middle, y + chip_height / 2, shown, fontsize=pt(_TEXT_PT), parse_math=False, **place)
        axes.text(middle, y + chip_height + 0.06, str(row["id"]), fontsize=pt(_ID_PT), color="#555555", **place)
        x += width + gap
    return y + line + margin


def _chip_text(row: Mapping[Any, Any]) -> str:
    """What a chip says: the piece of a special token, the text of another, a byte in hex where it is only a part."""
    text: str = row["text"]
    held: bytes = row["bytes"]
    if row["special"]:
        return printable(row["piece"])
    if not text:
        return "▁"  # the dummy prefix
    if len(held) < len(text.encode("utf-8")):
        return f"{printable(text)}:{held.hex().upper()}"
    return printable(text)


def format_figure(segments: pd.DataFrame) -> SuiteFigure:
    """Draw the same conversation in several chat formats, side by side, every part on its role's colour.

    Args:
        segments: from ``segment_table``: format, kind, role, text. Parts that are no message text are drawn in full
            colour; lines break where the format has a line break, and where a column ends.

    Raises:
        FigureError: no segments.

    Example:
        >>> table = pd.DataFrame({"format": ["GLM-4"] * 2, "kind": ["role", "text"], "role": ["user"] * 2,
        ...     "text": ["<|user|>\\n", "你好"]})
        >>> [text.get_text() for text in format_figure(table).axes[0].texts]
        ['GLM-4', '<|user|>', '↵', '你好']
    """
    if segments.empty:
        raise FigureError("no segments to draw: give the parts of at least one prompt.")
    names = list(dict.fromkeys(segments["format"]))
    page = current_settings().layout_width_in(_WIDTH_INCHES)
    with drawing(_WIDTH_INCHES, 1, layout=None) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        abreast = max(1, min(len(names), int(page / _LEAST_COLUMN_IN)))
        column, top, bottoms = page / abreast, 0.0, [0.0]
        for index, name in enumerate(names):
            if index and index % abreast == 0:
                top, bottoms = max(bottoms), [0.0]
            of_format = segments[segments["format"] == name]
            bottoms.append(_draw_column(axes, of_format, name, index % abreast * column, top, column))
        height = max(bottoms) + 0.3
        set_size(figure, page, height)
        axes.set_xlim(0, page)
        axes.set_ylim(height, 0)
        roles = list(dict.fromkeys(segments["role"]))
        handles = [Patch(facecolor=ROLE_COLORS[role], alpha=0.75, label=role or tr(_NO_ROLE)) for role in roles]
        figure.legend(handles=handles, loc="lower center", ncols=len(roles), fontsize=pt(_TEXT_PT), columnspacing=1)
    figure.alt_text = tr("The same conversation in several chat formats: ") + "; ".join(
        f"{name}: {''.join(segments.loc[segments['format'] == name, 'text'])!r}" for name in names
    )
    return figure


def _draw_column(axes: Axes, segments: pd.DataFrame, title: str, left: float, top: float, width: float) -> float:
    """Draw one format's text and return where it ends, in inches from the upper edge."""
    margin, points, line = 0.08, _TEXT_PT, 0.19
    start, right = left + margin, left + width - margin
    axes.text(start, top + margin + 0.06, title, fontsize=pt(9), va="center", fontweight="bold")
    x, y = start, top + margin + 0.22
    for row in segments.to_dict("records"):
        for text in _line_parts(row["text"], right - start, points, right - x):
            taken = text_width_in(text, points)
            if x + taken > right + 1e-6 and x > start:
                x, y = start, y + line
            alpha = 0.25 if row["kind"] == "text" else 0.75
            axes.add_patch(
                Rectangle((x, y), taken, line * 0.9, facecolor=ROLE_COLORS[row["role"]], alpha=alpha, linewidth=0)
            )
            axes.text(x, y + line * 0.45, text, fontsize=pt(points), va="center_baseline", parse_math=False)
            x += taken
            if text == "↵":
                x, y = start, y + line
    return y + line


def _line_parts(text: str, width: float, points: float, room: float) -> Sequence[str]:
    """Cut a text into parts that fit a line: at line breaks, then wherever the room ends, at blanks where it can."""
    parts: list[str] = []
    for number, piece in enumerate(text.split("\n")):
        if number:
            parts.append("↵")
            room = width
        words = [printable(word) for word in _words(piece)]
        current = ""
        for word in words:
            while word:
                if text_width_in(current + word, points) <= room:
                    current, word = current + word, ""
                elif current:
                    parts.append(current)
                    current, room = "", width
                elif room < width:
                    room = width  # a new line, which the caller begins
                else:
                    cut = next(i for i in range(len(word), 0, -1) if i == 1 or text_width_in(word[:i], points) <= width)
                    parts.append(word[:cut])
                    word = word[cut:]
        if current:
            parts.append(current)
            room -= text_width_in(current, points)
    return parts


def _words(text: str) -> list[str]:
    """Words with the blanks behind them; a character from CJK on is a word of its own."""
    words: list[str] = []
    for character in text:
        if words and ord(character) < 0x2E80 and ord(words[-1][-1]) < 0x2E80 and not words[-1].endswith(" "):
            words[-1] += character
        else:
            words.append(character)
    return words


def roles_figure(transitions: pd.DataFrame) -> SuiteFigure:
    """Draw which role may follow which: rows what came last, columns what comes next.

    Args:
        transitions: from ``role_transitions``.

    Example:
        >>> roles_figure(pd.DataFrame({"user": [True, False]}, index=["start", "user"])).alt_text
        'Which role may follow which. After start: user. After user: nothing.'
    """
    with drawing(4.6, 2.6, axes_grid=False) as figure:
        axes = figure.subplots()
        for i, before in enumerate(transitions.index):
            for j, role in enumerate(transitions.columns):
                allowed = bool(transitions.loc[before, role])
                color = ROLE_COLORS[role] if allowed else "#ffffff"
                axes.add_patch(
                    Rectangle((j, i), 1, 1, facecolor=color, alpha=0.6, edgecolor="#999999", linewidth=pt(0.6))
                )
                answer = tr("yes") if allowed else tr("no")
                axes.text(j + 0.5, i + 0.5, answer, ha="center", va="center", fontsize=pt(8))
        axes.set(xlim=(0, len(transitions.columns)), ylim=(len(transitions), 0), xlabel=tr("next"), ylabel=tr("last"))
        befores = [tr(_START) if role == _START else str(role) for role in transitions.index]
        axes.set_xticks([j + 0.5 for j in range(len(transitions.columns))], list(transitions.columns))
        axes.set_yticks([i + 0.5 for i in range(len(transitions))], befores)
        if max(text_width_in(str(role), 9) for role in transitions.columns) > figure.get_figwidth() / pt(5.6):
            axes.tick_params(axis="x", rotation=20)
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
    sentences = [
        tr(
            "After {before}: {roles}.",
            before=before,
            roles=", ".join(row.index[row.to_numpy(dtype=bool)]) or tr("nothing"),
        )
        for before, (_, row) in zip(befores, transitions.iterrows(), strict=True)
    ]
    figure.alt_text = " ".join([tr("Which role may follow which."), *sentences])
    return figure


def growth_figure(growth: pd.DataFrame) -> SuiteFigure:
    """Draw the prompt of every turn: what is the old prompt, what the answer, what is new to the model.

    Args:
        growth: from ``prompt_growth``.

    Raises:
        FigureError: no turns.

    Example:
        >>> growth = pd.DataFrame({"turn": [1, 2], "prompt_tokens": [7, 20], "kept_tokens": [0, 7],
        ...     "answer_tokens": [0, 8], "fed_tokens": [7, 5]})
        >>> growth_figure(growth).axes[0].get_xlabel()
        'prompt (tokens)'
    """
    if growth.empty:
        raise FigureError("no turns to draw: give messages of at least one turn.")
    parts = (
        ("kept_tokens", tr("old prompt, cached"), ROLE_COLORS[""], ""),
        ("answer_tokens", tr("answer, cached as it was generated"), ROLE_COLORS["assistant"], "////"),
        ("fed_tokens", tr("new, still to be read"), ROLE_COLORS["user"], "...."),
    )
    turns = growth["turn"].tolist()
    with drawing(_WIDTH_INCHES, 1.1 + 0.28 * len(turns)) as figure:
        axes = figure.subplots()
        left = pd.Series(0, index=growth.index)
        for column, label, color, hatch in parts:
            axes.barh(turns, growth[column], left=left, color=color, hatch=hatch, height=0.7, label=label)
            left = left + growth[column]
        axes.set(xlabel=tr("prompt (tokens)"), ylabel=tr("turn"), yticks=turns)
        axes.invert_yaxis()
        axes.set_axisbelow(True)
        axes.grid(visible=False, axis="y")
        legend_below(figure, *axes.get_legend_handles_labels(), ncols=3)
    last = growth.iloc[-1]
    figure.alt_text = tr(
        "The prompt of each of {turns} turns, as a bar of tokens. Turn {turn}: {prompt_tokens} tokens, of which "
        "{kept_tokens} are the old prompt, {answer_tokens} the answer to it and {fed_tokens} are new.",
        turns=len(turns), **{str(name): value for name, value in last.items()},
    )  # fmt: skip
    return figure
