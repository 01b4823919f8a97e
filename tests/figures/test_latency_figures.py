"""Figures of time and bytes: measured and computed look apart, bars are as long as their parts, words say it."""

import pandas as pd
import pytest
from matplotlib.colors import to_hex

from glmlab.core.units import MIB
from glmlab.figures import (
    FigureError,
    account_chart,
    first_token_curve,
    latency_curve,
    polling_chart,
    precision_chart,
    token_parts_chart,
)
from glmlab.figures.latency import PRECISION_LOOKS, TIME_LOOKS
from glmlab.latency.account import REPORTED_TOKEN_S, chapter_account
from glmlab.latency.profile import PARTS


@pytest.fixture
def times() -> pd.DataFrame:
    rows = [
        {"precision": precision, "context_tokens": context, "token_ms": ms, "p10_ms": ms * 0.9, "p90_ms": ms * 1.2}
        for precision, base in (("fp32", 2.0), ("int4", 3.0))
        for context, ms in ((64, base), (1024, base * 2))
    ]
    return pd.DataFrame(rows, index=[0, 1, 0, 1]).assign(floor_ms=0.5)  # the index of joined tables


def test_dots_are_measured_lines_are_floors(times):
    above, below = latency_curve(times).axes
    floors = [line for line in above.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) == 2]
    assert [line.get_ydata().tolist() for line in floors] == [[0.5, 0.5]] * 2
    dots = [line for line in above.get_lines() if line.get_linestyle() == "None"]
    assert [line.get_ydata().tolist() for line in dots] == [[2.0, 4.0], [3.0, 6.0]]
    ratios = [line.get_ydata() for line in below.get_lines() if line.get_linestyle() == ":"]
    assert [list(ratio) for ratio in ratios] == [[4.0, 8.0], [6.0, 12.0]]
    renamed = times.rename(columns={"precision": "way"}).replace({"fp32": "eager", "int4": "compiled"})
    words = latency_curve(renamed, by="way").alt_text
    assert "eager: 2.00 ms at 64 tokens" in words
    assert "4.0 to 12.0 times the floor" in words


def test_the_first_token_beside_what_would_be_in_proportion():
    table = pd.DataFrame(
        {"precision": "fp32", "prompt_tokens": [16, 64], "first_token_ms": [4.0, 10.0], "p10_ms": 3.0, "p90_ms": 12.0}
    )
    figure = first_token_curve(table)
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == "--"]
    assert line.get_ydata().tolist() == [4.0, 16.0]
    assert "fp32: 10 ms for 64 tokens" in figure.alt_text


def test_every_part_has_a_look_and_bars_are_as_long_as_the_step():
    assert tuple(TIME_LOOKS) == PARTS
    table = pd.DataFrame({"precision": "fp32", "part": PARTS, "ms": [0.2, 0.1, 0.1, 0.1, 1.0, 0.1, 0.05]})
    figure = token_parts_chart(table)
    bars = figure.axes[0].patches
    assert max(bar.get_x() + bar.get_width() for bar in bars) == pytest.approx(table["ms"].sum())
    assert figure.alt_text.split("fp32: ")[1].startswith("1.65 ms, of which weights 12%, attention 6%, ")
    assert "Python and launching 61%" in figure.alt_text


def test_only_ways_that_answered_have_a_dot():
    table = pd.DataFrame({"way": ["a", "b"], "poll_ms": [500.0, None]})
    figure = polling_chart(table)
    (dots,) = figure.axes[0].get_lines()
    assert dots.get_xdata().tolist() == [500]
    assert figure.alt_text == "What one reading of the memory costs. a: 500 ms."
    with pytest.raises(FigureError, match="no way of asking answered"):
        polling_chart(table[1:])


def test_bars_of_an_account_reach_from_zero_to_low_and_thinner_to_high():
    account = chapter_account(process_s=0.25, launching_s_per_layer=0.0002)
    figure = account_chart(account, reported_s=REPORTED_TOKEN_S)
    bars = figure.axes[0].patches
    for low, high, row in zip(bars[::2], bars[1::2], account.itertuples(), strict=True):
        assert low.get_width() == high.get_x() == pytest.approx(max(0, row.low_s) * 1e3)
        assert high.get_x() + high.get_width() == pytest.approx(row.high_s * 1e3)
        assert low.get_height() > high.get_height()
    assert len({(to_hex(bar.get_facecolor()), bar.get_hatch()) for bar in bars[::2]}) == 3
    assert "read the weights once (computed): 13–22 ms" in figure.alt_text


class TestPrecisions:
    @pytest.fixture
    def parts(self) -> pd.DataFrame:
        columns = {"KV payload": [5 * MIB, 5 * MIB], "MLP": [800 * MIB, 200 * MIB], "norms": [MIB, MIB]}
        return pd.DataFrame(columns, index=["bf16", "int4"])

    def test_bars_add_up_and_have_the_colours_of_their_parts(self, parts):
        (axes,) = precision_chart(parts, card="a card", card_mib=512).axes
        for container, part in zip(axes.containers, ("MLP", "norms", "KV payload"), strict=True):
            for bar, n_bytes in zip(container, parts[part], strict=True):
                assert bar.get_width() == n_bytes / MIB
                assert (to_hex(bar.get_facecolor()), bar.get_hatch() or "") == PRECISION_LOOKS[part]
        assert [bar.get_x() + bar.get_width() for bar in axes.containers[-1]] == [806, 206]

    def test_the_card_is_a_line_and_the_words_say_what_fits(self, parts):
        figure = precision_chart(parts, card="a card", card_mib=512)
        (line,) = figure.axes[0].get_lines()
        assert list(line.get_xdata()) == [512, 512]
        assert precision_chart(parts, card="a card", card_mib=80_000).axes[0].get_xlim()[1] > 80_000
        assert "bf16 806 MiB (does not fit), int4 206 MiB (fits), against 512 MiB of a card" in figure.alt_text
        (legend,) = figure.legends  # without what is too thin to be seen
        assert [text.get_text() for text in legend.get_texts()] == ["MLP", "KV payload"]
        assert "a card: 512 MiB" in [text.get_text() for text in figure.axes[0].texts]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda parts: parts.rename(columns={"MLP": "cache"}), "part 'cache' is not known. Use MLP, attention"),
            (lambda parts: -parts, "less than 0 bytes"),
        ],
    )
    def test_bad_tables_are_refused(self, parts, change, message):
        with pytest.raises(FigureError, match=message):
            precision_chart(change(parts), card="a card", card_mib=512)


def test_unknown_parts_are_refused():
    with pytest.raises(FigureError, match="part 'lunch' is not known. Use weights"):
        token_parts_chart(pd.DataFrame({"precision": ["a"], "part": ["lunch"], "ms": [1.0]}))
    with pytest.raises(FigureError, match="kind 'guessed' is not known. Use computed"):
        account_chart(
            pd.DataFrame({"part": ["a"], "kind": ["guessed"], "low_s": [1.0], "high_s": [1.0]}), reported_s=1.5
        )
