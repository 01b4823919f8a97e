"""The account of the chapter's 1.5 s is arithmetic on the recorded trace and the card's published figures."""

import pytest

from glmlab.latency.account import GPUSTAT_SLEEP_S, KINDS, REPORTED_TOKEN_S, chapter_account
from glmlab.latency.measure import LatencyError


def account(**given):
    return chapter_account(**{"process_s": 0.25, "launching_s_per_layer": 0.0002, **given}).set_index("part")


def test_reading_and_unpacking_by_hand():
    table = account(bandwidth_share=0.5)
    weights = 28 * (4096 * 4608 + 4096 * 4096 + 4096 * 2 * 13696 + 13696 * 4096)
    read_s = (weights / 2 + 2 * 65024 * 4096) / 256e9  # half a byte a weight, and the head in fp16
    assert table["low_s"]["read the weights once"] == pytest.approx(read_s, rel=0.01)
    assert table["low_s"]["unpack them to fp16, read those"] == pytest.approx(2 * 2 * weights / 256e9, rel=0.01)
    computed = table[table["kind"] == "computed"]
    assert computed["high_s"].tolist() == pytest.approx((2 * computed["low_s"]).tolist())


def test_what_is_measured_is_the_low_end_and_the_guess_the_high_one():
    table = account(launching_s_per_layer=0.001, slower=2.0)
    assert table.loc["Python and launching", ["low_s", "high_s"]].tolist() == pytest.approx([0.028, 0.056])
    assert table.loc["gpustat --json, if the log ran", ["low_s", "high_s"]].tolist() == [
        0,
        2 * (0.25 + GPUSTAT_SLEEP_S),
    ]
    assert set(table["kind"]) == set(KINDS)


def test_what_remains_is_a_range_too_and_negative_where_the_parts_may_be_more():
    table = account(process_s=0.6)
    parts, rest = table.drop("unexplained"), table.loc["unexplained"]
    assert rest["low_s"] + parts["high_s"].sum() == pytest.approx(REPORTED_TOKEN_S)
    assert rest["high_s"] + parts["low_s"].sum() == pytest.approx(REPORTED_TOKEN_S)
    assert rest["low_s"] < 0 < rest["high_s"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"process_s": -1}, "times of an account are not negative"),
        ({"bandwidth_share": 1.5}, "bandwidth_share lies above 0 and up to 1"),
        ({"slower": 0.5}, "slower is at least 1"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(LatencyError, match=message):
        account(**given)
