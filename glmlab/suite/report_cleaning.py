"""What of a notebook's HTML goes into the report: text, tables and its own pictures; nothing that runs or loads.

A committed notebook is the suite's own, but one that somebody edited may hold anything. Everything passes through one
gate: tags and attributes that are not on a list are gone, and so is every style that could name an address.
"""

import re

import bleach
from bleach.css_sanitizer import CSSSanitizer
from bs4 import BeautifulSoup
from bs4.element import Tag

TAGS = frozenset(
    {"a", "b", "blockquote", "br", "caption", "code", "dd", "del", "details", "div", "dl", "dt", "em", "h1", "h2", "h3"}
    | {"h4", "h5", "h6", "hr", "i", "img", "kbd", "li", "ol", "p", "pre", "s", "small", "span", "strong", "sub", "sup"}
    | {"summary", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul"}
)
_ATTRIBUTES = {
    "*": ["class", "id", "style", "title"],
    "a": ["href"],
    "img": ["alt", "src", "width", "height"],
    "td": ["colspan", "rowspan"],
    "th": ["colspan", "rowspan", "scope"],
}
_STYLES = CSSSanitizer(
    allowed_css_properties=["background-color", "color", "font-weight", "height", "text-align", "white-space", "width"]
)
_WITH_CONTENT = ("script", "style", "iframe", "object", "embed", "template", "noscript", "svg", "math", "head", "title")
_NAMES_AN_ADDRESS = re.compile(r"(?<![\w-])(?!(?:rgb|hsl)a?\()[\w-]*\(|\\|:[^;]*//")
_PLAIN_BACKGROUND = re.compile(r"background\s*:\s*(#[0-9a-fA-F]{3,8})\s*(;|$)")


def clean(html: str, *, chapter: str, chapters: frozenset[str]) -> str:
    """The HTML of a chapter without anything that runs, loads or leads to a file that is not there.

    Args:
        html: of one notebook.
        chapter: its stem; ids are made its own, so that those of two notebooks do not meet.
        chapters: stems of all notebooks of the document; links to them become links inside it.

    Raises:
        ParserRejectedMarkup: markup that no parser reads.

    Example:
        >>> clean('<p onclick="x()">a<script>x()</script></p>', chapter="01", chapters=frozenset())
        '<p>a</p>'
    """
    soup = BeautifulSoup(html, "html.parser")
    for tag in soup.find_all(_WITH_CONTENT):
        tag.decompose()
    for tag in soup.find_all(True):
        _mend(tag, chapter, chapters)
    cleaned: str = bleach.clean(
        str(soup),
        tags=TAGS,
        attributes=_ATTRIBUTES,
        protocols={"http", "https", "data"},
        css_sanitizer=_STYLES,
        strip=True,
    )
    return cleaned


def _mend(tag: Tag, chapter: str, chapters: frozenset[str]) -> None:
    if tag.has_attr("id"):
        tag["id"] = f"{chapter}-{tag['id']}"
    if tag.has_attr("style"):
        style = _PLAIN_BACKGROUND.sub(r"background-color: \1\2", str(tag["style"]))
        tag["style"] = ";".join(part for part in style.split(";") if not _NAMES_AN_ADDRESS.search(part))
    if tag.name == "a":
        address = str(tag.get("href", ""))
        stem = address.split("/")[-1].partition(".ipynb")[0]
        if "anchor-link" in str(tag.get("class")):
            tag.decompose()
        elif address.startswith("#"):
            tag["href"] = f"#{chapter}-{address[1:]}"
        elif ".ipynb" in address and stem in chapters:
            tag["href"] = f"#{stem}"
        elif not address.startswith(("https://", "http://")):
            del tag["href"]
    if tag.name == "img" and not str(tag.get("src", "")).startswith(("data:image/png;", "data:image/jpeg;")):
        tag.decompose()


def with_signs(html: str) -> str:
    """Mark emoji, for which printers have no glyph; in print their code points stand in their place.

    Example:
        >>> with_signs('<p title="👋">👋</p>')
        '<p title="👋"><span class="sign" data-code="U+1F44B">👋</span></p>'
    """
    return re.sub(r">[^<]+", lambda text: _EMOJI.sub(_sign, text.group()), html)


_EMOJI = re.compile("[\U0001f000-\U0001faff]")


def _sign(match: re.Match[str]) -> str:
    return f'<span class="sign" data-code="U+{ord(match.group()):04X}">{match.group()}</span>'
