"""An account of the chapter's 1.5 s a token: what can be computed, what was measured here, and what remains.

The chapter ran ChatGLM3-6B's original int4 code on a laptop GPU. The recorded trace of that code says what it keeps in
memory, and the card's bandwidth is published: that part is computed. What starting a process costs, and PyTorch's
Python side of each layer, is measured on this machine. How far that laptop was from a card's peak and from this machine
is a guess, named as such: it makes a range of every part.
"""

import pandas as pd

from glmlab.core.units import MIB
from glmlab.forecast.forecast import Forecast
from glmlab.latency.measure import LatencyError
from glmlab.latency.roofline import card_rates

REPORTED_TOKEN_S = 1.5
"""What the chapter reports for a token, "about"."""

ORIGINAL_TRACE = "chatglm3-6b-original-int4"
ORIGINAL_CARD = "RTX 4060 Laptop"
ORIGINAL_LAYERS = 28

GPUSTAT_SLEEP_S = 0.1
"""What gpustat 1.1 sleeps for each GPU to measure its utilisation (``gpustat/core.py``)."""

KINDS = ("computed", "measured here", "unexplained")


def launching_s_per_layer(parts: pd.DataFrame, *, layers: int) -> float:
    """Python and launching of one decoder layer, from a table of ``profile_token``; never below 0.

    Example:
        >>> launching_s_per_layer(pd.DataFrame({"part": ["Python and launching"], "ms": [0.8]}), layers=4)
        0.0002
    """
    (launching_ms,) = parts.loc[parts["part"] == "Python and launching", "ms"]
    return max(0.0, float(launching_ms)) / 1e3 / layers


def chapter_account(
    *, process_s: float, launching_s_per_layer: float, bandwidth_share: float = 0.6, slower: float = 3.0
) -> pd.DataFrame:
    """Split the chapter's time of a token into parts, each a range.

    Args:
        process_s: starting Python and importing gpustat (``measure_polling``).
        launching_s_per_layer: Python and launching of one decoder layer (``profile_token``).
        bandwidth_share: a guess: the least share of the card's published bandwidth that its kernels reached.
        slower: a guess: how many times slower than this machine that laptop, under Windows, may have been.

    Returns:
        One row a part: part, kind (one of :data:`KINDS`), low_s, high_s, how (the arithmetic in words). The last row,
        "unexplained", is what remains of the reported time if all others are high, and if all are low; its low_s is
        negative if they may add up to more.

    Raises:
        LatencyError: a negative time, or guesses outside their range.

    Example:
        >>> account = chapter_account(process_s=0.25, launching_s_per_layer=0.0002).set_index("part")
        >>> account.loc["read the weights once", "how"]
        '3.40e9 B (int4, head in fp16, no embedding table) at 256e9 B/s'
    """
    if min(process_s, launching_s_per_layer) < 0:
        raise LatencyError("times of an account are not negative.")
    if not 0 < bandwidth_share <= 1 <= slower:
        raise LatencyError("bandwidth_share lies above 0 and up to 1, slower is at least 1.")
    bandwidth = card_rates(ORIGINAL_CARD).bandwidth_bytes_per_s
    loaded = Forecast.of(trace=ORIGINAL_TRACE, turns="8:2").curve.table.iloc[0]
    quantised = (loaded["weights_attention_mib"] + loaded["weights_mlp_mib"]) * MIB
    others = (loaded["weights_head_mib"] + loaded["weights_norms_mib"] + loaded["quantisation_state_mib"]) * MIB
    read_s = (quantised + others) / bandwidth
    unpacked = 4 * quantised  # half a byte a weight becomes two
    unpack_s = 2 * unpacked / bandwidth
    launching_s = launching_s_per_layer * ORIGINAL_LAYERS
    account = pd.DataFrame(
        [
            ("read the weights once", "computed", read_s, read_s / bandwidth_share,
             f"{(quantised + others) / 1e9:.2f}e9 B (int4, head in fp16, no embedding table) at "
             f"{bandwidth / 1e9:.0f}e9 B/s"),
            ("unpack them to fp16, read those", "computed", unpack_s, unpack_s / bandwidth_share,
             f"{unpacked / 1e9:.2f}e9 B written and read again at the same rate"),
            ("Python and launching", "measured here", launching_s, launching_s * slower,
             f"{launching_s_per_layer * 1e3:.3f} ms a layer of the embedded model, times {ORIGINAL_LAYERS} layers"),
            ("gpustat --json, if the log ran", "measured here", 0.0, (process_s + GPUSTAT_SLEEP_S) * slower,
             "the chapter does not say whether it logged then; high: a process a token, with gpustat's own sleep"),
        ],
        columns=["part", "kind", "low_s", "high_s", "how"],
    )  # fmt: skip
    rest_s = REPORTED_TOKEN_S - account[["high_s", "low_s"]].sum()
    account.loc[len(account)] = ("unexplained", "unexplained", *rest_s, "what remains of the reported time")
    return account
