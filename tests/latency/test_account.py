"""The account of the chapter's 1.5 s is arithmetic on the recorded trace and the card's published figures."""

import pytest

from glmlab.latency.account import KINDS, PCIE_BYTES_PER_S, REPORTED_TOKEN_S, chapter_account
from glmlab.latency.measure import LatencyError


def account(**given):
    return chapter_account(**{"polling_s": 0.5, "launching_s_per_layer": 0.0002, **given}).set_index("part")


def test_floor_and_dequantising_by_hand():
    seconds = account()["seconds"]
    weights = 28 * (4096 * 4608 + 4096 * 4096 + 4096 * 2 * 13696 + 13696 * 4096)
    floor_s = (weights / 2 + 2 * 65024 * 4096) / 256e9  # half a byte a weight, and the head in fp16
    assert seconds["floor: read the weights once"] == pytest.approx(floor_s, rel=0.01)
    assert seconds["dequantise them to fp16, read those"] == pytest.approx(2 * 2 * weights / 256e9, rel=0.01)


def test_what_is_measured_goes_in_as_it_is():
    table = account(polling_s=0.7, launching_s_per_layer=0.001)
    assert table["seconds"]["the log: gpustat --json"] == 0.7
    assert table["seconds"]["Python and launching"] == pytest.approx(0.028)
    assert table["share"]["the log: gpustat --json"] == pytest.approx(0.7 / REPORTED_TOKEN_S)
    assert set(table["kind"]) == set(KINDS)


def test_the_loaded_model_fits_the_card_so_nothing_spills_unless_told():
    assert account()["seconds"]["weights in host memory"] == 0
    spilled = account(spilled_bytes=4e9)["seconds"]["weights in host memory"]
    assert spilled == pytest.approx(4e9 / PCIE_BYTES_PER_S)
    assert pytest.approx(15.75e9, rel=1e-3) == PCIE_BYTES_PER_S


def test_what_nothing_explains_is_the_rest_and_negative_where_the_parts_are_more():
    """Floor and unpacking are 103 ms, so that a log of 1 s leaves 397 ms."""
    rest = [account(polling_s=s, launching_s_per_layer=0)["seconds"]["unexplained"] for s in (1.0, 2.0)]
    assert rest == pytest.approx([0.397, -0.603], abs=0.001)


def test_negative_times_are_refused():
    with pytest.raises(LatencyError, match="are not negative"):
        account(polling_s=-1)
