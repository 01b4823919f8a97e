"""How far forecasts are off: one table over all recordings, misses included, and what a recording tells of its card.

A forecast holds for a recording where every point of the reserved memory is within 1 % or 32 MiB, whichever is more,
and memory grows by the same amount per 1,000 tokens within 5 %.
"""

import csv
import os
from collections.abc import Sequence
from io import StringIO
from typing import Any

import pandas as pd

from glmlab.core.cards import CardError, find_card
from glmlab.core.curve import Curve, read_curve
from glmlab.forecast.comparison import Comparison, ComparisonError, compare_recording, workload_of

POINT_SHARE = 0.01
POINT_MIB = 32.0
GROWTH_SHARE = 0.05
"""What "holds" means: each point within the larger of the first two, growth within the third."""

_SETTINGS = ("model", "precision", "attention", "cache")


def error_table(recordings: Sequence[str | os.PathLike[str] | Curve | Comparison]) -> pd.DataFrame:
    """One row a recording: settings, the largest difference, points outside, growth measured and forecast, ``holds``.

    Args:
        recordings: CSV files, curves, or comparisons that are made already.

    Returns:
        Columns: recording, gpu, model, precision, attention, cache, points, max_error_mib, max_error_share,
        points_outside, growth_measured_mib and growth_forecast_mib (per 1,000 tokens, from the first to the last row
        after loading), growth_error_share, holds.

    Raises:
        ComparisonError: a recording without GPU memory, without turns, or of fewer than two context lengths.
    """
    rows = [row_of(item if isinstance(item, Comparison) else compare_recording(_curve(item))) for item in recordings]
    return pd.DataFrame(rows)


def row_of(compared: Comparison) -> dict[str, Any]:
    """One row of :func:`error_table`."""
    notes, table = compared.measured.provenance, compared.table
    error = table["difference_mib"].abs()
    allowed = (POINT_SHARE * table["measured_mib"].abs()).clip(lower=POINT_MIB)
    outside = int((error > allowed).sum())
    measured, foretold = (_growth_mib(compared, name) for name in ("measured_mib", "forecast_mib"))
    if measured == foretold:
        growth_error = 0.0
    else:
        growth_error = abs(foretold - measured) / abs(measured) if measured else float("inf")
    gpus = notes.get("gpus") or [""]
    return {
        "recording": compared.measured.label,
        "gpu": str(gpus[0].get("name", "") if isinstance(gpus[0], dict) else gpus[0]),
        **{name: str(notes.get(name, "")) for name in _SETTINGS},
        "points": len(table),
        "max_error_mib": float(error.max()),
        "max_error_share": float((error / table["measured_mib"].abs()).max()),
        "points_outside": outside,
        "growth_measured_mib": measured,
        "growth_forecast_mib": foretold,
        "growth_error_share": growth_error,
        "holds": outside == 0 and growth_error <= GROWTH_SHARE,
    }


def _growth_mib(compared: Comparison, column: str) -> float:
    """MiB per 1,000 tokens, from the first to the last row after loading."""
    chat = compared.table[compared.table["turn"] > 0]
    tokens = chat["context_tokens"].iloc[-1] - chat["context_tokens"].iloc[0] if len(chat) else 0
    if tokens <= 0:
        raise ComparisonError(
            f"{compared.measured.label}: the rows that were compared have one context length, so nothing grows. Record "
            "more turns, or every token."
        )
    return float((chat[column].iloc[-1] - chat[column].iloc[0]) * 1000 / tokens)


def card_line(recording: str | os.PathLike[str] | Curve) -> str:
    """A line for ``data/gpus.csv``: the card of a recording with the CUDA context that it shows.

    The context is what is used beyond the allocator's reserve right after loading, other processes left out: by the
    driver's figure for this process where it tells one, else by the whole GPU's.

    Raises:
        ComparisonError: no GPU, no first row, or a GPU whose architecture nobody knows.
    """
    curve = _curve(recording)
    notes, table = curve.provenance, curve.table
    gpus = notes.get("gpus")
    first = table[table["step"] == 0]
    if not isinstance(gpus, list) or not gpus or not isinstance(gpus[0], dict) or first.empty:
        raise ComparisonError(f"{curve.label}: the recording has no GPU, or no row of its state after loading.")
    if not {"used_mib", "reserved_mib"} <= set(curve.memory_columns):
        raise ComparisonError(f"{curve.label}: used and reserved memory were not both read.")
    row = first.iloc[0].to_dict()
    own, others = row.get("process_mib"), row.get("others_mib")
    if pd.notna(own):
        context_mib, how = own - row["reserved_mib"], "this process's memory"
    else:
        context_mib = row["used_mib"] - (others if pd.notna(others) else 0.0) - row["reserved_mib"]
        how = "the GPU's memory"
    name, total_mib = str(gpus[0].get("name")), gpus[0].get("total_mib")
    try:
        card = find_card(name)
        name = card.name
        rates = ["" if rate is None else f"{rate:.0f}" for rate in (card.bandwidth_bytes_per_s, card.fp16_flops_per_s)]
    except CardError:
        rates = ["", ""]
    architecture = workload_of(curve).architecture
    if not architecture:
        raise ComparisonError(f"{curve.label}: the architecture of {name} is not known.")
    source = (
        f"recording of {notes.get('model')} in {notes.get('precision')}, {notes.get('date')}, driver "
        f"{notes.get('driver')}: {how} less the reserved memory after loading"
    )
    line = StringIO()
    csv.writer(line, lineterminator="").writerow(
        [name, f"{total_mib:.0f}", architecture, f"{context_mib:.0f}", *rates, source]
    )
    return line.getvalue()


def _curve(recording: str | os.PathLike[str] | Curve) -> Curve:
    return recording if isinstance(recording, Curve) else read_curve(recording)
