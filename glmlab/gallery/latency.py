"""Plates of notebook 06: where the time of a token goes. Times are a recording; the account is computed from it."""

import json
from typing import Any

import pandas as pd

from glmlab.core.resources import data_path
from glmlab.figures.latency import account_chart, first_token_curve, latency_curve, polling_chart, token_parts_chart
from glmlab.figures.style import SuiteFigure
from glmlab.gallery.captions import caption
from glmlab.gallery.plate import Plate

RECORDING = "token-times-embedded"
"""Beginning of the names of the recorded tables; data/recordings/record_latency.py makes them."""

PRECISIONS = ("fp32", "bf16", "int8", "int4")
COMPILED_PRECISION = "fp32"
CONTEXTS = (64, 512, 2048)
PROMPTS = (16, 64, 256)


def recorded(table: str) -> pd.DataFrame:
    """One of the recorded tables: decode, compiled, parts, first-token or polling."""
    return pd.read_csv(data_path("recordings", f"{RECORDING}-{table}.csv"), keep_default_na=False)


def provenance() -> dict[str, Any]:
    """What was measured on what."""
    told: dict[str, Any] = json.loads(data_path("recordings", f"{RECORDING}.json").read_text(encoding="utf-8"))
    return told


def decode_latency() -> Plate:
    """Milliseconds a token in every precision, against the floor."""
    table = recorded("decode")
    return _plate(latency_curve(table), table, "decode_latency")


def token_parts() -> Plate:
    """What the time of one token consists of."""
    table = recorded("parts")
    return _plate(token_parts_chart(table), table, "token_parts")


def eager_and_compiled() -> Plate:
    """The same model with and without torch.compile."""
    table = recorded("compiled")
    return _plate(latency_curve(table, by="way"), table, "eager_and_compiled")


def first_token() -> Plate:
    """The time to the first token against the length of the prompt."""
    table = recorded("first-token")
    return _plate(first_token_curve(table), table, "first_token")


def polling() -> Plate:
    """What it costs to ask for the memory in use."""
    table = recorded("polling")
    return _plate(polling_chart(table), table, "polling")


def account_of_a_token() -> Plate:
    """The chapter's 1.5 s, from the card's figures, the recorded trace of its code, and what was measured."""
    from glmlab.latency.account import chapter_account, launching_s_per_layer
    from glmlab.latency.polling import SUBPROCESS

    polled_ms = recorded("polling").set_index("way")["fastest_ms"][SUBPROCESS]
    parts = recorded("parts")
    launching_s = launching_s_per_layer(parts[parts["precision"] == PRECISIONS[0]], layers=provenance()["layers"])
    account = chapter_account(polling_s=polled_ms / 1e3, launching_s_per_layer=launching_s)
    return _plate(account_chart(account), account, "account_of_a_token")


def _plate(figure: SuiteFigure, table: pd.DataFrame, name: str) -> Plate:
    return Plate(figure, table, provenance(), caption(name))
