"""Times of tokens on a GPU: what each length costs, the floor under it, and what asking for the memory costs.

Two files of one stem, which lie beside the recordings: ``latency-NAME.csv`` has one row a length; ``latency-NAME.json``
has kind, label and provenance as a recording's, with the rates behind the floor and what gpustat itself costs. Columns:

    ==========================================  ======================================================================
    context_tokens                              length: cached before a decode step, or of a prompt for its first token
    token_ms, p10_ms, p90_ms                    a decode step: median and percentiles
    tokens                                      decode steps that were timed
    sm_clock_mhz                                the GPU's clock after them
    first_token_ms, first_token_p10_ms, …       a prefill and the choice of its token
    prefills                                    prefills that were timed
    floor_ms, memory_ms, compute_ms, limited_by,
    weight_bytes, kv_read_bytes,
    kv_written_bytes, operations                ``roofline`` at the rates that were measured in the same process
    ==========================================  ======================================================================
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from glmlab.core.curve import curve_json, read_curve_json
from glmlab.core.files import write_atomically
from glmlab.evidence.plan import LATENCY_PREFIX, EvidenceError
from glmlab.latency.measure import measure_decode, measure_first_token
from glmlab.latency.polling import measure_polling
from glmlab.latency.roofline import measure_rates, roofline
from glmlab.memory.probes import MemoryProbe
from glmlab.memory.provenance import run_provenance
from glmlab.models.loading import LoadedModel

COLUMNS = ("context_tokens", "token_ms", "p10_ms", "p90_ms", "first_token_ms", "floor_ms")
"""Columns that every table has; the others may be missing or empty."""


@dataclass(frozen=True)
class TimedTokens:
    """What one run measured."""

    label: str
    table: pd.DataFrame
    """See the top of this module."""
    provenance: Mapping[str, Any]

    @property
    def polling(self) -> pd.DataFrame:
        """What gpustat itself costs, as ``measure_polling`` gave it in that run."""
        return pd.DataFrame(self.provenance["polling"])


def time_tokens(loaded: LoadedModel, lengths: Sequence[int], path: Path, notes: Mapping[str, Any]) -> Path:
    """Time decode steps and first tokens at several lengths, the device's rates, and gpustat; write the two files.

    Args:
        loaded: from ``load_model``, compiled or not.
        lengths: tokens before a decode step, and of the prompts.
        path: the .csv; the .json beside it is written first.
        notes: further provenance.

    Raises:
        EvidenceError: the model was to be compiled and is not, or no longer.
        LatencyError: a length that the model does not have; the device failed.
    """
    _refuse_failed_compilation(loaded)
    decode = measure_decode(loaded, lengths)
    _refuse_failed_compilation(loaded)  # a later length can fail where the first ones did not
    first = measure_first_token(loaded, lengths).rename(
        columns={
            "prompt_tokens": "context_tokens",
            "p10_ms": "first_token_p10_ms",
            "p90_ms": "first_token_p90_ms",
            "tokens": "prefills",
            "sm_clock_mhz": "first_token_sm_clock_mhz",
        }
    )
    rates = measure_rates(loaded.model.device)
    floor = roofline(
        loaded.model.config,
        rates,
        precision=loaded.report.precision,
        contexts=lengths,
        dtype=loaded.model.dtype,
    )
    table = decode.merge(first, on="context_tokens").merge(floor, on="context_tokens")
    provenance = {
        **run_provenance(loaded.report, MemoryProbe.for_model(loaded.model)),
        "clocks_before": decode.attrs["conditions"]["gpus"],
        "compilation_s": None if loaded.report.compilation is None else round(loaded.report.compilation.seconds, 3),
        "rates": asdict(rates),
        "polling": measure_polling().to_dict("records"),
        **notes,
    }
    where = ", ".join(gpu["name"] for gpu in provenance["gpus"]) or "CPU"
    how = "compiled" if provenance["compiled"] else "eager"
    label = f"{provenance['model']}, {provenance['precision']}, {how}, {where}"
    write_atomically(path.with_suffix(".json"), curve_json("measured", label, provenance))
    write_atomically(path, table.to_csv(index=False, lineterminator="\n"))
    return path


def _refuse_failed_compilation(loaded: LoadedModel) -> None:
    compilation = loaded.report.compilation
    if compilation is not None and compilation.failure is not None:
        raise EvidenceError(
            f"{loaded.report.name} in {loaded.report.precision} cannot be compiled here ({compilation.failure}), and "
            "eager steps are no evidence of compiled ones. Install what it lacks, or leave this run out."
        )


def read_timed_tokens(path: Path) -> TimedTokens:
    """Read what :func:`time_tokens` wrote, from its .csv.

    Raises:
        CurveError: the .json beside it is missing or something else.
        EvidenceError: the .csv is missing, lacks a column or has no numbers in one; the .json lacks gpustat's cost.
    """
    header = read_curve_json(path.with_suffix(".json"))
    try:
        table = pd.read_csv(path)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise EvidenceError(f"{path} is no table of timed tokens ({error}). Time them again.") from error
    for name in COLUMNS:
        if name not in table:
            raise EvidenceError(f"{path} lacks the column {name!r}. Time the tokens again.")
        if not is_numeric_dtype(table[name]) or not np.isfinite(table[name]).all():
            raise EvidenceError(f"{path}: the column {name!r} is not all numbers. Time the tokens again.")
    polling = header["provenance"].get("polling")
    if not isinstance(polling, list) or not all(isinstance(way, dict) for way in polling):
        raise EvidenceError(f"{path.with_suffix('.json')} lacks what gpustat costs ('polling'). Time the tokens again.")
    return TimedTokens(header["label"], table, header["provenance"])


def timed_tokens(data: Path) -> list[TimedTokens]:
    """Everything that was timed on GPUs and is kept in ``data/recordings``.

    Example:
        >>> from tempfile import gettempdir
        >>> timed_tokens(Path(gettempdir()) / "no such folder")
        []
    """
    return [read_timed_tokens(path) for path in sorted((data / "recordings").glob(f"{LATENCY_PREFIX}*.csv"))]
