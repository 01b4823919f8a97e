"""Forecast over measurement: recordings of this suite, and the log that the chapter's script wrote.

A recording says what ran (model, precision, attention, turns in tokens), so its forecast has one unknown at most: the
CUDA context, where only the whole GPU's figure was read. The chapter's log has lines ``characters, MiB`` and two
unknowns: the tokens a character, and the context. Nothing else is fitted, and what was fitted is said.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from glmlab.core.cards import CardError, find_card
from glmlab.core.curve import Curve, read_curve
from glmlab.core.errors import GlmlabError
from glmlab.forecast.forecast import forecast, run_workload
from glmlab.forecast.workload import Workload
from glmlab.tracing.trace import Turn

CHAPTER_TRACE = "chatglm3-6b-original-int4"
"""What the chapter ran; the workload of its log where no other is given."""

TOKENS_PER_CHARACTER = (0.3, 1.5, 0.005)
"""Lowest, highest and step of the ratios tried: Chinese text has 0.5 to 0.8 tokens a character, English 0.2 to 0.4."""

_ARCHITECTURES = {
    "7.0": "volta", "7.5": "turing", "8": "ampere", "8.9": "ada", "9": "hopper", "10": "blackwell", "12": "blackwell",
}  # fmt: skip
"""Architecture by CUDA's compute capability, whole or its first number."""

_LINE = re.compile(r"\s*(\d{1,15})\s*,\s*(\d{1,15}(?:\.\d+)?)\s*")


class ComparisonError(GlmlabError):
    """A recording or log that cannot be laid under a forecast: says which line or field and why."""


@dataclass(frozen=True)
class Comparison:
    """One measured curve and its forecast, row by row of the measurement.

    ``table``: turn, context_tokens, measured_mib, forecast_mib, difference_mib (measured - forecast).
    ``fitted``: the unknowns that were fitted, and nothing else.
    """

    measured: Curve
    forecast: Curve
    quantity: str  # column that is compared
    fitted: dict[str, float]
    table: pd.DataFrame

    @property
    def max_error_mib(self) -> float:
        """Largest difference, without sign."""
        return float(self.table["difference_mib"].abs().max())

    @property
    def mean_error_mib(self) -> float:
        """Mean difference, without signs."""
        return float(self.table["difference_mib"].abs().mean())

    def __str__(self) -> str:
        fitted = ", ".join(f"{name} = {value:.4g}" for name, value in self.fitted.items()) or "nothing"
        rise = (
            self.table[["measured_mib", "forecast_mib"]].iloc[-1] - self.table[["measured_mib", "forecast_mib"]].iloc[0]
        )
        return (
            f"{self.measured.label}: {self.quantity} of {len(self.table)} rows, forecast {self.forecast.label}; "
            "fitted: "
            f"{fitted}; largest difference {self.max_error_mib:.2f} MiB, mean {self.mean_error_mib:.2f} MiB; first "
            "to last row "
            f"{rise['measured_mib']:+.1f} MiB measured, {rise['forecast_mib']:+.1f} MiB forecast"
        )


def compare(
    recordings: Sequence[str | os.PathLike[str] | Curve] = (),
    *,
    log: str | os.PathLike[str] | None = None,
    workload: Workload | None = None,
) -> list[Comparison]:
    """Lay a forecast over every recording, and over a log of the chapter's format.

    Args:
        recordings: CSV files of recordings, or their curves.
        log: file of lines ``characters, MiB``.
        workload: what ran, where the recording does not say, and for the log (default: the chapter's own code, one
        turn).

    Raises:
        ComparisonError: neither recordings nor a log; a recording without GPU memory or without turns; a broken line.

    Example:
        >>> compare([])
        Traceback (most recent call last):
        ...
        glmlab.forecast.comparison.ComparisonError: nothing to compare: give recordings (.csv) or a log ...
    """
    if not recordings and log is None:
        raise ComparisonError("nothing to compare: give recordings (.csv) or a log (characters, MiB).")
    curves = [item if isinstance(item, Curve) else read_curve(item) for item in recordings]
    compared = [compare_recording(curve, workload) for curve in curves]
    if log is not None:
        compared.append(compare_log(read_log(log), workload))
    return compared


