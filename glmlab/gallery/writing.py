"""Write figures for a text: pictures, data, and a caption with what a reader of the text needs to know."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmlab.figures.saving import FORMATS, check_formats, save_figure, write_file
from glmlab.figures.settings import FigureSettings, figure_settings
from glmlab.gallery.catalogue import find_entries
from glmlab.gallery.plate import Entry, GalleryError, Plate

_MM_PER_INCH = 25.4
_LONGEST_FACT = 120  # characters of a fact; longer ones are in the .json


@dataclass(frozen=True)
class Made:
    """A figure that was written."""

    entry: Entry
    files: tuple[Path, ...]
    width_mm: float
    asked_mm: float | None

    def __str__(self) -> str:
        wider = self.asked_mm is not None and self.width_mm > self.asked_mm + 0.5
        why = f" ({self.asked_mm:g} mm asked: narrower, its letters would be too small)" if wider else ""
        return f"{self.entry.name}: {self.width_mm:.0f} mm{why}"


def make_figures(
    folder: Path,
    names: Sequence[str] = (),
    *,
    formats: Sequence[str] = FORMATS,
    style: str = "paper",
    width_mm: float | None = None,
    lang: str = "en",
) -> Iterator[Made]:
    """Make figures of the catalogue and write each as it is made.

    Args:
        folder: where they go; it is made. Of each figure NAME: the picture in every format, ``NAME.csv`` (what it
            shows), ``NAME.json`` (provenance) and ``NAME.md`` (caption, alternative text, provenance in short).
        names: of the catalogue; all where none is given.
        formats: of pdf, svg, png.
        style: paper, slide or web.
        width_mm: of every figure; a diagram or table that needs more keeps its least width.
        lang: en or zh, for labels, captions and alternative texts.

    Returns:
        What was made, one figure at a time.

    Raises:
        GalleryError: an unknown name, or a folder that is a file.
        FigureError: an unknown format, style or language, or a width that cannot be.
    """
    entries = find_entries(names)
    check_formats(formats)
    settings = FigureSettings(style, width_mm, lang)
    if folder.exists() and not folder.is_dir():
        raise GalleryError(f"{folder} is a file, so no figures can go into it. Give another --out.")
    return (_make(entry, folder, formats, settings) for entry in entries)


def _make(entry: Entry, folder: Path, formats: Sequence[str], settings: FigureSettings) -> Made:
    with figure_settings(style=settings.style, width_mm=settings.width_mm, lang=settings.lang):
        plate = entry.build()
    files = save_figure(
        plate.figure, folder / entry.name, data=plate.data, provenance=plate.provenance, formats=formats
    )
    text = folder / f"{entry.name}.md"
    write_file(text, caption_text(entry, plate).encode("utf-8"))
    width_mm = float(plate.figure.get_figwidth()) * _MM_PER_INCH
    return Made(entry, (*files, text), width_mm, settings.width_mm)


def caption_text(entry: Entry, plate: Plate) -> str:
    """Caption, alternative text and provenance of a figure, as Markdown."""
    facts = [f"- {name}: {fact}" for name, fact in _facts(plate.provenance)]
    width, height = (inches * _MM_PER_INCH for inches in plate.figure.get_size_inches())
    return "\n".join(
        [
            f"# {entry.name}",
            "",
            plate.caption,
            "",
            "## Alternative text",
            "",
            " ".join(plate.figure.alt_text.split()),
            "",
            "## Provenance",
            "",
            f"- notebook: {entry.notebook}",
            f"- kind: {entry.kind}",
            f"- size: {width:.0f} mm x {height:.0f} mm",
            *facts,
            "",
        ]
    )


def _facts(provenance: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Facts of a provenance on one level, those that fit a line; the .json has all of them in full."""
    for name, fact in provenance.items():
        if isinstance(fact, Mapping):
            yield from _facts(fact, f"{prefix}{name}: ")
        elif fact is not None and fact != [] and len(str(fact)) <= _LONGEST_FACT:
            yield f"{prefix}{name}", " ".join(str(fact).split())
