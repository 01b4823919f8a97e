"""What lies side by side is told apart without colour: by pattern, line style, width, mark, or a clear step of grey."""

from itertools import combinations, pairwise

import pandas as pd
import pytest

from glmlab.allocator.caching import CachingAllocator
from glmlab.core.curve import Curve
from glmlab.figures import (
    component_chart,
    decode_strip,
    growth_figure,
    latency,
    memory_curve,
    pool_map,
    precision_chart,
)
from glmlab.figures.deployment import PART_LOOKS
from glmlab.figures.forecast import COMPONENT_STYLES
from glmlab.figures.style import luminance
from glmlab.forecast.forecast import Forecast

CLEAR_STEP = 1.5
"""Ratio of the luminances of two greys that touch."""


def _apart(one, other) -> bool:
    """Whether two areas (colour, hatch) differ without their hue."""
    lights = sorted(luminance(color) + 0.05 for color, _ in (one, other))
    return one[1] != other[1] or lights[1] / lights[0] >= CLEAR_STEP


@pytest.fixture(scope="module")
def curve() -> Curve:
    return Forecast.of(trace="chatglm3-6b-original-int4", turns="8:40,30:60").curve


def test_stacked_components_differ_from_their_neighbours(curve):
    above, _ = component_chart(curve).axes
    areas = [(area.get_facecolor()[0], area.get_hatch()) for area in above.collections]
    assert len(areas) == len(COMPONENT_STYLES)
    for one, other in pairwise(areas):
        assert _apart(one, other)
    hatches = [hatch for _, hatch in areas if hatch]
    assert len(hatches) == len(set(hatches)) == 5


def test_lines_of_components_that_change_have_their_own_style(curve):
    """Weights, quantisation state and CUDA context stay level, so that only the others are drawn, beside the total."""
    moving = ("kv_payload_mib", "kv_copies_mib", "activations_mib", "inactive_small_mib", "inactive_large_mib")
    assert len({str(COMPONENT_STYLES[name][2]) for name in moving}) == len(moving)
    _, below = component_chart(curve).axes
    total = next(line for line in below.get_lines() if line.get_drawstyle() == "steps-post")
    payload = next(line for line in below.get_lines() if line.get_linestyle() == "-" and line is not total)
    assert _apart((total.get_color(), ""), (payload.get_color(), ""))


def test_curves_differ_in_mark_width_or_line():
    table = pd.DataFrame({"step": [0, 1], "turn": [0, 1], "context_tokens": [0, 90], "used_mib": [10.0, 12.0]})
    measured = Curve(table.assign(kv_mib=[0.0, 1.0]), kind="measured", label="m")
    curves = [measured, *(Curve(table, kind="forecast", label=name) for name in "abc")]
    curves.append(Curve(table, kind="reported", label="r"))
    _, below = memory_curve(curves).axes
    looks = [(line.get_marker(), line.get_linestyle(), line.get_linewidth()) for line in below.get_lines()]
    assert len(looks) == 6
    for one, other in combinations(looks, 2):
        assert one[:2] != other[:2] or abs(one[2] - other[2]) >= 0.8


def test_blocks_of_the_pools_differ_by_pattern_or_grey():
    allocator = CachingAllocator()
    for size, owner in ((30 * 2**20, 0), (12 * 2**20, 1), (12 * 2**20, 2)):
        allocator.malloc(size, owner=owner)
    allocator.malloc(600, owner=0)
    figure = pool_map(allocator.segments(), ["weights", "kv_cache", "activations"])
    looks = [(patch.get_facecolor(), patch.get_hatch()) for patch in figure.legends[0].get_patches()]
    assert len(looks) == 4
    for one, other in combinations(looks, 2):
        assert _apart(one, other)


def test_parts_of_a_precision_differ_from_their_neighbours():
    parts = pd.DataFrame({name: [2**30] for name in PART_LOOKS}, index=["int4"])
    bars = precision_chart(parts, card="a card", card_mib=512).axes[0].patches
    looks = [(bar.get_facecolor(), bar.get_hatch()) for bar in bars]
    assert len(looks) == len(PART_LOOKS)
    for one, other in pairwise(looks):
        assert _apart(one, other)


def test_parts_of_a_token_have_a_pattern_or_a_grey_of_their_own():
    for one, other in combinations(latency.PART_LOOKS.values(), 2):
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