def read_log(path: str | os.PathLike[str]) -> Curve:
    """Read the chapter's log, a line ``characters, MiB`` for every answer that grew, as a curve of kind "reported".

    Raises:
        ComparisonError: the file is missing or no text, a line is not of that form (its number is named), or there are
            fewer than three lines.
    """
    source = Path(path)
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ComparisonError(f"{source} cannot be read as UTF-8 text ({error}).") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ComparisonError(
                f"{source}, line {number}: {line[:60]!r} is not 'characters, MiB', such as '1520, 4740'. Mend or "
                "remove the line."
            )
        rows.append((int(match.group(1)), float(match.group(2))))
    if len(rows) < 3:
        raise ComparisonError(f"{source} has {len(rows)} lines; a curve with two unknowns needs at least 3.")
    characters, used = zip(*rows, strict=True)
    table = pd.DataFrame(
        {"step": range(1, len(rows) + 1), "turn": 1, "context_characters": characters, "used_mib": used}
    )
    return Curve(table, {"file": source.name}, kind="reported", label=source.stem)


def compare_log(log: Curve, workload: Workload | None = None) -> Comparison:
    """Fit tokens per character and CUDA context of a log, and compare."""
    characters = log.table["context_characters"].to_numpy(float)
    measured = log.table["used_mib"].to_numpy(float)
    lowest, highest, step = TOKENS_PER_CHARACTER
    if workload is None:
        workload = _one_turn(Workload.recorded(CHAPTER_TRACE), int(np.ceil(highest * characters.max())))
    curve = forecast(workload, seeds=())
    context, reserved = curve.table["context_tokens"].to_numpy(float), curve.table["reserved_mib"].to_numpy(float)
    best: tuple[float, float, float, npt.NDArray[np.float64]] | None = None
    for ratio in np.arange(lowest, highest + step / 2, step):
        tokens = characters * ratio
        if tokens.max() > context[-1]:
            break
        predicted = reserved[np.searchsorted(context, tokens)]
        context_mib = float(np.median(measured - predicted))
        error = float(np.abs(measured - predicted - context_mib).mean())
        if best is None or error < best[0] - 1e-9:
            best = (error, float(ratio), context_mib, predicted + context_mib)
    if best is None:
        raise ComparisonError(
            f"the log reaches {characters.max():.0f} characters, but the forecast's turns end at {context[-1]:.0f} "
            "tokens, fewer "
            f"than {lowest:g} a character. Give longer turns."
        )
    _, ratio, context_mib, predicted = best
    table = pd.DataFrame(
        {
            "turn": log.table["turn"],
            "context_tokens": np.rint(characters * ratio),
            "measured_mib": measured,
            "forecast_mib": predicted,
            "difference_mib": measured - predicted,
        }
    )
    fitted = {"tokens_per_character": ratio, "cuda_context_mib": context_mib}
    return Comparison(log, curve, "used_mib", fitted, table)


def compare_recording(recording: Curve, workload: Workload | None = None) -> Comparison:
    """Forecast what a recording says that it ran, and compare; reserved memory where it was read, else used memory."""
    quantity = next((name for name in ("reserved_mib", "used_mib") if name in recording.memory_columns), None)
    if quantity is None:
        raise ComparisonError(
            f"{recording.label}: no GPU memory was recorded (columns {', '.join(recording.memory_columns)}). Record "
            "on a GPU."
        )
    curve = forecast(workload or workload_of(recording), seeds=())
    keys = ["turn", "context_tokens"]
    wanted = recording.table[recording.table[quantity].notna()]
    if "gpu" in wanted:
        wanted = wanted[wanted["gpu"].isna() | (wanted["gpu"] == wanted["gpu"].min())]
    forecast_rows = curve.table.drop_duplicates(keys, keep="last")[[*keys, "reserved_mib"]]
    joined = wanted[[*keys, quantity]].merge(
        forecast_rows.rename(columns={"reserved_mib": "forecast_mib"}), on=keys, how="inner"
    )
    if joined.empty:
        raise ComparisonError(
            f"{recording.label}: no row of the recording has a turn and context length of the forecast. Were its "
            "turns given?"
        )
    fitted = {}
    if quantity == "used_mib":
        fitted["cuda_context_mib"] = float((joined[quantity] - joined["forecast_mib"]).median())
        joined["forecast_mib"] += fitted["cuda_context_mib"]
    joined = joined.rename(columns={quantity: "measured_mib"})
    joined["difference_mib"] = joined["measured_mib"] - joined["forecast_mib"]
    columns = [*keys, "measured_mib", "forecast_mib", "difference_mib"]
    return Comparison(recording, curve, quantity, fitted, joined[columns])


