"""Class diagrams are legible, complete and free of empty or overlapping boxes; module trees add up."""

from itertools import combinations

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox

from glmlab.core.resources import data_path
from glmlab.figures import FigureError, class_diagram, module_tree_figure, read_figure
from glmlab.figures.structure import NODE_LOOKS, PAGE_HEIGHT_IN, PAGE_WIDTH_IN
from glmlab.structure.graph import Arrow, ClassNode, Member, Part, build_graph
from glmlab.structure.module_tree import ModuleTree


def _small():
    nodes = [
        ClassNode("Model", "m", ("nn.Module", "SaveMixin"), ("Model", "nn.Module", "SaveMixin"), (Member("run"),),
                  (Part("layers", "Layer", 28, 28), Part("head", "nn.Linear"))),
        ClassNode("nn.Module", "torch.nn", (), ("nn.Module",), (Member("run", abstract=True),), kind="torch"),
        ClassNode("SaveMixin", "m", (), ("SaveMixin",)),
        ClassNode("Layer", "m", ("nn.Module",), ("Layer", "nn.Module")),
        ClassNode("Auto", "m", (), ("Auto",), kind="auto"),
    ]  # fmt: skip
    return build_graph(nodes, ["Model"], [Arrow("builds", "Auto", "Model", "builds")])


def _saved(name):
    return read_figure(data_path("figures", f"{name}.csv").with_suffix(""))[0]


def _texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def _boxes(figure) -> list[Rectangle]:
    """Frames of classes, not the samples of the legend, which lie below them."""
    frames = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle) and patch.get_zorder() == 2]
    assert frames
    return frames


class TestClassDiagram:
    def test_every_class_member_and_arrow_is_there_in_its_look(self):
        figure = class_diagram(_small())
        texts = _texts(figure)
        for text in ("Model", "nn.Module", "SaveMixin", "Layer", "Auto", "head: nn.Linear", "layers: 28 x", "builds"):
            assert texts.count(text) == 1, text
        assert texts[texts.index("Layer") + 1] == "is an nn.Module", "where an arrow would cross everything"
        assert (texts.count("is an nn.Module"), texts.count("run()")) == (1, 2)
        italic = sorted(text.get_text() for text in figure.axes[0].texts if text.get_style() == "italic")
        assert italic == ["nn.Module", "run()"], "what is abstract; the one of Model is not"
        frames = {to_hex(frame.get_facecolor()): frame.get_linestyle() for frame in _boxes(figure)}
        assert set(frames) == {NODE_LOOKS[kind][1] for kind in ("class", "mixin", "torch", "auto")}
        assert frames[NODE_LOOKS["mixin"][1]] != frames[NODE_LOOKS["class"][1]] == "-"
        rules = [line for line in figure.axes[0].lines if line.get_zorder() == 3]
        assert len(rules) == 3, "two in Model (attribute, member), one in nn.Module, none in the others"
        assert figure.alt_text.startswith(
            "Class diagram of 5 classes. Model inherits from nn.Module, SaveMixin. Model holds Layer"
        )

    def test_long_boxes_are_cut_and_counted(self):
        node = ClassNode("A", "m", (), ("A",), tuple(Member(f"m{i}") for i in range(12)))
        texts = _texts(class_diagram(build_graph([node], ["A"]), max_lines=5))
        assert texts[1:6] == ["m0()", "m1()", "m2()", "m3()", "… 8 more"]

    @pytest.mark.parametrize("name", ["class_hierarchy", "original_hierarchy"])
    def test_the_full_picture_is_legible_on_a_page_of_a4(self, name):
        figure = _saved(name)
        width, height = figure.get_size_inches()
        assert width <= PAGE_WIDTH_IN + 1e-6
        assert height <= PAGE_HEIGHT_IN + 0.5, "the legend included"
        assert min(text.get_fontsize() for text in figure.axes[0].texts) >= 6.0

    @pytest.mark.parametrize("name", ["", "class_hierarchy", "original_hierarchy"])
    def test_nothing_overlaps_and_text_stays_in_its_frame(self, name):
        figure = _saved(name) if name else class_diagram(_small())
        figure.set_dpi(144)  # the screen's, in a notebook; hinting there widens letters more than in print
        frames = [frame.get_window_extent() for frame in _boxes(figure)]
        for index, frame in enumerate(frames):
            assert not any(frame.overlaps(other) for other in frames[index + 1 :])
        renderer = FigureCanvasAgg(figure).get_renderer()
        page = figure.bbox
        extents = {text: text.get_window_extent(renderer) for text in figure.axes[0].texts}
        for text, extent in extents.items():
            assert page.x0 <= extent.x0 < extent.x1 <= page.x1, text.get_text()
            middle = (extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2
            for frame in (frame for frame in frames if frame.contains(*middle)):
                assert frame.x0 <= extent.x0 < extent.x1 <= frame.x1, text.get_text()
        for (text, extent), (other, taken) in combinations(extents.items(), 2):
            shared = Bbox.intersection(extent, taken)
            assert shared is None or shared.height < 0.35 * extent.height, (text.get_text(), other.get_text())

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (["class", "New", "", "person", ""], "'New' is no class of a kind that can be drawn .class, mixin"),
            (["member", "New", "", "run()", ""], "'New' is no class of a kind that can be drawn"),
            (["inherits", "Model", "New", "", ""], "an arrow ends at 'New', which is no class of the table"),
        ],
    )
    def test_a_table_that_does_not_hang_together_is_refused(self, row, message):
        table = _small().to_frame()
        table.loc[len(table)] = row
        with pytest.raises(FigureError, match=message):
            class_diagram(table)

    def test_bases_that_run_in_a_circle_are_drawn(self):
        table = _small().to_frame()
        table.loc[len(table)] = ["inherits", "SaveMixin", "Model", "", ""]
        assert class_diagram(table).alt_text.startswith("Class diagram of 5 classes. Model inherits from nn.Module, S")


def test_a_module_tree_adds_up():
    columns = ("module", "label", "level", "class", "count", "parameters", "own_parameters", "bytes", "own_bytes",
               "output_shape")  # fmt: skip
    rows = (
        ("", "Model", 0, "Model", 1, 100, 0, 400, 0, "1 × 1 × 64"),
        ("layers.0-2", "layers.0-2: 3 x Layer", 1, "Layer", 3, 75, 75, 300, 300, "1 × 1 × 8"),
        ("head", "head: Linear", 1, "Linear", 1, 25, 25, 100, 100, ""),
    )
    figure = module_tree_figure(ModuleTree("made up", pd.DataFrame(rows, columns=columns)))
    shown = {"Model", "layers.0-2: 3 x Layer", "head: Linear", "100.0%", "75.0%", "25.0%", "1 × 1 × 64"}
    assert shown <= set(_texts(figure))
    bars = [bar for container in figure.axes[0].containers for bar in container]
    light, dark = bars[0::2], bars[1::2]
    assert sum(bar.get_width() for bar in dark) == pytest.approx(light[0].get_width())
    assert [bar.get_width() / light[0].get_width() for bar in light] == pytest.approx([1, 0.75, 0.25])
    words = "Module tree of made up: 100 parameters in 400 B. The largest share of bytes, 75%, is in layers.0-2."
    assert figure.alt_text == words
