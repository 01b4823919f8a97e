"""Memory in pictures: drawn by kind, components add up, the map of the pools shows every block."""

from base64 import b64decode

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from glmlab.allocator.caching import CachingAllocator
from glmlab.core.curve import COMPONENTS, Curve
from glmlab.figures import (
    COLORS,
    FigureError,
    component_chart,
    curves_table,
    memory_curve,
    pool_map,
    segments_table,
)
from glmlab.figures.memory import COMPONENT_LOOKS


def _curve(kind="measured", label="a curve", **columns) -> Curve:
    table = {"step": [0, 1, 2], "turn": [0, 1, 2], "context_tokens": [0, 500, 1000], "used_mib": [4700.0, 4710, 4730]}
    return Curve(pd.DataFrame({**table, **columns}), kind=kind, label=label)


MEASURED = _curve(label="model, int4", kv_mib=[0.0, 13.7, 27.3])
WITHOUT_MEMORY = Curve(MEASURED.table.drop(columns="used_mib"), label="x")


def _texts(axes) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in axes.texts]


class TestMemoryCurve:
    def test_measured_is_dots_forecast_a_line_reported_hollow(self):
        curves = [_curve("forecast", "model, code"), _curve("reported", "model, a book"), MEASURED]
        above, below = memory_curve(curves).axes
        forecast, reported = above.get_lines()
        looks = forecast.get_marker(), forecast.get_linestyle(), forecast.get_drawstyle()
        assert looks == ("None", "-", "steps-post")
        assert (reported.get_linestyle(), to_hex(reported.get_markerfacecolor())) == ("None", "#ffffff")
        assert _texts(above) == ["code (forecast)", "a book (reported)"]
        assert above.get_title("left") == "model", "what they share is said once"
        assert below.get_lines()[0].get_marker() == "s"

    def test_growth_starts_at_zero_and_the_payload_is_exact(self):
        (axes,) = memory_curve([MEASURED]).axes
        memory, payload = axes.get_lines()
        assert memory.get_ydata().tolist() == [0, 10, 30]
        assert payload.get_ydata().tolist() == [0.0, 13.7, 27.3]
        assert to_hex(payload.get_color()) == COLORS["kv"]
        assert _texts(axes) == ["measured: 4,700 to 4,730 MiB", "KV payload (exact)"]

    def test_payloads_of_equal_forecasts_are_named_once(self):
        curves = [_curve("forecast", f"model, {name}", kv_payload_mib=[0.0, 14.0, 28.0]) for name in ("fp16", "int8")]
        assert sum("payload" in text for text in _texts(memory_curve(curves).axes[0])) == 1

    def test_a_notebook_shows_it_with_words_for_those_who_do_not_see_it(self):
        data, metadata = memory_curve([MEASURED])._repr_mimebundle_()
        assert b64decode(data["image/png"]).startswith(b"\x89PNG")
        assert metadata["image/png"]["alt"] == data["text/plain"]
        assert data["text/plain"].endswith("model, int4 (measured): 4700 MiB at first, 4730 MiB at 1000 tokens.")

    def test_a_forecast_keeps_the_steps_between_which_nothing_changes_to_itself(self):
        used = np.repeat([10.0, 12.0, 12.5, 20.0], [500, 300, 1, 200])
        steps = np.arange(len(used))
        columns = {"step": steps, "turn": 1, "context_tokens": steps, "used_mib": used}
        table = curves_table([Curve(pd.DataFrame(columns), kind="forecast")])
        assert len(table) < 15
        last = np.searchsorted(table["context_tokens"], steps, side="right") - 1
        assert table["used_mib"].to_numpy()[last].tolist() == used.tolist(), "the same steps"

    def test_memory_falls_back_to_the_process(self):
        (axes,) = memory_curve(
            [Curve(MEASURED.table.assign(used_mib=float("nan"), rss_mib=[600.0, 601, 602]), label="x")]
        ).axes
        assert axes.get_lines()[0].get_ydata().tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        ("curves", "message"),
        [
            ([], "no curve to draw"),
            ([WITHOUT_MEMORY], "curve 'x' has no used_mib nor rss_mib, only step, "),
            ([Curve(MEASURED.table.rename(columns={"context_tokens": "context_characters"}))], "has no context_tokens"),
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
        above, below = component_chart(forecast, marks="300: here").axes
        (used,) = above.get_lines()
        tops = [area.get_paths()[0].vertices[:, 1].max() for area in above.collections]
        assert len(tops) == len(COMPONENT_LOOKS)
        assert max(tops) == used.get_ydata()[-1] == forecast.table["used_mib"].iloc[-1]
        total = below.get_lines()[0]
        assert (to_hex(total.get_color()), total.get_ydata()[0]) == (COLORS["used"], 0)
        assert [line.get_xdata()[0] for line in below.get_lines()[-3:]] == [200, 400, 300], "two turns, a mark"
        assert "300: here" in _texts(below)
        assert {"KV payload", "inactive, small pool", "used (forecast)"} <= set(_texts(above)) & set(_texts(below))

    def test_it_says_itself_in_words(self, forecast):
        text = component_chart(forecast).alt_text
        assert text.startswith("made up (forecast): 1200 MiB after loading, 1355 MiB at 590 tokens, of which weights")
        assert "KV payload 130, KV copies 159" in text

    @pytest.mark.parametrize(
        ("data", "arguments", "message"),
        [
            ("wrong", {}, "components of 'wrong' miss used_mib by up to 128.500 MiB"),
            ("measured", {}, "has no components .* Give a forecast"),
            ("forecast", {"marks": "here"}, "the mark 'here' is not 'tokens: words'"),
        ],
    )
    def test_what_cannot_be_drawn_is_refused(self, forecast, data, arguments, message):
        wrong = Curve(forecast.table.assign(kv_payload_mib=1.0), kind="forecast", label="wrong")
        with pytest.raises(FigureError, match=message):
            component_chart({"wrong": wrong, "measured": MEASURED, "forecast": forecast}[data], **arguments)


def test_the_map_of_the_pools_shows_where_blocks_lie():
    allocator = CachingAllocator()
    allocator.malloc(600, owner=1)
    allocator.malloc(30 * 2**20, owner=0)
    before = segments_table(allocator.segments(), ["weights", "kv_cache"], tokens=9)
    allocator.free(allocator.malloc(12 * 2**20, owner=0))
    after = segments_table(allocator.segments(), ["weights", "kv_cache"], tokens=10)
    figure = pool_map(pd.concat([before, after]))
    small, _, large_before, large = figure.axes
    assert small.get_title() == "9 tokens, small pool:\n2 MiB inactive"
    assert large.get_title() == "10 tokens, large pool:\n12 MiB inactive"
    assert "At 10 tokens, large pool: 12 MiB inactive in 1 of 2 segments." in figure.alt_text
    assert not large_before.collections, "a segment that is always full has no row"
    assert large_before.get_xlim() == large.get_xlim(), "one scale"
    spans = {
        to_hex(bars.get_facecolor()[0]): bars.get_paths()[0].vertices[:, 0] * 2**20
        for axes in (small, large)
        for bars in axes.collections
    }
    assert (spans[COLORS["kv"]].min(), spans[COLORS["kv"]].max()) == (0, 1024)
    assert (spans["#ffffff"].min(), spans["#ffffff"].max()) == (0, 12 * 2**20)
