"""Graphics cards: memory, architecture, CUDA context and peak rates, from ``data/gpus.csv``."""

from functools import cache
from typing import NamedTuple

import pandas as pd

from glmlab.core.errors import GlmlabError
from glmlab.core.resources import data_path


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
    table = pd.read_csv(data_path("gpus.csv"))
    return {
        str(row["name"]): Card(
            name=str(row["name"]),
            memory_mib=int(row["memory_mib"]),
            architecture=str(row["architecture"]),
            cuda_context_mib=None if pd.isna(row["cuda_context_mib"]) else float(row["cuda_context_mib"]),
            bandwidth_bytes_per_s=(
                None if pd.isna(row["bandwidth_bytes_per_s"]) else float(row["bandwidth_bytes_per_s"])
            ),
            fp16_flops_per_s=None if pd.isna(row["fp16_flops_per_s"]) else float(row["fp16_flops_per_s"]),
            source=str(row["source"]),
        )
        for _, row in table.iterrows()
    }


def find_card(name: str) -> Card:
    """Return a GPU by name, however it is spelled; :class:`CardError` names those that there are.

    Example:
        >>> find_card("rtx4060").memory_mib
        8188
    """
    wanted = _spelled(name)
    for card in cards().values():
        if _spelled(card.name) == wanted:
            return card
    raise CardError(f"no card {name!r} in data/gpus.csv. There is: {', '.join(cards())}.")


def _spelled(name: str) -> str:
    """The name without maker, line and blanks: drivers write "NVIDIA GeForce RTX 4060 Laptop GPU"."""
    plain = name.lower()
    for word in ("nvidia", "geforce", "tesla", "gpu"):
        plain = plain.replace(word, "")
    return "".join(character for character in plain if character.isalnum())
