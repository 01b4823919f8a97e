"""A forecast by component adds up, and the map of the pools shows every block."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from glmlab.allocator.caching import CachingAllocator
from glmlab.core.curve import Curve
from glmlab.figures import COLORS, FigureError, component_chart, components, pool_map
from glmlab.forecast.forecast import Forecast


@pytest.fixture(scope="module")
def curve() -> Curve:
    return Forecast.of(trace="chatglm3-6b-original-int4", turns="8:40,30:60").curve


def test_components_add_up_to_what_is_used(curve):
    parts = components(curve)
    np.testing.assert_allclose(parts.sum(axis=1), curve.table["used_mib"], atol=1e-6)
    assert next(iter(parts.columns)) == "weights_mib"


def test_parts_that_do_not_add_up_are_refused(curve):
    wrong = Curve(curve.table.assign(kv_payload_mib=curve.table["kv_payload_mib"] + 1), kind="forecast", label="wrong")
    with pytest.raises(FigureError, match="components of 'wrong' miss used_mib by up to 1.000 MiB"):
        component_chart(wrong)


def test_a_recording_has_no_components():
    table = pd.DataFrame({"step": [0], "turn": [0], "context_tokens": [0], "used_mib": [1.0]})
    with pytest.raises(FigureError, match="has no components .* Give a forecast"):
        component_chart(Curve(table, label="measured"))


def test_the_chart_stacks_up_to_the_line_of_what_is_used(curve):
    above, below = component_chart(curve).axes
    (used,) = above.get_lines()
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in above.collections]
    assert max(tops) == pytest.approx(curve.table["used_mib"].max())
    assert used.get_ydata().tolist() == curve.table["used_mib"].tolist()
    total = below.get_lines()[-1 - sum(1 for _ in [1])]  # the turn's line comes last
    assert to_hex(total.get_color()) == COLORS["used"]
    assert total.get_ydata()[0] == 0


def test_the_chart_says_itself_in_words(curve):
    text = component_chart(curve).alt_text
    last = curve.table.iloc[-1]
    assert f"{last['used_mib']:.0f} MiB at {last['context_tokens']:.0f} tokens" in text
    assert f"KV payload {last['kv_payload_mib']:.0f}" in text


class TestPoolMap:
    @pytest.fixture
    def allocator(self):
        allocator = CachingAllocator()
        allocator.malloc(600, owner=1)
        allocator.malloc(30 * 2**20, owner=0)
        allocator.free(allocator.malloc(12 * 2**20, owner=0))
        return allocator

    def test_segments_with_room_are_drawn_and_full_ones_counted(self, allocator):
        small, large = pool_map(allocator.segments(), ["weights", "kv_cache"], title="now").axes
        assert small.get_title() == "small pool: 2 MiB idle\n1 segments, 0 of them full"
        assert large.get_title() == "large pool: 12 MiB idle\n2 segments, 1 of them full"
        assert [to_hex(bar.get_facecolor()[0]) for bar in small.collections] == [COLORS["kv"], "#ffffff"]

    def test_blocks_lie_where_they_are(self, allocator):
        small, _ = pool_map(allocator.segments(), ["weights", "kv_cache"]).axes
        edges = [bar.get_paths()[0].vertices[:, 0] for bar in small.collections]
        assert edges[0].max() * 2**20 == 1024
        assert edges[1].max() == 2

    def test_an_empty_allocator_is_refused(self):
        with pytest.raises(FigureError, match="no segments to draw"):
            pool_map([], [])
