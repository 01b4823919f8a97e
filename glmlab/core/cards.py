"""Graphics cards: memory, architecture, CUDA context and peak rates, from ``data/gpus.csv``."""

import re
from functools import cache
from typing import NamedTuple

import pandas as pd

from glmlab.core.errors import GlmlabError
from glmlab.core.resources import data_path

ASSUMED_CONTEXT_MIB = 119.0
"""CUDA context where a card's own is not known: that of an RTX 4060."""


class CardError(GlmlabError):
    """A graphics card that ``data/gpus.csv`` does not list."""


class Card(NamedTuple):
    """One row of ``data/gpus.csv``."""

    name: str
    memory_mib: int
    architecture: str
    cuda_context_mib: float | None
    bandwidth_bytes_per_s: float | None
    fp16_flops_per_s: float | None
    source: str


@cache
def cards() -> dict[str, Card]:
    """GPUs of ``data/gpus.csv`` by name.

    Example:
        >>> cards()["RTX 4060"].architecture
        'ada'
    """
    table = pd.read_csv(data_path("gpus.csv")).astype(object)
    rows = table.where(table.notna(), None).to_dict("records")
    return {str(row["name"]): Card(**{str(column): value for column, value in row.items()}) for row in rows}


def find_card(name: str | Card) -> Card:
    """Return a GPU by name, however it is spelled; :class:`CardError` names those that there are.

    Example:
        >>> find_card("rtx4060").memory_mib
        8188
    """
    if isinstance(name, Card):
        return name
    wanted = _spelled(name)
    for card in cards().values():
        if _spelled(card.name) == wanted:
            return card
    raise CardError(f"no card {name!r} in data/gpus.csv. There is: {', '.join(cards())}.")


def cuda_context(card: Card | None) -> tuple[float, str]:
    """MiB of a card's CUDA context, and where the figure comes from.

    Example:
        >>> cuda_context(None)
        (119.0, "assumed, no card is given: an RTX 4060's figure; name a card for its own")
    """
    if card is not None and card.cuda_context_mib is not None:
        return card.cuda_context_mib, f"{card.name}: {card.source}"
    why = f"none is known for {card.name}" if card else "no card is given"
    return ASSUMED_CONTEXT_MIB, f"assumed, {why}: an RTX 4060's figure; name a card for its own"


def short_name(gpu: str) -> str:
    """A GPU's name without maker and product line, as names of files have it.

    Example:
        >>> short_name("NVIDIA GeForce RTX 4060 Laptop GPU"), short_name("NVIDIA H100 80GB HBM3")
        ('rtx-4060-laptop', 'h100-80gb-hbm3')
    """
    words = re.findall(r"[a-z0-9]+", gpu.lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce", "tesla", "gpu"))


def _spelled(name: str) -> str:
    return short_name(name).replace("-", "")
