"""Memory in pictures: drawn by kind, components add up, the map of the pools shows every block."""

from base64 import b64decode
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from glmlab.allocator.caching import CachingAllocator
from glmlab.core.curve import COMPONENTS, Curve, read_curve
from glmlab.core.resources import data_path
from glmlab.figures import (
    COLORS,
    FigureError,
    component_chart,
    curves_table,
    figure_settings,
    memory_curve,
    pool_map,
    segments_table,
)
from glmlab.figures.memory import COMPONENT_LOOKS


def _curve(kind="measured", label="a curve", **columns) -> Curve:
    table = {"step": [0, 1, 2], "turn": [0, 1, 2], "context_tokens": [0, 500, 1000], "used_mib": [4700.0, 4710, 4730]}
    return Curve(pd.DataFrame({**table, **columns}), kind=kind, label=label)


MEASURED = _curve(context_characters=[0, 1000, 1500], kv_mib=[0.0, 13.7, 27.3])
REPORTED = Curve(
    pd.DataFrame({"step": [0, 1], "turn": [0, 1], "context_characters": [0, 1250], "used_mib": [4700.0, 4800]}),
    kind="reported",
    label="a book",
)


def _lines(axes) -> dict:
    return {line.get_label(): line for line in axes.get_lines()}


class TestMemoryCurve:
    def test_measured_is_dots_forecast_a_line_reported_hollow(self):
        above, below = memory_curve([MEASURED, _curve("forecast", "b"), REPORTED]).axes
        lines = _lines(below)
        measured = lines["a curve, GPU memory used (measured)"]
        forecast = lines["b, GPU memory used (forecast)"]
        reported = lines["a book, GPU memory used (reported)"]
        assert measured.get_marker() == "o"
        looks = forecast.get_marker(), forecast.get_linestyle(), forecast.get_drawstyle()
        assert looks == ("None", "-", "steps-post")
        assert (reported.get_linestyle(), to_hex(reported.get_markerfacecolor())) == ("None", "#ffffff")
        assert "a book, GPU memory used (reported)" not in _lines(above)

    def test_growth_starts_at_zero_and_the_payload_is_exact(self):
        lines = _lines(memory_curve([MEASURED]).axes[1])
        assert lines["a curve, GPU memory used (measured)"].get_ydata().tolist() == [0, 10, 30]
        payload = lines["a curve, KV payload (exact)"]
        assert payload.get_ydata().tolist() == [0.0, 13.7, 27.3]
        assert to_hex(payload.get_color()) == COLORS["kv"]

    def test_characters_are_placed_among_tokens_and_on_the_upper_axis(self):
        above, below = memory_curve([MEASURED, REPORTED]).axes
        assert _lines(below)["a book, GPU memory used (reported)"].get_xdata().tolist() == [0, 750]
        (upper,) = above.child_axes
        assert upper.get_xlabel() == "conversation length (characters)"
        assert upper._functions[0]([0, 500, 1000, 2000]).tolist() == [0, 1000, 1500, 3000]

    @pytest.mark.parametrize("width_mm", [None, 86])
    def test_numbers_of_the_upper_axis_do_not_touch(self, width_mm):
        with figure_settings(width_mm=width_mm):
            figure = memory_curve([read_curve(data_path("recordings", "embedded-fp32-cpu.csv"))])
        figure.draw_without_rendering()
        (upper,) = figure.axes[0].child_axes
        left, right = upper.get_xlim()
        boxes = [
            tick.label1.get_window_extent() if tick.label1.get_visible() else tick.label2.get_window_extent()
            for tick in upper.xaxis.get_major_ticks()
            if left <= tick.get_loc() <= right
        ]
        assert len(boxes) >= 4
        assert all(other.x0 - one.x1 > 5 for one, other in pairwise(boxes))

    def test_a_notebook_shows_it_with_words_for_those_who_do_not_see_it(self):
        data, metadata = memory_curve([MEASURED, REPORTED])._repr_mimebundle_()
        assert b64decode(data["image/png"]).startswith(b"\x89PNG")
        assert metadata["image/png"]["alt"] == data["text/plain"]
        assert data["text/plain"].endswith(
            "a curve (measured): 4700 MiB at first, 4730 MiB at 1000 tokens. "
            "a book (reported): 4700 MiB at first, 4800 MiB at 1250 characters."
        )

    def test_a_forecast_keeps_the_steps_between_which_nothing_changes_to_itself(self):
        used = np.repeat([10.0, 12.0, 12.5, 20.0], [500, 300, 1, 200])
        steps = np.arange(len(used))
        columns = {"step": steps, "turn": 1, "context_tokens": steps, "used_mib": used}
        table = curves_table([Curve(pd.DataFrame(columns), kind="forecast")])
        assert len(table) < 15
        last = np.searchsorted(table["context_tokens"], steps, side="right") - 1
        assert table["used_mib"].to_numpy()[last].tolist() == used.tolist(), "the same steps"

    def test_memory_falls_back_to_the_process_by_name(self):
        table = MEASURED.table.drop(columns="used_mib").assign(rss_mib=[600.0, 601, 602])
        assert "a curve, process memory (measured)" in _lines(memory_curve([Curve(table, label="a curve")]).axes[0])

    @pytest.mark.parametrize(
        ("curves", "message"),
        [
            ([], "no curve to draw"),
            ([REPORTED], "counts characters only, and no other counts both"),
            ([Curve(MEASURED.table.drop(columns="used_mib"), label="x")], "'x' has neither used_mib nor rss_mib"),
        ],
    )
    def test_what_cannot_be_drawn_is_refused(self, curves, message):
        with pytest.raises(FigureError, match=message):
            memory_curve(curves)


