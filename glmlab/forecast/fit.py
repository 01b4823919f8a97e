"""Will a model fit here? What it needs at a context length, against the memory that is free.

On a GPU the need is the forecast's highest ``used``: weights, keys and values, what is in flight, inactive memory, and
the CUDA context. Free is what the driver says, plus what this process holds already. On a CPU there is
no such allocator: the need is what load_model asks for (weights and some room to work) and the keys and values.
"""

from dataclasses import dataclass
from typing import Any

import torch

from glmlab.core.cards import Card, CardError, cuda_context, find_card
from glmlab.core.curve import WEIGHT_COLUMNS
from glmlab.core.units import MIB, format_bytes
from glmlab.forecast.forecast import Forecast
from glmlab.forecast.workload import beyond_limit
from glmlab.memory.probes import MemoryProbe
from glmlab.models.checkpoints import find_config
from glmlab.models.kv_cache import kv_cache_bytes
from glmlab.models.loading import build_skeleton, load_config
from glmlab.models.placement import (
    WORKING_BYTES,
    check_precision,
    dtype_beside,
    find_device,
    free_bytes,
    precision_ladder,
    predict_bytes,
    refuse_misfit,
)

DEFAULT_TOKENS = 2048
"""Context length where none is asked for."""

_BESIDE = ("kv_copies_mib", "activations_mib", "inactive_small_mib", "inactive_large_mib")


@dataclass(frozen=True)
class Need:
    """Bytes that a precision needs, by what they are for; they add up to ``total_bytes``."""

    precision: str
    bytes_by_use: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(self.bytes_by_use.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{use} {format_bytes(n_bytes)}" for use, n_bytes in self.bytes_by_use.items() if n_bytes)
        return f"{self.precision} needs {format_bytes(self.total_bytes)}: {parts}"


@dataclass(frozen=True)
class Fit:
    """Whether a model fits, and the largest precision that does."""

    model: str
    tokens: int
    device: str
    free_bytes: int
    total_bytes: int
    asked: Need
    fitting: Need | None
    """The asked precision where it fits, else the largest below it that does; None where none does."""
    assumed: str
    """Assumptions not measured here."""

    @property
    def fits(self) -> bool:
        """Whether the asked precision fits."""
        return self.fitting is self.asked


def will_it_fit(model: str, *, precision: str = "auto", tokens: int = DEFAULT_TOKENS, device: str = "auto") -> Fit:
    """Compare what a model needs at a context length with what is free.

    Args:
        model: "embedded", a checkpoint folder, a config.json, a name of ``data/configs``, or a hub id.
        precision: as for ``load_model``; "auto" asks for the largest.
        tokens: context length to reach.
        device: as for ``load_model``.

    Raises:
        GlmlabError: unknown precision or device, int4 for a model that cannot have it.
        CheckpointError: no such model.
        ProbeError: the GPU's driver does not answer.

    Example:
        >>> fit = will_it_fit("embedded", precision="fp32", device="cpu")
        >>> fit.fits, fit.asked.bytes_by_use["KV payload"]  # 2,048 tokens of 4 KiB
        (True, 8388608)
    """
    check_precision(precision, or_auto=True)
    target = find_device(device)
    skeleton = build_skeleton(load_config(find_config(model)))
    refuse_misfit(model, skeleton, precision)
    ladder = precision_ladder(skeleton, target)
    if precision != "auto":
        ladder = [precision, *(name for name in ladder if _below(name, precision))]
    if target.type == "cuda":
        (reading,) = MemoryProbe(str(target)).read(fast=True)
        name, total = str(reading.name), round((reading.total_mib or 0) * MIB)
        free = total - round(((reading.used_mib or 0) - (reading.process_mib or 0)) * MIB)
    else:
        import psutil

        name, total, free = "host memory", int(psutil.virtual_memory().total), free_bytes(target)
    notes = {beyond_limit(model, tokens, getattr(skeleton.config, "max_position_embeddings", 0))}
    needs = []
    for rung in ladder:
        if target.type == "cuda":
            need, note = _gpu_need(model, rung, tokens, _known_card(name))
            notes.add(note)
        else:
            need = _cpu_need(skeleton, rung, tokens)
        needs.append(need)
        if need.total_bytes <= free:
            break
    asked = needs[-1] if precision == "auto" else needs[0]
    fitting = needs[-1] if needs[-1].total_bytes <= free else None
    return Fit(model, tokens, name, free, total, asked, fitting, " ".join(sorted(notes - {""})))


def _known_card(name: str) -> Card | None:
    try:
        return find_card(name)
    except CardError:
        return None


def _below(precision: str, other: str) -> bool:
    """Whether a precision takes fewer bits than another (bf16 and fp16 take as many)."""
    bits = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4}
    return bits[precision] < bits[other]


def _gpu_need(model: str, precision: str, tokens: int, card: Card | None) -> tuple[Need, str]:
    """The forecast at its busiest step, with the architecture and the CUDA context of the card where it is known."""
    forecast = Forecast.of(model, precision=precision, tokens=tokens, architecture=card.architecture if card else "")
    context_mib, source = cuda_context(card)
    table = forecast.curve.table
    busiest = table[table["used_mib"] == table["used_mib"].max()].iloc[-1]  # the longest context of the highest level
    uses = {
        "weights": busiest[list(WEIGHT_COLUMNS)].sum(),
        "quantisation state": busiest["quantisation_state_mib"],
        "KV payload": busiest["kv_payload_mib"],
        "in flight and inactive": busiest[list(_BESIDE)].sum(),
        "CUDA context": context_mib,
    }
    is_assumed = card is None or card.cuda_context_mib is None
    need = Need(precision, {use: round(n_mib * MIB) for use, n_mib in uses.items()})
    return need, f"CUDA context: {source}." if is_assumed else ""


def _cpu_need(skeleton: Any, precision: str, tokens: int) -> Need:
    """What load_model asks for, and keys and values in the dtype of the computation."""
    dtype = dtype_beside(skeleton.config, precision, torch.device("cpu"))
    weights = predict_bytes(skeleton, precision, dtype)
    state_bytes = weights.pop("quantisation state")
    return Need(
        precision,
        {
            "weights": sum(weights.values()),
            "quantisation state": state_bytes,
            "KV payload": kv_cache_bytes(skeleton.config, tokens=tokens, dtype_bytes=dtype.itemsize),
            "room to work": WORKING_BYTES,
        },
    )
