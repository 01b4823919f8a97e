"""Forecast over measurement: recordings of this suite, and the log that the chapter's script wrote.

A recording says what ran (model, precision, attention, turns in tokens). Its forecast has at most one unknown: the CUDA
context, where only the whole GPU's figure was read. The chapter's log has lines ``characters, MiB`` and two: the
tokens per character, and the context. Nothing else is fitted, and what was fitted is printed.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from glmlab.core.cards import CardError, find_card
from glmlab.core.curve import Curve, read_curve
from glmlab.forecast.forecast import Forecast
from glmlab.forecast.workload import ForecastError

CHAPTER_TRACE = "chatglm3-6b-original-int4"
"""What the chapter ran, and so what its log is compared with."""

TOKENS_PER_CHARACTER = np.arange(0.3, 1.5025, 0.005)
"""Ratios tried for a log: Chinese text has 0.5 to 0.8 tokens a character, English 0.2 to 0.4."""

_ARCHITECTURES = {
    "7.0": "volta", "7.5": "turing", "8": "ampere", "8.9": "ada", "9": "hopper", "10": "blackwell", "12": "blackwell",
}  # fmt: skip
"""Architecture by CUDA's compute capability, whole or its first number."""

_LINE = re.compile(r"\s*(\d{1,15})\s*,\s*(\d{1,15}(?:\.\d+)?)\s*")


@dataclass(frozen=True)
class Comparison:
    """One measured curve and its forecast, row by row of the measurement."""

    measured: Curve
    forecast: Forecast
    quantity: str  # column that is compared
    fitted: dict[str, float]  # the unknowns that were fitted, and nothing else
    table: pd.DataFrame  # turn, context_tokens, measured_mib, forecast_mib, difference_mib (measured - forecast)

    @property
    def max_error_mib(self) -> float:
        """Largest difference, without sign."""
        return float(self.table["difference_mib"].abs().max())

    def __str__(self) -> str:
        fitted = ", ".join(f"{name} = {value:.4g}" for name, value in self.fitted.items()) or "nothing"
        rise = self.table.iloc[-1] - self.table.iloc[0]
        return (
            f"{self.measured.label}: {self.quantity} of {len(self.table)} rows, forecast {self.forecast.label}; "
            f"fitted: {fitted}; largest difference {self.max_error_mib:.2f} MiB, "
            f"mean {self.table['difference_mib'].abs().mean():.2f} MiB; first to last row "
            f"{rise['measured_mib']:+.1f} MiB measured, {rise['forecast_mib']:+.1f} MiB forecast"
        )


def compare(
    recordings: Sequence[str | os.PathLike[str] | Curve] = (), *, log: str | os.PathLike[str] | None = None
) -> list[Comparison]:
    """Lay a forecast over every recording, and over a log of the chapter's format.

    Args:
        recordings: CSV files of recordings, or their curves.
        log: file of lines ``characters, MiB``.

    Raises:
        ForecastError: neither recordings nor a log; a recording without GPU memory or without turns; a broken line.

    Example:
        >>> compare([])
        Traceback (most recent call last):
        ...
        glmlab.forecast.workload.ForecastError: nothing to compare: give recordings (.csv) or a log ...
    """
    if not recordings and log is None:
        raise ForecastError("nothing to compare: give recordings (.csv) or a log (characters, MiB).")
    curves = [item if isinstance(item, Curve) else read_curve(item) for item in recordings]
    compared = [compare_recording(curve) for curve in curves]
    return compared if log is None else [*compared, compare_log(read_log(log))]


