"""A Curve: memory against context, one row per decode step or turn, with its provenance.

A recording (measured), a forecast (computed) and figures that others reported are this same table, so that one can be
laid over the other. On disk a Curve is ``NAME.csv`` (the table) and ``NAME.json`` (kind, label and provenance).

Every table has ``step`` and ``turn``, at least one column of context (``context_tokens``, ``context_characters``) and
at least one column of memory (any name that ends in ``_mib``; a forecast's are in :data:`COMPONENTS`). What was not
measured is an empty cell, never 0. A recording on several GPUs has one row per step and ``gpu``.

    ======================  ==========================================================================================
    step                    forward passes since the chat began; 0 is the state after loading
    turn                    number of the turn, from 1; 0 is the state after loading
    gpu                     index of the GPU as the driver counts (nvidia-smi, gpustat); empty without a GPU
    context_tokens          tokens whose keys and values are cached
    context_characters      characters of all user texts and answers so far
    prompt_tokens           tokens fed at the start of this turn
    generated_tokens        tokens generated in this turn
    used_mib                what gpustat shows for the GPU
    process_mib             this process's part of it, where the driver says
    others_mib              other processes' part of it, where the driver says
    reserved_mib            what the allocator took from the driver
    allocated_mib           live tensors
    peak_allocated_mib      highest allocated_mib since the row before
    peak_reserved_mib       highest reserved_mib since the row before
    rss_mib                 resident memory of the process (host memory)
    kv_mib                  keys and values in the cache (payload); a static cache's are there in full length
    first_token_s           seconds from the question to the first token
    token_s                 mean seconds of each later token of the turn
    elapsed_s               seconds since the recording began
    ======================  ==========================================================================================
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import StringIO
from math import inf
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from glmlab.core.errors import GlmlabError
from glmlab.core.files import write_atomically

Kind = Literal["measured", "forecast", "reported"]

SIDE_FILES = (".json", ".transcript.jsonl")
"""Suffixes of the files beside a recording's CSV (``memory/recording.py`` says what they hold)."""

COMPONENTS = {
    "weights_attention_mib": "weights, attention",
    "weights_mlp_mib": "weights, MLP",
    "weights_embedding_mib": "weights, embedding",
    "weights_head_mib": "weights, head",
    "weights_norms_mib": "weights, norms",
    "quantisation_state_mib": "quantisation state",
    "kv_payload_mib": "KV payload",
    "kv_copies_mib": "KV copies",
    "activations_mib": "activations, workspace",
    "inactive_small_mib": "inactive, small pool",
    "inactive_large_mib": "inactive, large pool",
    "cuda_context_mib": "CUDA context",
}
"""Columns of a forecast that add up to ``used_mib``, in the order in which they are stacked, with their labels."""

WEIGHT_COLUMNS = tuple(column for column in COMPONENTS if column.startswith("weights_"))
"""Columns of the weights, by component."""

_REQUIRED = ("step", "turn")
_CONTEXT = ("context_tokens", "context_characters")
_MOST_GPUS = 2**16


class CurveError(GlmlabError):
    """A file or table that is not a Curve: says which column, cell or file, and what to do."""


