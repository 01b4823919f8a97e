"""What lies side by side is told apart without colour: by pattern, line style, width, mark, or a clear step of grey."""

from itertools import combinations, pairwise

import pandas as pd
import pytest

from glmlab.core.curve import Curve
from glmlab.core.resources import data_path
from glmlab.figures import decode_strip, growth_figure, memory_curve, precision_chart, read_figure
from glmlab.figures.labels import luminance
from glmlab.figures.latency import PRECISION_LOOKS, TIME_LOOKS
from glmlab.figures.memory import COMPONENT_LOOKS
from glmlab.figures.style import SuiteFigure

CLEAR_STEP = 1.5
"""Ratio of the luminances of two greys that touch."""


def _apart(one, other) -> bool:
    """Whether two areas (colour, hatch) differ without their hue."""
    lights = sorted(luminance(color) + 0.05 for color, _ in (one, other))
    return one[1] != other[1] or lights[1] / lights[0] >= CLEAR_STEP


@pytest.fixture(scope="module")
def forecast() -> SuiteFigure:
    return read_figure(data_path("figures", "why_the_curve_bends.json").with_suffix(""))[0]


def test_stacked_components_differ_from_their_neighbours(forecast):
    areas = [(area.get_facecolor()[0], area.get_hatch()) for area in forecast.axes[0].collections]
    assert len(areas) == len(COMPONENT_LOOKS)
    for one, other in pairwise(areas):
        assert _apart(one, other)
    hatches = [hatch for _, hatch in areas if hatch]
    assert len(hatches) == len(set(hatches)) == 5


def test_lines_of_components_that_change_have_their_own_style(forecast):
    """Weights, quantisation state and CUDA context stay level, so that only the others are drawn, beside the total."""
    moving = ("kv_payload_mib", "kv_copies_mib", "activations_mib", "inactive_small_mib", "inactive_large_mib")
    assert len({str(COMPONENT_LOOKS[name][2]) for name in moving}) == len(moving)
    lines = forecast.axes[1].get_lines()
    total = next(line for line in lines if line.get_drawstyle() == "steps-post")
    payload = next(line for line in lines if line.get_linestyle() == "-" and line is not total)
    assert _apart((total.get_color(), ""), (payload.get_color(), ""))


def test_curves_differ_in_mark_width_or_line():
    table = pd.DataFrame({"step": [0, 1], "turn": [0, 1], "context_tokens": [0, 90], "used_mib": [10.0, 12.0]})
    measured = Curve(table.assign(kv_mib=[0.0, 1.0]), kind="measured", label="m")
    (axes,) = memory_curve([measured, *(Curve(table, kind="forecast", label=name) for name in "abc")]).axes
    looks = [(line.get_marker(), line.get_linestyle(), line.get_linewidth()) for line in axes.get_lines()]
    assert len(looks) == 5
    for one, other in combinations(looks, 2):
        assert one[:2] != other[:2] or abs(one[2] - other[2]) >= 0.8


def test_blocks_of_the_pools_differ_by_pattern_or_grey():
    figure, _ = read_figure(data_path("figures", "pools_at_the_move.json").with_suffix(""))
    looks = [(patch.get_facecolor(), patch.get_hatch()) for patch in figure.legends[0].get_patches()]
    assert len(looks) == 5
    for one, other in combinations(looks, 2):
        assert _apart(one, other)


def test_parts_of_a_precision_differ_from_their_neighbours():
    parts = pd.DataFrame({name: [2**30] for name in PRECISION_LOOKS}, index=["int4"])
    bars = precision_chart(parts, card="a card", card_mib=512).axes[0].patches
    looks = [(bar.get_facecolor(), bar.get_hatch()) for bar in bars]
    assert len(looks) == len(PRECISION_LOOKS)
    for one, other in pairwise(looks):
        assert _apart(one, other)


def test_parts_of_a_token_have_a_pattern_or_a_grey_of_their_own():
    for one, other in combinations(TIME_LOOKS.values(), 2):
        assert _apart(one, other)


def test_stacked_bars_have_their_own_patterns():
    growth = pd.DataFrame(
        {"turn": [1], "prompt_tokens": [9], "kept_tokens": [3], "answer_tokens": [3], "fed_tokens": [3]}
    )
    steps = pd.DataFrame(
        {"text": ["Hi"], "surprisal_bits": [0.1], "kv_bytes": [4096], "survivors: logits": [96], "forward_ms": [5],
         "choose_ms": [1], "stop_check_ms": [1]}
    )  # fmt: skip
    for axes in (growth_figure(growth).axes[0], decode_strip(steps).axes[3]):
        hatches = [patch.get_hatch() for patch in axes.patches]
        assert len(hatches) == len(set(hatches)) == 3