@pytest.fixture(scope="module")
def forecast() -> Curve:
    """Made-up numbers: everything grows but the weights and the CUDA context; turns of 20 steps."""
    steps = np.arange(60)
    grow = {"kv_payload_mib": 0.5, "kv_copies_mib": 1.0, "activations_mib": 0.25, "inactive_small_mib": 0.75,
            "inactive_large_mib": 0.125}  # fmt: skip
    parts = pd.DataFrame({name: 100 + grow.get(name, 0) * steps for name in COMPONENTS})
    turns = np.where(steps, steps // 20 + 1, 0)
    told = pd.DataFrame({"step": steps, "turn": turns, "context_tokens": steps * 10, "used_mib": parts.sum(axis=1)})
    return Curve(pd.concat([told, parts], axis=1), kind="forecast", label="made up")


class TestComponents:
    def test_they_stack_up_to_the_line_of_what_is_used(self, forecast):
        above, below = component_chart(forecast).axes
        (used,) = above.get_lines()
        tops = [area.get_paths()[0].vertices[:, 1].max() for area in above.collections]
        assert len(tops) == len(COMPONENT_LOOKS)
        assert max(tops) == used.get_ydata()[-1] == forecast.table["used_mib"].iloc[-1]
        *_, total, second_turn, third_turn = below.get_lines()
        assert (to_hex(total.get_color()), total.get_ydata()[0]) == (COLORS["used"], 0)
        assert [line.get_xdata()[0] for line in (second_turn, third_turn)] == [200, 400]

    def test_it_says_itself_in_words(self, forecast):
        text = component_chart(forecast).alt_text
        assert text.startswith("made up (forecast): 1200 MiB after loading, 1355 MiB at 590 tokens, of which weights")
        assert "KV payload 130, KV copies 159" in text

    def test_parts_that_do_not_add_up_are_refused(self, forecast):
        wrong = Curve(forecast.table.assign(kv_payload_mib=1.0), kind="forecast", label="wrong")
        with pytest.raises(FigureError, match="components of 'wrong' miss used_mib by up to 128.500 MiB"):
            component_chart(wrong)

    def test_a_recording_has_none(self):
        with pytest.raises(FigureError, match="has no components .* Give a forecast"):
            component_chart(MEASURED)


class TestPoolMap:
    @pytest.fixture
    def blocks(self) -> pd.DataFrame:
        allocator = CachingAllocator()
        allocator.malloc(600, owner=1)
        allocator.malloc(30 * 2**20, owner=0)
        allocator.free(allocator.malloc(12 * 2**20, owner=0))
        return segments_table(allocator.segments(), ["weights", "kv_cache"])

    def test_segments_with_room_are_drawn_and_full_ones_counted(self, blocks):
        small, large = pool_map(blocks, tokens=9).axes
        assert small.get_title() == "small pool: 2 MiB inactive\n1 segments, 0 of them full"
        assert large.get_title() == "large pool: 12 MiB inactive\n2 segments, 1 of them full"
        assert "The large pool has 12 MiB inactive in 1 of 2 segments." in pool_map(blocks).alt_text

    def test_blocks_lie_where_they_are(self, blocks):
        small, large = pool_map(blocks).axes
        spans = {
            to_hex(bars.get_facecolor()[0]): bars.get_paths()[0].vertices[:, 0] * 2**20
            for axes in (small, large)
            for bars in axes.collections
        }
        assert (spans[COLORS["kv"]].min(), spans[COLORS["kv"]].max()) == (0, 1024)
        assert (spans["#ffffff"].min(), spans["#ffffff"].max()) == (0, 12 * 2**20)
