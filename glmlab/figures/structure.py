"""Class diagrams. Graphviz (inside pygraphviz) places the boxes, matplotlib draws them.

The size of every box is measured with the font that it is drawn in, so that text and frame agree in every format.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch, Polygon, Rectangle
from matplotlib.path import Path
from matplotlib.textpath import text_to_path

from glmlab.figures.settings import FigureError, current_settings, pt, tr
from glmlab.figures.style import STYLE, SuiteFigure, drawing, set_size
from glmlab.structure.graph import Arrow, ClassGraph, ClassNode

PAGE_WIDTH_IN = 7.1
"""Text width of an A4 page with narrow margins; no diagram is wider."""

PAGE_HEIGHT_IN = 9.8
"""Text height of the same page, without the legend."""

NODE_COLORS = {"class": "#ffffff", "mixin": "#fdf3d8", "torch": "#e4f1fa", "auto": "#e3f4ec", "outside": "#f2f2f2"}
NODE_EDGES = {"class": "#333333", "mixin": "#b26b00", "torch": "#0072b2", "auto": "#00805c", "outside": "#8c8c8c"}
_NODE_LINES = {"class": "-", "mixin": (0, (4, 2)), "torch": "-", "auto": "-", "outside": (0, (1, 1.5))}
_KIND_NAMES = {
    "class": "class",
    "mixin": "mixin",
    "torch": "PyTorch",
    "auto": "Auto side",
    "outside": "known by name only",
}
_ARROW_COLORS = {"inherits": "#333333", "has": "#333333", "builds": "#00805c"}
_ARROW_NAMES = {"inherits": "inherits from", "has": "holds", "builds": "leads to the class that is built"}

_TITLE_PT, _TEXT_PT, _LABEL_PT = 8.0, 7.4, 7.4
_LINE = 1.28  # height of a line, in font sizes
_PAD_PT = 4.0
_LEGEND_PT = 16.0
_ROWS = [(bases, parts) for parts in (1, 2, 3) for bases in (1, 2, 3)]  # layouts that are tried, the plainest first
_LEAST_READABLE = _TEXT_PT / 6.0  # how many times smaller a diagram may be drawn for letters of 6 pt
_POINTS = 72.0


@dataclass(frozen=True)
class _Line:
    text: str
    size_pt: float
    bold: bool = False
    italic: bool = False
    centred: bool = False

    @property
    def font(self) -> FontProperties:
        return FontProperties(
            family=STYLE["font.family"],
            size=self.size_pt,
            weight="bold" if self.bold else "normal",
            style="italic" if self.italic else "normal",
        )

    @property
    def width_pt(self) -> float:
        width, _, _ = text_to_path.get_text_width_height_descent(self.text, self.font, ismath=False)
        return float(width) * 1.05  # a screen's hinting widens some letters

    @property
    def height_pt(self) -> float:
        return self.size_pt * _LINE


@dataclass(frozen=True)
class _Box:
    """A class as compartments of lines; there are no empty compartments."""

    node: ClassNode
    compartments: tuple[tuple[_Line, ...], ...]

    @property
    def width_pt(self) -> float:
        return max(line.width_pt for lines in self.compartments for line in lines) + 2 * _PAD_PT

    @property
    def height_pt(self) -> float:
        lines = sum(line.height_pt for compartment in self.compartments for line in compartment)
        return lines + len(self.compartments) * _PAD_PT


def class_diagram(graph: ClassGraph, *, max_lines: int = 8) -> SuiteFigure:
    """Draw a class graph in the manner of UML.

    Mixins have a broken frame, classes of PyTorch a blue one, the Auto side a green one; abstract members and members
    that are overridden in the picture are in italics. A class that inherits from nn.Module and is no ancestor of the
    roots says so under its name, instead of by an arrow through the whole picture.

    Args:
        graph: what to draw; filter it with :meth:`ClassGraph.select`.
        max_lines: most attributes and most members in one box; the rest is counted.

    Returns:
        A figure as large as the diagram: at most as wide as a page, or as the width that is set (``figure_settings``),
        in which it is drawn smaller, down to letters of 6 pt. A diagram whose letters would be smaller stays wider than
        that width.

    Raises:
        FigureError: no class is visible.

    Example:
        >>> from glmlab.structure.graph import build_graph
        >>> figure = class_diagram(build_graph([ClassNode("A", "m", (), ("A",))], roots=["A"]))
        >>> [text.get_text() for text in figure.axes[0].texts][0]
        'A'
    """
    if not graph.nodes:
        raise FigureError("no class to draw: every one is hidden. Select with a larger depth or another pattern.")
    arrows = _drawn_arrows(graph)
    boxes = {node.name: _box(graph, node, max_lines) for node in graph.nodes}
    layout, reduction = _readable_layout(boxes, arrows, current_settings().layout_width_in(PAGE_WIDTH_IN))
    left, bottom, right, top = _bounds(layout)
    legend = _legend_entries(graph, arrows)
    natural_width = max(right - left, 60.0) + 2 * _PAD_PT
    scale = 1 / reduction
    rows = _legend_rows(legend, natural_width * scale)
    height = (top - bottom + 2 * _PAD_PT) * scale + len(rows) * _LEGEND_PT
    with drawing(PAGE_WIDTH_IN, 1, layout=None) as figure:
        set_size(figure, natural_width * scale / _POINTS, height / _POINTS)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(left - _PAD_PT, left - _PAD_PT + natural_width)
        axes.set_ylim(bottom - _PAD_PT - len(rows) * _LEGEND_PT / scale, top + _PAD_PT)
        for name, box in boxes.items():
            _draw_box(axes, box, layout.get_node(name).attr["pos"], scale)
        for index, arrow in enumerate(arrows):
            _draw_arrow(axes, arrow, layout.get_edge(*_ends(arrow), key=str(index)), scale)
        _draw_legend(axes, rows, left, bottom - _PAD_PT, scale)
    figure.alt_text = _in_words(graph, arrows)
    return figure


def _drawn_arrows(graph: ClassGraph) -> list[Arrow]:
    """Arrows of the picture: several attributes of one class share an arrow; nn.Module is written, not pointed at."""
    merged: dict[tuple[str, str, str], list[str]] = {}
    for arrow in graph.arrows:
        if not _written_base(graph, arrow):
            merged.setdefault((arrow.kind, arrow.source, arrow.target), []).append(arrow.label)
    return [
        Arrow(kind, source, target, "\n".join(label for label in labels if label))  # type: ignore[arg-type]
        for (kind, source, target), labels in merged.items()
    ]


def _written_base(graph: ClassGraph, arrow: Arrow) -> bool:
    lineage = {name for root in graph.roots for name in graph.classes[root].mro}
    return arrow.kind == "inherits" and arrow.target == "nn.Module" and arrow.source not in lineage


def _box(graph: ClassGraph, node: ClassNode, max_lines: int) -> _Box:
    title = [_Line(node.name, _TITLE_PT, bold=True, italic=node.abstract, centred=True)]
    if any(_written_base(graph, arrow) for arrow in graph.arrows if arrow.source == node.name):
        title.append(_Line(tr("is an nn.Module"), _LABEL_PT, centred=True))
    overridden = {(member.overrides, member.name) for other in graph.nodes for member in graph.shown_members(other)}
    attributes = [_Line(part.label, _TEXT_PT) for part in graph.shown_parts(node)]
    members = [
        _Line(member.label, _TEXT_PT, italic=member.abstract or (node.name, member.name) in overridden)
        for member in graph.shown_members(node)
    ]
    compartments = [title, *(_cut(lines, max_lines) for lines in (attributes, members) if lines)]
    return _Box(node, tuple(tuple(lines) for lines in compartments))


def _cut(lines: list[_Line], max_lines: int) -> list[_Line]:
    if len(lines) <= max_lines:
        return lines
    return [*lines[: max_lines - 1], _Line(tr("… {count} more", count=len(lines) - max_lines + 1), _TEXT_PT)]


def _ends(arrow: Arrow) -> tuple[str, str]:
    """Lower and upper end: bases above, parts below what holds them, what is built below what leads to it."""
    return (arrow.source, arrow.target) if arrow.kind == "inherits" else ((arrow.target, arrow.source))


def _bounds(layout: Any) -> tuple[float, float, float, float]:
    left, bottom, right, top = (float(value) for value in layout.graph_attr["bb"].split(","))
    return left, bottom, right, top


def _reduction(layout: Any, width_in: float) -> float:
    """How many times smaller the layout must be drawn to fit a page; 1 where it fits."""
    left, bottom, right, top = _bounds(layout)
    width, height = right - left + 2 * _PAD_PT, top - bottom + 2 * _PAD_PT
    return max(1.0, width / (width_in * _POINTS), height / (PAGE_HEIGHT_IN * _POINTS))


def _readable_layout(boxes: dict[str, _Box], arrows: Sequence[Arrow], width_in: float) -> tuple[Any, float]:
    """Try layouts until the text prints readably; if it never does, the one in which it prints largest.

    Returns:
        The layout, and how many times smaller it is drawn: more than is readable only where a page has no more room.
    """
    layout = _largest_layout(boxes, arrows, width_in)
    reduction = _reduction(layout, width_in)
    if reduction <= _LEAST_READABLE or width_in >= PAGE_WIDTH_IN:
        return layout, reduction
    layout = _largest_layout(boxes, arrows, PAGE_WIDTH_IN)
    return layout, max(_LEAST_READABLE, _reduction(layout, PAGE_WIDTH_IN))


def _largest_layout(boxes: dict[str, _Box], arrows: Sequence[Arrow], width_in: float) -> Any:
    """The first layout that prints readably at a width, or the one that prints largest."""
    best: Any = None
    for rows_of_bases, rows_of_parts in _ROWS:
        layout = _layout(boxes, arrows, rows_of_bases, rows_of_parts)
        if best is None or _reduction(layout, width_in) < _reduction(best, width_in):
            best = layout
        if _reduction(best, width_in) <= _LEAST_READABLE:
            break
    return best


def _layout(boxes: dict[str, _Box], arrows: Sequence[Arrow], rows_of_bases: int, rows_of_parts: int) -> Any:
    """Place the boxes; bases without bases, and parts, take turns in rows: a single row of mixins is too wide."""
    from pygraphviz import AGraph

    inheriting = {arrow.source for arrow in arrows if arrow.kind == "inherits"}
    turns: Counter[tuple[str, str]] = Counter()

    layout = AGraph(directed=True, strict=False)
    layout.graph_attr.update(rankdir="BT", nodesep="0.1", ranksep="0.28", splines="true")
    for name, box in boxes.items():
        layout.add_node(
            name,
            label="",
            shape="box",
            fixedsize="true",
            width=f"{box.width_pt / _POINTS:.4f}",
            height=f"{box.height_pt / _POINTS:.4f}",
        )
    for index, arrow in enumerate(arrows):
        lines = [_Line(text, _LABEL_PT) for text in arrow.label.split("\n") if text]
        label = ""
        if lines:
            width, height = max(line.width_pt for line in lines) + 4, sum(line.height_pt for line in lines) + 2
            label = (
                f'<<TABLE BORDER="0" CELLBORDER="0" CELLPADDING="0" FIXEDSIZE="TRUE" WIDTH="{width:.0f}" '
                f'HEIGHT="{height:.0f}"><TR><TD></TD></TR></TABLE>>'
            )
        minlen = 1
        if arrow.kind == "has" or (arrow.kind == "inherits" and arrow.target not in inheriting):
            minlen += turns[arrow.kind, arrow.source] % (rows_of_parts if arrow.kind == "has" else rows_of_bases)
            turns[arrow.kind, arrow.source] += 1
        layout.add_edge(*_ends(arrow), key=str(index), label=label, arrowhead="none", minlen=str(minlen))
    layout.layout("dot")
    return layout


def _draw_box(axes: Axes, box: _Box, position: str, scale: float) -> None:
    x, y = (float(value) for value in position.split(","))
    left, top = x - box.width_pt / 2, y + box.height_pt / 2
    kind = box.node.kind
    frame: dict[str, Any] = {"edgecolor": NODE_EDGES[kind], "linewidth": pt(0.9 * scale)}
    axes.add_patch(
        Rectangle(
            (left, top - box.height_pt),
            box.width_pt,
            box.height_pt,
            facecolor=NODE_COLORS[kind],
            linestyle=_NODE_LINES[kind],
            zorder=2,
            **frame,
        )
    )
    for index, lines in enumerate(box.compartments):
        if index:
            axes.plot(
                [left, left + box.width_pt], [top, top], color=frame["edgecolor"], linewidth=pt(0.6 * scale), zorder=3
            )
        top -= _PAD_PT / 2
        for line in lines:
            _write(axes, line, x if line.centred else left + _PAD_PT, top - line.height_pt / 2, scale)
            top -= line.height_pt
        top -= _PAD_PT / 2


def _write(axes: Axes, line: _Line, x: float, y: float, scale: float, color: str = "#000000") -> None:
    font = line.font
    font.set_size(pt(line.size_pt * scale))
    axes.text(
        x, y, line.text, fontproperties=font, color=color, zorder=4,
        horizontalalignment="center" if line.centred else "left", verticalalignment="center_baseline",
        parse_math=False,
    )  # fmt: skip


def _draw_arrow(axes: Axes, arrow: Arrow, edge: Any, scale: float) -> None:
    """The spline of Graphviz; at its upper end the triangle of inheritance or the diamond of holding."""
    points = [tuple(float(value) for value in pair.split(",")) for pair in edge.attr["pos"].split()]
    color = _ARROW_COLORS[arrow.kind]
    style = (0, (3, 2)) if arrow.kind == "builds" or arrow.label.startswith("via ") else "-"
    axes.add_patch(
        PathPatch(
            Path(points, [Path.MOVETO, *[Path.CURVE4] * (len(points) - 1)]),
            facecolor="none",
            edgecolor=color,
            linewidth=pt(0.8 * scale),
            linestyle=style,
            zorder=1,
        )
    )
    if arrow.kind == "builds":
        _draw_head(axes, points[0], points[1], "open", color, scale)
    else:
        _draw_head(axes, points[-1], points[-2], arrow.kind, color, scale)
    if arrow.label:
        x, y = (float(value) for value in edge.attr["lp"].split(","))
        lines = [_Line(text, _LABEL_PT, centred=True) for text in arrow.label.split("\n")]
        top = y + sum(line.height_pt for line in lines) / 2
        for line in lines:
            _write(axes, line, x, top - line.height_pt / 2, scale, color)
            top -= line.height_pt


def _draw_head(
    axes: Axes, tip: tuple[float, ...], towards: tuple[float, ...], head: str, color: str, scale: float
) -> None:
    dx, dy = towards[0] - tip[0], towards[1] - tip[1]
    length = (dx * dx + dy * dy) ** 0.5 or 1.0
    ux, uy = dx / length, dy / length
    side = 3.2
    outline = {
        "inherits": [(0, 0), (8, side), (8, -side)],
        "has": [(0, 0), (5, side), (10, 0), (5, -side)],
        "open": [(6, side), (0, 0), (6, -side)],
    }[head]
    corners = [(tip[0] + along * ux - across * uy, tip[1] + along * uy + across * ux) for along, across in outline]
    axes.add_patch(
        Polygon(
            corners,
            closed=head != "open",
            facecolor={"inherits": "#ffffff", "has": color, "open": "none"}[head],
            edgecolor=color,
            linewidth=pt(0.8 * scale),
            zorder=3,
        )
    )


@dataclass(frozen=True)
class _Entry:
    sample: str
    text: str

    @property
    def width_pt(self) -> float:
        return 30 + _Line(self.text, _LABEL_PT).width_pt


def _legend_entries(graph: ClassGraph, arrows: Iterable[Arrow]) -> list[_Entry]:
    kinds = {node.kind for node in graph.nodes}
    relations = {arrow.kind for arrow in arrows}
    return [_Entry(kind, tr(text)) for kind, text in _KIND_NAMES.items() if kind in kinds] + [
        _Entry(kind, tr(text)) for kind, text in _ARROW_NAMES.items() if kind in relations
    ]


def _legend_rows(entries: Iterable[_Entry], width_pt: float) -> list[list[_Entry]]:
    rows: list[list[_Entry]] = [[]]
    for entry in entries:
        if rows[-1] and sum(other.width_pt for other in rows[-1]) + entry.width_pt > width_pt:
            rows.append([])
        rows[-1].append(entry)
    return rows


def _draw_legend(axes: Axes, rows: list[list[_Entry]], left: float, top: float, scale: float) -> None:
    """Samples of what occurs, in the printed size whatever the scale of the diagram."""
    for index, row in enumerate(rows):
        x, y = left, top - (index + 0.5) * _LEGEND_PT / scale
        for entry in row:
            x_end = x + 18 / scale
            if entry.sample in NODE_COLORS:
                axes.add_patch(
                    Rectangle(
                        (x, y - 4 / scale), 18 / scale, 8 / scale, facecolor=NODE_COLORS[entry.sample],
                        edgecolor=NODE_EDGES[entry.sample], linestyle=_NODE_LINES[entry.sample], linewidth=pt(0.9),
                    )
                )  # fmt: skip
            else:
                color = _ARROW_COLORS[entry.sample]
                style = (0, (3, 2)) if entry.sample == "builds" else "-"
                axes.plot([x, x_end], [y, y], color=color, linewidth=pt(0.8), linestyle=style, zorder=1)
                if entry.sample == "has":
                    _draw_head(axes, (x, y), (x_end, y), "has", color, 1)
                else:
                    head = "open" if entry.sample == "builds" else "inherits"
                    _draw_head(axes, (x_end, y), (x, y), head, color, 1)
            _write(axes, _Line(entry.text, _LABEL_PT / scale), x_end + 4 / scale, y, scale)
            x += entry.width_pt / scale


def _in_words(graph: ClassGraph, arrows: Iterable[Arrow]) -> str:
    by_kind = {kind: [arrow for arrow in arrows if arrow.kind == kind] for kind in _ARROW_NAMES}
    lineage = graph.classes[graph.roots[0]].mro
    held = ", ".join(tr("{whole} holds {part}", whole=arrow.source, part=arrow.target) for arrow in by_kind["has"])
    return tr(
        "Class diagram of {count} classes. {root} inherits from {bases}. {held}",
        count=len(graph.nodes), root=lineage[0], held=held,
        bases=", ".join(name for name in lineage[1:] if name not in graph.hidden) or tr("nothing"),
    ).strip()  # fmt: skip
