"""What the catalogue of figures is made of: plates, each made by a function of no arguments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import pandas as pd

from glmlab.core.errors import GlmlabError
from glmlab.figures.style import SuiteFigure

if TYPE_CHECKING:
    from glmlab.models.loading import LoadedModel


class GalleryError(GlmlabError):
    """A figure of the catalogue cannot be made as asked."""


@dataclass(frozen=True)
class Plate:
    """A figure that is made, with what it shows and the words under it.

    Attributes:
        figure: drawn in the style, width and language that were set.
        data: the table that it shows.
        provenance: where the data come from: model, precision, device, versions, date, as far as they apply.
        caption: what is shown and how to read it, in the figure's language.
    """

    figure: SuiteFigure
    data: pd.DataFrame
    provenance: Mapping[str, Any]
    caption: str


@dataclass(frozen=True)
class Entry:
    """One figure of the catalogue.

    Attributes:
        name: of its files.
        notebook: stem of the notebook that tells about it.
        kind: "measured" (a recording of data/recordings), "forecast" or "computed" (exact: no clock and no meter).
        build: makes the plate.
    """

    name: str
    notebook: str
    kind: str
    build: Callable[[], Plate]


@cache
def embedded() -> "LoadedModel":
    """The embedded model in fp32 on the CPU: what the plates compute with."""
    from glmlab.models.loading import load_model

    return load_model("embedded", precision="fp32", device="cpu")


def model_provenance() -> dict[str, Any]:
    """Name, precision, device and versions of the embedded model."""
    report = embedded().report
    return {
        "model": report.name, "precision": report.precision, "device": report.device, "versions": report.versions,
    }  # fmt: skip
