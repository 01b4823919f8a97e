"""The table that ``dissect`` returns: one row a token, and how it shows itself; imports no torch."""

import unicodedata
from collections.abc import Callable
from html import escape
from typing import Any

import pandas as pd

ROLE_COLORS = {
    "system": "#cc79a7",
    "user": "#0072b2",
    "assistant": "#009e73",
    "observation": "#e69f00",
    "": "#8c8c8c",  # what belongs to no message: the prefix
}
"""Colour of every role, the same in tables and figures (Okabe and Ito's palette)."""

COLUMNS = ("position", "id", "piece", "text", "bytes", "start", "end", "message", "role", "kind", "special")

_SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
_UNSEEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}  # control, format, unassigned, private, surrogate, blanks


def visible(text: str) -> str:
    """Text with its white space as signs, and every character that shows nothing as its code point.

    Example:
        >>> visible("two  blanks\\n"), visible("a\\u202eb"), visible("\\u0301")
        ('two␣␣blanks↵', 'aU+202Eb', '◌́')
    """
    shown = "".join(
        _SIGNS.get(character)
        or (f"U+{ord(character):04X}" if unicodedata.category(character) in _UNSEEN else character)
        for character in text
    )
    return f"◌{shown}" if text and unicodedata.category(text[0]).startswith("M") else shown


class PromptTable(pd.DataFrame):
    """Every token of a prompt, in order; in a notebook a table coloured by role, in which all text is escaped.

    Columns:
        position: from 0.
        id, piece: the token's number and its entry in the vocabulary.
        text: the characters of the text that it stands for; a character spelled in several tokens is in all of them.
        bytes: the bytes that it adds to the text, in UTF-8. Special tokens and the dummy prefix add none.
        start, end: those characters in the metadata line or in the message's text (with its list of tools); missing
            for tokens that are no text.
        message: index of the message; missing for the prefix and the generation prompt.
        role: of the message, or of the answer that the generation prompt opens; empty for the prefix.
        kind: prefix, role, metadata, text or generation prompt.
        special: whether it is a special token.
    """

    @property
    def _constructor(self) -> Callable[..., "PromptTable"]:
        return PromptTable

    def _repr_html_(self) -> str | None:
        """The first and last rows; pandas' ``display.max_rows`` says how many."""
        if not set(COLUMNS) <= set(self.columns):
            plain: str | None = pd.DataFrame(self)._repr_html_()  # type: ignore[operator]  # pandas-stubs leave it out
            return plain
        limit = pd.get_option("display.max_rows") or len(self)
        head = min(len(self), -(-limit // 2))
        tail = max(len(self) - limit // 2, head)
        body = [_html_row(row) for row in self.iloc[:head].to_dict("records")]
        if tail > head:
            body.append(f'<tr><td colspan="9" style="text-align:center">… {tail - head:,} tokens more …</td></tr>')
        body += [_html_row(row) for row in self.iloc[tail:].to_dict("records")]
        titles = ("position", "id", "piece", "text", "bytes", "span", "message", "role", "kind")
        header = "".join(f'<th style="text-align:left">{title}</th>' for title in titles)
        return f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _html_row(row: dict[Any, Any]) -> str:
    color = ROLE_COLORS[row["role"]]
    # special tokens on the role's full colour, text on a tint of it; the ink is given too, for dark pages
    background = color if row["special"] else _tint(color)
    style = f"background:{background};color:{_ink(background)}"
    cells = (
        row["position"],
        row["id"],
        visible(row["piece"]),
        visible(row["text"]) + _share(row["text"], row["bytes"]),
        row["bytes"].hex(" ").upper(),
        "" if pd.isna(row["start"]) else f"{row['start']}–{row['end']}",
        "" if pd.isna(row["message"]) else row["message"],
        row["role"],
        row["kind"],
    )
    return f'<tr style="{style}">{"".join(_html_cell(cell) for cell in cells)}</tr>'


def _html_cell(value: Any) -> str:
    return f'<td style="text-align:left">{escape(str(value))}</td>'


def _share(text: str, held: bytes) -> str:
    """How much of the text the token itself holds, where a character is spelled in several tokens."""
    whole = len(text.encode("utf-8", "surrogatepass"))
    return f" ({len(held)} of {whole} bytes)" if len(held) != whole else ""


def _channels(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def _tint(color: str, strength: float = 0.25) -> str:
    """The colour mixed with white."""
    return "#" + "".join(f"{round(255 - strength * (255 - channel)):02x}" for channel in _channels(color))


def _ink(background: str) -> str:
    """Black, or white where the background is dark."""
    red, green, blue = _channels(background)
    return "#fff" if 0.3 * red + 0.59 * green + 0.11 * blue < 100 else "#000"
