"""The suite's table of contents, read from the notebooks themselves."""

import re
import warnings
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from glmlab.figures.style import picture_bundle
from glmlab.suite.notebooks import NotebookError, find_notebooks, read_notebook

THUMBNAIL_PIXELS = 640
"""Width of a thumbnail's file; it is shown at half of that."""


@dataclass(frozen=True)
class Thumbnail:
    """A small copy of a picture, with its alt text; shows itself in a notebook."""

    png: bytes
    alt: str
    width: int
    height: int

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return picture_bundle(self.png, self.alt, self.width // 2, self.height // 2)


@dataclass(frozen=True)
class Entry:
    """What the table of contents says of one notebook: a heading and a paragraph."""

    name: str
    question: str
    answer: str
    minutes: int
    thumbnail: Thumbnail

    def __repr__(self) -> str:
        return f"{self.name}: {self.question} {self.answer} Reading time: {self.minutes} minutes."

    def _repr_html_(self) -> str:
        return (
            f'<h2><a href="{escape(self.name)}">{escape(self.question)}</a></h2>'
            f"<p>{escape(self.answer)} <em>Reading time: {self.minutes} minutes.</em></p>"
        )


def read_contents(folder: Path) -> Iterator[Entry]:
    """Yield the entries of a folder's numbered notebooks, in order.

    The question is the title, the answer the sentence after "Answer in one sentence:", and the thumbnail the first
    picture among the outputs.

    Raises:
        NotebookError: no notebooks, or one without question, answer, reading time or picture.
    """
    for path in find_notebooks(folder, []):
        if path.name[0].isdigit():
            yield _entry(path)


def _entry(path: Path) -> Entry:
    notebook = read_notebook(path)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    parts = {
        "question": re.search(r"\A# (.+\?)$", text, re.MULTILINE),
        "answer": re.search(r"\*\*Answer in one sentence:\*\*\s+([`*]*[^`*\s].*?)\n\n", text, re.DOTALL),
        "reading time": re.search(r"\*Reading time:\*\s+(\d{1,4}) minutes", text),
    }
    if missing := [name for name, found in parts.items() if not found]:
        raise NotebookError(f"{path.name} has no {missing[0]} at its head. The other notebooks show how it is written.")
    question, answer, minutes = (found[1] for found in parts.values() if found)
    plain = " ".join(re.sub("[`*]", "", answer).split())  # without the signs of code and emphasis
    return Entry(path.name, question, plain[0].upper() + plain[1:], int(minutes), _thumbnail(path, notebook))


def _thumbnail(path: Path, notebook: Any) -> Thumbnail:
    again = f"glmlab notebooks {path.stem} --in-place"
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    picture = next((output for output in outputs if "image/png" in output.get("data", {})), None)
    if picture is None:
        raise NotebookError(f"{path.name} shows no picture. Run it first: {again}.")
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            image = Image.open(BytesIO(b64decode(picture.data["image/png"])), formats=["png"]).convert("RGB")
    except (ValueError, TypeError, OSError, SyntaxError, Image.DecompressionBombError, Warning) as error:
        raise NotebookError(
            f"the first picture of {path.name} is no PNG that can be read ({error}). Run it again: {again}."
        ) from error
    alt = picture.get("metadata", {}).get("image/png", {}).get("alt")
    if not alt:
        raise NotebookError(
            f"the first picture of {path.name} has no alternative text. Show it with a function of glmlab.figures, and "
            f"run it again: {again}."
        )
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    png = BytesIO()
    image.quantize(32).save(png, format="png", optimize=True)
    return Thumbnail(png.getvalue(), alt, *image.size)
