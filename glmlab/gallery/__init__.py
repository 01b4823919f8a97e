"""The catalogue of every figure of the suite, and how all of them are written for a text.

To add a figure, write a function without arguments that returns a :class:`Plate` (figure, data, provenance, caption;
the caption's words stand in captions.py) and add one :class:`Entry` to :data:`CATALOGUE`. ``glmlab figures`` and the
tests of all figures (both languages, widths, contrast, equal bytes) take it from there.
"""

from glmlab.gallery.catalogue import CATALOGUE, find_entries
from glmlab.gallery.plate import Entry, GalleryError, Plate
from glmlab.gallery.writing import make_figures

__all__ = ["CATALOGUE", "Entry", "GalleryError", "Plate", "find_entries", "make_figures"]
