"""How far forecasts are off: one table over all recordings, misses included.

A forecast holds for a recording where every point of the reserved memory is within 1 % or 32 MiB, whichever is more,
and memory grows by the same amount per 1,000 tokens within 5 %.
"""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from glmlab.evidence.plan import EvidenceError
from glmlab.forecast.comparison import Comparison, recorded_gpus

POINT_SHARE, POINT_MIB = 0.01, 32.0  # each point lies within the larger of the two
GROWTH_SHARE = 0.05


def error_table(compared: Iterable[Comparison]) -> pd.DataFrame:
    """One row a recording: settings, the largest difference, points outside, growth measured and forecast, ``holds``.

    Returns:
        Columns: recording, gpu, model, precision, attention, cache, points, max_error_mib, max_error_share,
        points_outside, growth_measured_mib and growth_forecast_mib (per 1,000 tokens, from the first to the last row
        after loading), growth_error_share, holds.

    Raises:
        EvidenceError: a recording of fewer than two context lengths.
    """
    return pd.DataFrame(map(_row, compared))


def _row(compared: Comparison) -> dict[str, Any]:
    label, notes, table = compared.measured.label, compared.measured.provenance, compared.table
    error = table["difference_mib"].abs()
    outside = int((error > (POINT_SHARE * table["measured_mib"].abs()).clip(lower=POINT_MIB)).sum())
    chat = table[table["turn"] > 0]
    grown = chat.iloc[-1] - chat.iloc[0] if len(chat) else {"context_tokens": 0}
    if grown["context_tokens"] <= 0:
        raise EvidenceError(
            f"{label}: the rows that were compared have one context length, so nothing grows. Record more turns, or "
            "every token."
        )
    measured, computed = (
        float(grown[name] * 1000 / grown["context_tokens"]) for name in ("measured_mib", "forecast_mib")
    )
    growth_error = abs(computed - measured) / abs(measured) if measured else float("inf") if computed else 0.0
    return {
        "recording": label,
        "gpu": next(iter(recorded_gpus(label, notes)), ""),
        **{name: str(notes.get(name, "")) for name in ("model", "precision", "attention", "cache")},
        "points": len(table),
        "max_error_mib": float(error.max()),
        "max_error_share": float((error / table["measured_mib"].abs()).max()),
        "points_outside": outside,
        "growth_measured_mib": measured,
        "growth_forecast_mib": computed,
        "growth_error_share": growth_error,
        "holds": outside == 0 and growth_error <= GROWTH_SHARE,
    }