@dataclass(frozen=True)
class Curve:
    """Memory against context: a table (see the top of this module), its kind, a label and its provenance.

    Raises:
        CurveError: a required column is missing, a cell is not a number, or the kind is unknown.

    Example:
        >>> table = pd.DataFrame({"step": [0, 9], "turn": [0, 1], "context_tokens": [0, 17], "used_mib": [4700, 4702]})
        >>> curve = Curve(table, kind="measured", label="ChatGLM3-6B, int4")
        >>> curve.memory_columns
        ('used_mib',)
        >>> curve
        Curve('ChatGLM3-6B, int4', measured, 2 rows, used_mib)
    """

    table: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = "measured"
    label: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise CurveError(f"a curve's kind is one of {', '.join(get_args(Kind))}, not {self.kind!r}.")
        object.__setattr__(self, "table", _checked(self.table))

    @property
    def memory_columns(self) -> tuple[str, ...]:
        """Names of the columns that hold MiB, in the order of the table; empty ones are left out."""
        return tuple(
            name for name in self.table.columns if name.endswith("_mib") and bool(self.table[name].notna().any())
        )

    def save(self, path: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write ``path`` (``.csv``) and the ``.json`` beside it; each file appears whole or not at all.

        Returns:
            The two paths. Files that are already there are replaced.

        Raises:
            CurveError: the folder or one of the files cannot be written.
        """
        csv_path = csv_file(path)
        json_path = csv_path.with_suffix(".json")
        for file in (csv_path, json_path):  # before either is written
            if file.is_dir():
                raise CurveError(f"{file} is a folder. Name another file.")
        try:
            csv_path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(json_path, curve_json(self.kind, self.label, self.provenance))
            write_atomically(csv_path, self.table.to_csv(index=False, lineterminator="\n"))
        except OSError as error:
            raise CurveError(
                f"{csv_path} cannot be written ({error.strerror}). Name a file in another folder."
            ) from error
        return csv_path, json_path

    def __repr__(self) -> str:
        return f"Curve({self.label!r}, {self.kind}, {len(self.table)} rows, {' '.join(self.memory_columns)})"


def read_curve(path: str | os.PathLike[str]) -> Curve:
    """Read ``NAME.csv`` and ``NAME.json``; a recording that was killed reads up to its last whole row.

    Raises:
        CurveError: a file is missing or is not what :meth:`Curve.save` or a recording wrote.
    """
    csv_path = csv_file(path)
    header = read_curve_json(csv_path.with_suffix(".json"))
    try:
        text = csv_path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CurveError(f"{csv_path} is not there. Give the .csv file of a recording or a forecast.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CurveError(f"{csv_path} cannot be read as UTF-8 text ({error}). Record or compute it again.") from error
    if header["kind"] == "measured":  # a recording ends every row with a newline: what follows the last one is torn
        text = text[: text.rfind("\n") + 1]
    try:
        table = pd.read_csv(StringIO(text))
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise CurveError(f"{csv_path} is no table ({error}). Record or compute it again.") from error
    try:
        return Curve(table, header["provenance"], header["kind"], header["label"])
    except CurveError as error:
        raise CurveError(f"{csv_path}: {error}") from error


def csv_file(path: str | os.PathLike[str]) -> Path:
    """Path with the suffix ``.csv``, which is added where there is none; :class:`CurveError` for another one.

    Example:
        >>> csv_file("recordings/rtx4060").name
        'rtx4060.csv'
    """
    csv_path = Path(path)
    if not csv_path.name:
        raise CurveError(f"{str(path)!r} names no file. Give a name that ends in .csv.")
    if csv_path.suffix == "":
        csv_path = csv_path.with_suffix(".csv")
    if csv_path.suffix != ".csv":
        raise CurveError(f"{csv_path}: a curve is saved as .csv with a .json beside it. Let the name end in .csv.")
    return csv_path


def curve_json(kind: Kind, label: str, provenance: Mapping[str, Any]) -> str:
    """Text of the ``.json`` file."""
    document = {"kind": kind, "label": label, "provenance": dict(provenance)}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def read_curve_json(path: Path) -> dict[str, Any]:
    """Kind, label and provenance of the ``.json`` file; :class:`CurveError` where it is missing or something else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CurveError(
            f"{path} is not there: a curve's .json lies beside its .csv and says what it shows. Copy the two together."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CurveError(
            f"{path} is not readable JSON ({error}). Copy it again, or record or compute it again."
        ) from error
    if not isinstance(document, dict) or not {"kind", "label", "provenance"} <= document.keys():
        raise CurveError(
            f"{path} has no kind, label and provenance, so it is not the .json of a curve. "
            "Give the .csv of a recording or a forecast."
        )
    if not isinstance(document["label"], str) or not isinstance(document["provenance"], dict):
        raise CurveError(
            f"{path}: the label must be text and the provenance an object. Copy the file again, or record or compute "
            "it again."
        )
    return document


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    columns = [str(name) for name in table.columns]
    missing = [name for name in _REQUIRED if name not in columns]
    if missing:
        raise CurveError(f"the column {missing[0]!r} is missing; the table has: {', '.join(columns) or 'none'}.")
    if not any(name in columns for name in _CONTEXT):
        raise CurveError(f"no column of context ({' or '.join(_CONTEXT)}); the table has: {', '.join(columns)}.")
    if not any(name.endswith("_mib") for name in columns):
        raise CurveError(f"no column of memory (a name that ends in _mib); the table has: {', '.join(columns)}.")
    if repeated := [name for name in columns if columns.count(name) > 1]:
        raise CurveError(f"the column {repeated[0]!r} is there twice.")
    checked = table.set_axis(columns, axis="columns")
    for name in columns:
        try:
            numbers = pd.to_numeric(checked[name], errors="coerce")
        except OverflowError as error:
            raise CurveError(f"the column {name!r} has a number that is too large ({error}).") from error
        wrong = (numbers.isna() & checked[name].notna()) | numbers.isin([inf, -inf])
        if bool(wrong.any()):
            row = int(wrong.to_numpy().argmax())
            raise CurveError(f"row {row + 1} of the column {name!r} is {checked[name].tolist()[row]!r}, not a number.")
        checked[name] = numbers
    for name in _REQUIRED:
        if bool(checked[name].isna().any()):
            raise CurveError(f"the column {name!r} has an empty cell; every row needs its {name}.")
    if "gpu" in columns:
        indices = checked["gpu"].dropna()
        if bool(((indices != indices.round()) | (indices.abs() > _MOST_GPUS)).any()):
            raise CurveError("the column 'gpu' has a cell that is no index of a GPU (0, 1, …).")
        checked["gpu"] = checked["gpu"].astype("Int64")
    return checked
