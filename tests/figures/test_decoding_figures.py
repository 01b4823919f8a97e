"""The figures of decode steps show what the tables hold."""

import pandas as pd
from matplotlib.patches import Rectangle

from glmlab.figures import candidates_chart, decode_strip, lens_heatmap

STEPS = pd.DataFrame(
    {
        "text": ["▁On", "▁the", "👋", "$x$"],
        "surprisal_bits": [0.5, 0.0, 3.25, 1.0],
        "kv_bytes": [2**20, 2**20 * 1.5, 2**21, 2**20 * 2.5],
        "survivors: logits": [96] * 4,
        "survivors: top-k": [96] * 4,
        "survivors: top-p": [3, 1, 9, 4],
        "forward_ms": [6.0, 2.0, 2.0, 2.0],
        "choose_ms": [0.5] * 4,
        "stop_check_ms": [0.5] * 4,
    }
)
CANDIDATES = pd.DataFrame(
    {
        "stage": ["logits"] * 3 + ["top-p"] * 2,
        "survivors": [96] * 3 + [2] * 2,
        "rank": [1, 2, 3, 1, 2],
        "token_id": [5, 7, 9, 5, 7],
        "text": ["On", "你好", "$c$", "On", "你好"],
        "probability": [0.5, 0.3, 0.1, 0.6, 0.4],
        "chosen": [False, True, False, False, True],
    }
)
LENS = pd.DataFrame(
    {
        "layer": [0, 0, 1, 1],
        "name": ["embeddings"] * 2 + ["layer 1"] * 2,
        "normed": [False, False, True, True],
        "rank": [1, 2, 1, 2],
        "text": ["第", "b", "c", "d"],
        "probability": [0.2, 0.1, 0.7, 0.2],
        "chosen": [False, True, True, False],
    }
)


def _labels(labels) -> list[str]:
    return [label.get_text() for label in labels]


def test_a_strip_has_a_bar_a_step_in_every_panel():
    figure = decode_strip(STEPS)
    figure.draw_without_rendering()  # a glyph that no font has would warn
    surprisal, survivors, cache, acts = figure.axes
    assert [bar.get_height() for bar in surprisal.patches] == [0.5, 0.0, 3.25, 1.0]
    assert _labels(surprisal.texts) == ["U+1F44B", "$x$", "␣On"], "the surprising tokens; no mathematics"
    assert [bar.get_height() for bar in cache.patches] == [1, 1.5, 2, 2.5]
    assert len(acts.patches) == 3 * 4
    assert max(bar.get_y() + bar.get_height() for bar in acts.patches) == 7
    assert [line.get_ydata().tolist() for line in survivors.get_lines()] == [[96] * 4, [3, 1, 9, 4]]
    assert _labels(survivors.texts) == ["logits, top-k", "top-p"], "stages that cut nothing share a line"
    for words in (
        "4 decode steps",
        "Most surprising: 👋 with 3.2 bits. The cache grows from 1.00 to 2.50 MiB",
        "75% of",
    ):
        assert words in figure.alt_text


def test_a_candidate_keeps_its_row_in_every_panel_and_the_chosen_one_its_colour():
    figure = candidates_chart(CANDIDATES)
    figure.draw_without_rendering()
    logits, top_p = figure.axes
    assert [bar.get_width() for bar in logits.patches] == [0.5, 0.3, 0.1]
    assert [bar.get_width() for bar in top_p.patches] == [0.6, 0.4, 0.0]
    assert _labels(top_p.texts) == ["60%", "40%", "cut"]
    assert top_p.get_title() == "top-p\n2 survive"
    colors = [bar.get_facecolor() for bar in logits.patches]
    assert colors[0] == colors[2] != colors[1]


def test_a_candidate_that_is_not_among_the_best_is_not_called_cut():
    more = CANDIDATES.assign(survivors=96)
    assert _labels(candidates_chart(more).axes[1].texts) == ["60%", "40%", "<40%"]


def test_a_lens_has_a_row_a_layer_and_the_chosen_token_framed():
    figure = lens_heatmap(LENS)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_images()[0].get_array().tolist() == [[0.2, 0.1], [0.7, 0.2]]
    assert _labels(axes.texts) == ["第\n20%", "b\n10%", "c\n70%", "d\n20%"]
    assert _labels(axes.get_yticklabels()) == ["embeddings", "layer 1: output"]
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert [(round(frame.get_x()), round(frame.get_y())) for frame in frames] == [(1, 0), (0, 1)]
    assert figure.alt_text == "Best token after each layer: embeddings 第 20%, layer 1 c 70%"
