"""Figures are pure functions of data, drawn by kind, and saved with what they show."""

import json
from base64 import b64decode
from itertools import pairwise

import pandas as pd
import pytest
from matplotlib.colors import to_hex

from glmlab.core.curve import Curve, read_curve
from glmlab.core.resources import data_path
from glmlab.figures import (
    COLORS,
    FigureError,
    curves_table,
    figure_settings,
    memory_column,
    memory_curve,
    save_figure,
)


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
        assert (forecast.get_marker(), forecast.get_linestyle(), forecast.get_drawstyle()) == (
            "None",
            "-",
            "steps-post",
        )
        assert (reported.get_linestyle(), to_hex(reported.get_markerfacecolor())) == ("None", "#ffffff")
        assert "a book, GPU memory used (reported)" not in _lines(above)

    def test_growth_starts_at_zero_and_the_payload_is_exact(self):
        _, below = memory_curve([MEASURED]).axes
        lines = _lines(below)
        assert lines["a curve, GPU memory used (measured)"].get_ydata().tolist() == [0, 10, 30]
        payload = lines["a curve, KV payload (exact)"]
        assert payload.get_ydata().tolist() == [0.0, 13.7, 27.3]
        assert to_hex(payload.get_color()) == COLORS["kv"]

    def test_characters_are_placed_among_tokens(self):
        _, below = memory_curve([MEASURED, REPORTED]).axes
        assert _lines(below)["a book, GPU memory used (reported)"].get_xdata().tolist() == [0, 750]

    def test_characters_are_on_the_upper_axis(self):
        above, _ = memory_curve([MEASURED]).axes
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
        for one, other in pairwise(boxes):
            assert other.x0 - one.x1 > 5

    def test_a_notebook_shows_it_with_words_for_those_who_do_not_see_it(self):
        data, metadata = memory_curve([MEASURED, REPORTED])._repr_mimebundle_()
        assert b64decode(data["image/png"]).startswith(b"\x89PNG")
        assert metadata["image/png"]["alt"] == data["text/plain"]
        assert data["text/plain"].endswith(
            "a curve (measured): 4700 MiB at first, 4730 MiB at 1000 tokens. "
            "a book (reported): 4700 MiB at first, 4800 MiB at 1250 characters."
        )

    def test_nothing_to_draw_is_refused(self):
        with pytest.raises(FigureError, match="no curve to draw"):
            memory_curve([])

    def test_characters_without_a_ruler_are_refused(self):
        with pytest.raises(FigureError, match="counts characters only, and no other counts both"):
            memory_curve([REPORTED])

    def test_memory_falls_back_to_the_process_by_name(self):
        table = MEASURED.table.drop(columns="used_mib").assign(rss_mib=[600.0, 601, 602])
        assert memory_column(Curve(table)) == "rss_mib"
        with pytest.raises(FigureError, match="has neither used_mib nor rss_mib, only kv_mib"):
            memory_column(Curve(table.drop(columns="rss_mib")))


class TestSaving:
    def save(self, folder, monkeypatch=None, **arguments):
        return save_figure(
            memory_curve([MEASURED]), folder / "figures" / "memory",
            data=curves_table([MEASURED]), provenance={"gpu": "none"}, **arguments,
        )  # fmt: skip

    def test_every_format_with_data_and_provenance(self, tmp_path):
        written = self.save(tmp_path)
        assert [path.name for path in written] == [f"memory.{end}" for end in ("pdf", "svg", "png", "csv", "json")]
        pdf, svg, png, data, provenance = written
        assert pdf.read_bytes().startswith(b"%PDF")
        assert svg.read_text().startswith("<?xml")
        assert png.read_bytes().startswith(b"\x89PNG")
        assert pd.read_csv(data)["used_mib"].tolist() == [4700, 4710, 4730]
        assert json.loads(provenance.read_text()) == {"gpu": "none"}

    def test_fonts_are_embedded_as_truetype(self, tmp_path):
        pdf = self.save(tmp_path)[0].read_bytes()
        assert b"/FontFile2" in pdf
        assert b"/Type3" not in pdf

    @pytest.mark.parametrize("epoch", [None, "1700000000"])
    def test_equal_figures_give_equal_bytes(self, tmp_path, monkeypatch, epoch):
        monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
        if epoch:
            monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
        one, two = self.save(tmp_path / "one"), self.save(tmp_path / "two")
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]

    def test_unknown_format_is_refused(self, tmp_path):
        with pytest.raises(FigureError, match="format 'bmp' is not known. Use pdf, svg, png"):
            self.save(tmp_path, formats=["bmp"])

    def test_a_folder_that_cannot_be_made_is_said(self, tmp_path):
        (tmp_path / "figures").write_text("a file in the way")
        with pytest.raises(FigureError, match="figures cannot be made .* Choose another folder"):
            self.save(tmp_path)