def workload_of(recording: Curve) -> Workload:
    """Workload of a recording: model, precision and attention from its provenance, turns from its rows.

    Raises:
        ComparisonError: the provenance or the rows do not say it.
    """
    notes, table = recording.provenance, recording.table
    missing = [name for name in ("model", "precision", "attention") if not notes.get(name)]
    missing += [name for name in ("prompt_tokens", "generated_tokens") if name not in table]
    if missing:
        raise ComparisonError(
            f"{recording.label}: the recording does not say its {', '.join(missing)}. Record it again, or give the "
            "workload."
        )
    spoken = table[table["turn"] > 0]
    last = spoken.groupby("turn")[["prompt_tokens", "generated_tokens"]].max()
    turns = [Turn(int(prompt), int(generated)) for prompt, generated in last.itertuples(index=False) if generated > 0]
    if not turns:
        raise ComparisonError(f"{recording.label}: the recording has no turn yet.")
    return workload_of_notes(recording.label, notes, turns)


def workload_of_notes(label: str, notes: Mapping[str, Any], turns: Sequence[tuple[int, int]]) -> Workload:
    """Workload of a measured run, from its provenance and its turns in tokens.

    Raises:
        ComparisonError: a field of the provenance has the wrong type, or decode steps were compiled.
    """
    if notes.get("compiled"):
        raise ComparisonError(
            f"{label}: decode steps were compiled, and a compiled model allocates in ways that are not forecast. "
            "Record it without compile=True, or give the workload."
        )
    gpus = notes.get("gpus") or []
    if not isinstance(gpus, list) or not all(isinstance(gpu, dict | str) for gpu in gpus):
        raise ComparisonError(
            f"{label}: the recording's gpus are {gpus!r}, not a list of names. Mend its .json, or give the workload."
        )
    static_tokens = notes.get("static_tokens", 0)
    if not isinstance(static_tokens, int):
        raise ComparisonError(f"{label}: static_tokens is {static_tokens!r}, not a number of tokens. Mend its .json.")
    workload = Workload.of(
        str(notes["model"]),
        turns=turns,
        precision=str(notes["precision"]),
        attention=str(notes["attention"]),
        weights=str(notes.get("weights", "checkpoint")),
        cache=str(notes.get("cache", "dynamic")),
        static_tokens=static_tokens,
    )
    architecture = _architecture(gpus, str(notes.get("compute_capability", "")))
    return replace(workload, architecture=architecture) if architecture else workload


def _architecture(gpus: Sequence[Any], compute_capability: str) -> str:
    """Architecture of the first known card, else of the compute capability; "" where neither is known."""
    for gpu in gpus:
        try:
            return find_card(str(gpu.get("name") if isinstance(gpu, dict) else gpu)).architecture
        except CardError:
            continue
    return _ARCHITECTURES.get(compute_capability, _ARCHITECTURES.get(compute_capability.partition(".")[0], ""))


def _one_turn(workload: Workload, tokens: int) -> Workload:
    """One turn that reaches ``tokens``, or the model's limit."""
    limit = run_workload(workload).trace.facts.context_limit or tokens
    return workload.with_tokens(max(1, min(tokens, limit)))
