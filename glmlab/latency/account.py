"""An account of the chapter's 1.5 s a token: what can be computed, what was measured here, and what remains.

The chapter ran ChatGLM3-6B's original int4 code on a laptop GPU. The recorded trace of that code says what it keeps in
memory, and the card's bandwidth is published. What the log's polling costs, and PyTorch's Python side for each layer,
is measured on this machine. Each row of the account says which of these it is.
"""

import pandas as pd

from glmlab.core.cards import find_card
from glmlab.core.units import MIB
from glmlab.forecast.forecast import Forecast
from glmlab.latency.measure import LatencyError
from glmlab.latency.roofline import card_rates

REPORTED_TOKEN_S = 1.5
"""What the chapter reports for a token, "about"."""

ORIGINAL_TRACE = "chatglm3-6b-original-int4"
ORIGINAL_CARD = "RTX 4060 Laptop"
ORIGINAL_LAYERS = 28

PCIE_BYTES_PER_S = 8 * 16e9 / 8 * 128 / 130
"""PCI Express 4.0 with 8 lanes: 16 GT/s a lane, 128 of 130 bits are data (PCI Express Base Specification 4.0)."""

KINDS = ("floor", "estimated", "measured here", "unexplained")


def launching_s_per_layer(parts: pd.DataFrame, *, layers: int) -> float:
    """Python and launching of one decoder layer, from a table of ``profile_token``; never below 0.

    Example:
        >>> launching_s_per_layer(pd.DataFrame({"part": ["Python and launching"], "ms": [0.8]}), layers=4)
        0.0002
    """
    (launching_ms,) = parts.loc[parts["part"] == "Python and launching", "ms"]
    return max(0.0, float(launching_ms)) / 1e3 / layers


def chapter_account(
    *, polling_s: float, launching_s_per_layer: float, spilled_bytes: float | None = None
) -> pd.DataFrame:
    """Split the chapter's time of a token into parts.

    Args:
        polling_s: one ``gpustat --json`` process (``measure_polling``).
        launching_s_per_layer: Python and launching of one decoder layer (``profile_token``).
        spilled_bytes: weights that lie in host memory and cross PCI Express for every token; by default what the
            original code uses beyond the card's memory, which is nothing once it is loaded.

    Returns:
        One row a part: part, kind (one of :data:`KINDS`), seconds, share, how (the arithmetic in words). The last row,
        "unexplained", is the reported time minus the others; it is negative if they add up to more.

    Raises:
        LatencyError: a negative time or size.

    Example:
        >>> account = chapter_account(polling_s=0.5, launching_s_per_layer=0.0002).set_index("part")
        >>> account.loc["floor: read the weights once", "how"]
        '3.40e9 B (int4, head in fp16, no embedding table) at 256e9 B/s'
    """
    if min(polling_s, launching_s_per_layer, spilled_bytes or 0) < 0:
        raise LatencyError("times and sizes of an account are not negative.")
    bandwidth = card_rates(ORIGINAL_CARD).bandwidth_bytes_per_s
    loaded = Forecast.of(trace=ORIGINAL_TRACE, turns="8:2").curve.table.iloc[0]
    quantised = (loaded["weights_attention_mib"] + loaded["weights_mlp_mib"]) * MIB
    others = (loaded["weights_head_mib"] + loaded["weights_norms_mib"] + loaded["quantisation_state_mib"]) * MIB
    read_bytes = quantised + others
    dequantised_bytes = 4 * quantised  # half a byte a weight becomes two
    if spilled_bytes is None:
        spilled_bytes = max(0.0, loaded["used_mib"] - find_card(ORIGINAL_CARD).memory_mib) * MIB
    account = pd.DataFrame(
        [
            ("floor: read the weights once", "floor", read_bytes / bandwidth),
            ("dequantise them to fp16, read those", "estimated", 2 * dequantised_bytes / bandwidth),
            ("weights in host memory", "estimated", spilled_bytes / PCIE_BYTES_PER_S),
            ("Python and launching", "measured here", launching_s_per_layer * ORIGINAL_LAYERS),
            ("the log: gpustat --json", "measured here", polling_s),
        ],
        columns=["part", "kind", "seconds"],
    )
    account.loc[len(account)] = ("unexplained", "unexplained", REPORTED_TOKEN_S - account["seconds"].sum())
    account["share"] = account["seconds"] / REPORTED_TOKEN_S
    account["how"] = [
        f"{read_bytes / 1e9:.2f}e9 B (int4, head in fp16, no embedding table) at {bandwidth / 1e9:.0f}e9 B/s",
        f"{dequantised_bytes / 1e9:.2f}e9 B written and read again at the same rate",
        f"{spilled_bytes / 1e9:.2f}e9 B over PCI Express 4.0 x8 at {PCIE_BYTES_PER_S / 1e9:.2f}e9 B/s",
        f"{launching_s_per_layer * 1e3:.3f} ms a layer of the embedded model, times {ORIGINAL_LAYERS} layers",
        "one process for each streamed token",
        "what remains of the reported time",
    ]
    return account
