"""Precisions against a card's memory."""

import pandas as pd
import pytest
from matplotlib.colors import to_hex

from glmlab.core.units import MIB
from glmlab.figures import FigureError, precision_chart
from glmlab.figures.deployment import PART_LOOKS


@pytest.fixture
def parts():
    return pd.DataFrame(
        {"KV payload": [5 * MIB, 5 * MIB], "MLP": [800 * MIB, 200 * MIB], "norms": [MIB, MIB]}, index=["bf16", "int4"]
    )


def test_bars_add_up_and_have_the_colours_of_their_parts(parts):
    (axes,) = precision_chart(parts, card="a card", card_mib=512).axes
    for container, part in zip(axes.containers, ("MLP", "norms", "KV payload"), strict=True):
        for bar, n_bytes in zip(container, parts[part], strict=True):
            assert bar.get_width() == n_bytes / MIB
            assert (to_hex(bar.get_facecolor()), bar.get_hatch() or "") == PART_LOOKS[part]
    ends = [bar.get_x() + bar.get_width() for bar in axes.containers[-1]]
    assert ends == [806, 206]


def test_the_card_is_a_line_and_the_words_say_what_fits(parts):
    figure = precision_chart(parts, card="a card", card_mib=512)
    (line,) = figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [512, 512]
    assert "bf16 806 MiB (does not fit), int4 206 MiB (fits), against 512 MiB of a card" in figure.alt_text
    assert figure.axes[0].get_xlabel() == "memory (MiB)"


def test_the_legend_leaves_out_what_is_too_thin_to_be_seen(parts):
    (legend,) = precision_chart(parts, card="a card", card_mib=512).legends
    assert [text.get_text() for text in legend.get_texts()] == ["a card: 512 MiB", "MLP", "KV payload"]


def test_a_card_beyond_every_bar_is_still_in_the_picture(parts):
    (axes,) = precision_chart(parts, card="a card", card_mib=80_000).axes
    assert axes.get_xlim()[1] > 80_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.iloc[:0], "no precision to draw"),
        (lambda parts: parts.rename(columns={"MLP": "cache"}), "part 'cache' is not known. Use MLP, attention"),
        (lambda parts: -parts, "less than 0 bytes"),
    ],
)
def test_bad_tables_are_refused(parts, change, message):
    with pytest.raises(FigureError, match=message):
        precision_chart(change(parts), card="a card", card_mib=512)