def read_log(path: str | os.PathLike[str]) -> Curve:
    """Read the chapter's log, a line ``characters, MiB`` for every answer that grew, as a curve of kind "reported".

    Raises:
        ForecastError: the file is missing or no text, a line is not of that form (its number is named), or there are
            fewer than three lines.
    """
    source = Path(path)
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ForecastError(f"{source} cannot be read as UTF-8 text ({error}).") from error
    rows: list[tuple[int, int, int, float]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ForecastError(
                f"{source}, line {number}: {line[:60]!r} is not 'characters, MiB', such as '1520, 4740'. Correct or "
                "remove the line."
            )
        rows.append((len(rows) + 1, 1, int(match.group(1)), float(match.group(2))))
    if len(rows) < 3:
        raise ForecastError(f"{source} has {len(rows)} lines; a curve with two unknowns needs at least 3.")
    table = pd.DataFrame(rows, columns=["step", "turn", "context_characters", "used_mib"])
    return Curve(table, {"file": source.name}, kind="reported", label=source.stem)


def compare_log(log: Curve) -> Comparison:
    """Compare a log with one turn of the chapter's code; the tokens a character and the CUDA context are fitted.

    Raises:
        ForecastError: more characters than the chapter's code can reach in tokens.
    """
    characters = log.table["context_characters"].to_numpy(float)
    measured = log.table["used_mib"].to_numpy(float)
    forecast = Forecast.of(trace=CHAPTER_TRACE)
    longest = min(int(TOKENS_PER_CHARACTER[-1] * characters.max()) + 1, forecast.trace.facts.context_limit)
    forecast = forecast.replace(tokens=longest)
    context, reserved = (forecast.curve.table[name].to_numpy(float) for name in ("context_tokens", "reserved_mib"))
    ratios = TOKENS_PER_CHARACTER[characters.max() * TOKENS_PER_CHARACTER <= context[-1]]
    if not len(ratios):
        raise ForecastError(
            f"the log reaches {characters.max():.0f} characters, but the forecast ends at {context[-1]:.0f} tokens, "
            f"fewer than {TOKENS_PER_CHARACTER[0]:g} a character."
        )
    at_lines = reserved[np.searchsorted(context, np.outer(ratios, characters))]  # (ratios, lines)
    context_mib = np.median(measured - at_lines, axis=1)
    differences = measured - at_lines - context_mib[:, np.newaxis]
    best = int(np.abs(differences).mean(axis=1).argmin())
    table = pd.DataFrame(
        {
            "turn": log.table["turn"],
            "context_tokens": np.rint(characters * ratios[best]),
            "measured_mib": measured,
            "forecast_mib": measured - differences[best],
            "difference_mib": differences[best],
        }
    )
    fitted = {"tokens_per_character": float(ratios[best]), "cuda_context_mib": float(context_mib[best])}
    return Comparison(log, forecast, "used_mib", fitted, table)


def compare_recording(recording: Curve, forecast: Forecast | None = None) -> Comparison:
    """Forecast what a recording says that it ran, and compare; reserved memory where it was read, else used memory.

    Args:
        recording: measured on a GPU.
        forecast: of what ran, where the recording does not say.

    Raises:
        ForecastError: no GPU memory was recorded, or no row has a turn and length of the forecast.
    """
    quantity = next((name for name in ("reserved_mib", "used_mib") if name in recording.memory_columns), None)
    if quantity is None:
        raise ForecastError(
            f"{recording.label}: no GPU memory was recorded (columns {', '.join(recording.memory_columns)}). Record "
            "on a GPU."
        )
    forecast = forecast or forecast_of(recording)
    keys = ["turn", "context_tokens"]
    wanted = recording.table[recording.table[quantity].notna()]
    if "gpu" in wanted:
        wanted = wanted[wanted["gpu"].isna() | (wanted["gpu"] == wanted["gpu"].min())]
    computed = forecast.curve.table.drop_duplicates(keys, keep="last")[[*keys, "reserved_mib"]]
    joined = wanted[keys].assign(measured_mib=wanted[quantity]).merge(computed, on=keys)
    joined = joined.rename(columns={"reserved_mib": "forecast_mib"})
    if joined.empty:
        raise ForecastError(
            f"{recording.label}: no row of the recording has a turn and context length of the forecast. Were its "
            "turns given?"
        )
    fitted = {}
    if quantity == "used_mib":
        fitted["cuda_context_mib"] = float((joined["measured_mib"] - joined["forecast_mib"]).median())
        joined["forecast_mib"] += fitted["cuda_context_mib"]
    joined["difference_mib"] = joined["measured_mib"] - joined["forecast_mib"]
    return Comparison(recording, forecast, quantity, fitted, joined)


def forecast_of(recording: Curve) -> Forecast:
    """Forecast of a recording: model, precision and attention from its provenance, turns from its rows.

    Raises:
        ForecastError: the provenance or the rows do not say it.
    """
    notes, table = recording.provenance, recording.table
    missing = [name for name in ("model", "precision", "attention") if not notes.get(name)]
    missing += [name for name in ("prompt_tokens", "generated_tokens") if name not in table]
    if missing:
        raise ForecastError(f"{recording.label}: the recording does not say its {', '.join(missing)}. Record it again.")
    last = table[table["turn"] > 0].groupby("turn")[["prompt_tokens", "generated_tokens"]].max()
    turns = [(int(prompt), int(generated)) for prompt, generated in last.itertuples(index=False) if generated > 0]
    if not turns:
        raise ForecastError(f"{recording.label}: the recording has no turn yet.")
    return forecast_of_notes(recording.label, notes, turns)


def forecast_of_notes(label: str, notes: Mapping[str, Any], turns: Sequence[tuple[int, int]]) -> Forecast:
    """Forecast of a measured run, from its provenance and its turns in tokens.

    Raises:
        ForecastError: a field of the provenance has the wrong type, or decode steps were compiled.
    """
    if notes.get("compiled"):
        raise ForecastError(
            f"{label}: decode steps were compiled, and a compiled model allocates in ways that are not forecast. "
            "Record it without compile=True."
        )
    static_tokens = notes.get("static_tokens", 0)
    if not isinstance(static_tokens, int):
        raise ForecastError(f"{label}: static_tokens is {static_tokens!r}, not a number of tokens. Correct its .json.")
    return Forecast.of(
        str(notes["model"]),
        turns=turns,
        precision=str(notes["precision"]),
        attention=str(notes["attention"]),
        weights=str(notes.get("weights", "checkpoint")),
        cache=str(notes.get("cache", "dynamic")),
        static_tokens=static_tokens,
        architecture=_architecture(recorded_gpus(label, notes), str(notes.get("compute_capability", ""))),
    )


def recorded_gpus(label: str, notes: Mapping[str, Any]) -> list[str]:
    """Names of the GPUs of a recording; :class:`ForecastError` where the provenance holds something else."""
    gpus = notes.get("gpus") or []
    if not isinstance(gpus, list) or not all(isinstance(gpu, dict | str) for gpu in gpus):
        raise ForecastError(f"{label}: the recording's gpus are {gpus!r}, not a list of names. Correct its .json.")
    return [str(gpu.get("name", "") if isinstance(gpu, dict) else gpu) for gpu in gpus]


def _architecture(gpus: Sequence[str], compute_capability: str) -> str:
    """Architecture of the first known card, else of the compute capability; "" where neither is known."""
    for gpu in gpus:
        try:
            return find_card(gpu).architecture
        except CardError:
            continue
    return _ARCHITECTURES.get(compute_capability, _ARCHITECTURES.get(compute_capability.partition(".")[0], ""))
