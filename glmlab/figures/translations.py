"""What figures say, in English or Chinese: every text of a figure goes through :func:`tr`.

The translations are ``data/locale/zh_TW/LC_MESSAGES/glmlab.po``, gettext's format. ``make messages`` collects the texts
from the code: arguments of ``tr`` and ``msg``.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from matplotlib import font_manager, ft2font

from glmlab.core.resources import data_path
from glmlab.figures.style import STYLE, FigureError, current_settings
from glmlab.prompts.format import visible

LOCALES = {"zh": "zh_TW"}
"""Language of a figure -> folder of data/locale; English stands in the code."""

_FIRST_EMOJI = 0x1F000  # from here on U+…: the few that a font has are line drawings of another meaning


def msg(text: str) -> str:
    """Mark a text for translation where it is a constant; ``tr`` translates it when the figure is drawn."""
    return text


LABEL_PARTS = (  # what labels of curves and names of stages are made of
    msg("the chapter"), msg("original code"), msg("dynamic cache"), msg("static cache"), msg("embedded"),
    msg("embeddings"), msg("repetition penalty"), msg("minimum length"), msg("temperature"), msg("eager"),
    msg("compiled"),
)  # fmt: skip


def tr(text: str, **fields: Any) -> str:
    """A text of the suite in the language of the figure, with its fields filled in.

    Raises:
        FigureError: the text has no translation.

    Example:
        >>> from glmlab.figures import figure_settings
        >>> tr("{count:,} survive", count=3)
        '3 survive'
        >>> with figure_settings(lang="zh"):
        ...     tr("{count:,} survive", count=3)
        '剩 3 個'
    """
    known = _translations(current_settings().lang)
    if known is not None:
        if text not in known:
            raise FigureError(f"{text!r} has no Chinese. Run make messages, and translate it in data/locale.")
        text = known[text]
    return text.format(**fields)


def tr_label(label: str) -> str:
    """A label of the data in the language of the figure: whole, or its parts between commas, as far as it is known.

    Names of models, precisions and cards are the same in every language.

    Example:
        >>> from glmlab.figures import figure_settings
        >>> with figure_settings(lang="zh"):
        ...     tr_label("ChatGLM3-6B, original code, int4"), tr_label("")
        ('ChatGLM3-6B，原始程式碼，int4', '未命名')
    """
    if not label:
        return tr("unnamed")
    known = _translations(current_settings().lang)
    if known is None:
        return label
    return known.get(label) or "，".join(known.get(part, part) for part in label.split(", "))


@cache
def _translations(lang: str) -> Mapping[str, str] | None:
    """English text -> translation; None for English itself."""
    if lang not in LOCALES:
        return None
    from babel.messages.pofile import read_po

    with data_path("locale", LOCALES[lang], "LC_MESSAGES", "glmlab.po").open("rb") as file:
        catalog = read_po(file, locale=LOCALES[lang])
    return {str(message.id): str(message.string) for message in catalog if message.id and message.string}


def printable(text: str) -> str:
    """Text as a figure can draw it: white space as signs, and as U+… what none of the fonts has, emoji first.

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
