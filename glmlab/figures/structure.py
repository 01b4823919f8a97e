"""Class diagrams and module trees.

Graphviz (inside pygraphviz) places the boxes of a class diagram, matplotlib draws them: Graphviz's own PDF and SVG take
their fonts from the machine, so the bundled Chinese font is not in them, date every PDF with the second and have no
alternative text. Every box is measured in the font that it is drawn in, so text and frame agree in every format.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch, Polygon, Rectangle
from matplotlib.path import Path
from matplotlib.textpath import text_to_path

from glmlab.core.units import format_bytes
from glmlab.figures.labels import msg, tr
from glmlab.figures.saving import Arguments, draws
from glmlab.figures.style import (
    COLORS,
    STYLE,
    FigureError,
    Look,
    SuiteFigure,
    current_settings,
    drawing,
    pt,
    set_size,
    sheet,
    text_width_in,
    wrapped,
)
from glmlab.structure.graph import Arrow, ClassGraph

if TYPE_CHECKING:
    from glmlab.structure.module_tree import ModuleTree

PAGE_WIDTH_IN = 7.1
"""Text width of an A4 page with narrow margins; no diagram is wider."""

PAGE_HEIGHT_IN = 9.8
"""Text height of the same page, without the legend."""

NODE_LOOKS: dict[str, tuple[str, str, str, Any]] = {  # kind of class -> name, colour, frame, line of the frame
    "class": (msg("class"), "#ffffff", "#333333", "-"),
    "mixin": (msg("mixin"), "#fdf3d8", "#b26b00", (0, (4, 2))),
    "torch": (msg("PyTorch"), "#e4f1fa", "#0072b2", "-"),
    "auto": (msg("Auto side"), "#e3f4ec", "#00805c", "-"),
    "config": (msg("config side"), "#f6ecf8", "#7b3294", "-"),
    "suite": (msg("this suite's own"), "#fbe3da", "#b03a00", "-"),
    "outside": (msg("known by name only"), "#f2f2f2", "#8c8c8c", (0, (1, 1.5))),
}
_ARROW_LOOKS: dict[str, tuple[str, str, list[tuple[float, float]], str]] = {  # row -> name, colour, head, its filling
    "inherits": (msg("inherits from"), "#333333", [(0, 0), (8, 3.2), (8, -3.2)], "#ffffff"),
    "has": (msg("holds"), "#333333", [(0, 0), (5, 3.2), (10, 0), (5, -3.2)], "#333333"),
    "builds": (msg("leads to the class that is built"), "#00805c", [(6, 3.2), (0, 0), (6, -3.2)], "none"),
}
_DASHED = (0, (3, 2))
_TITLE_PT, _TEXT_PT, _LINE = 8.0, 7.4, 1.28  # a line is 1.28 font sizes high
_PAD_PT, _LEGEND_PT = 4.0, 16.0
_ROWS = [(bases, parts) for parts in (1, 2, 3) for bases in (1, 2, 3)]  # layouts that are tried, the plainest first
_LEAST_READABLE = _TEXT_PT / 6.0  # how many times smaller a diagram may be drawn for letters of 6 pt
_POINTS = 72.0


@dataclass(frozen=True)
class _Line:
    text: str
    size_pt: float = _TEXT_PT
    bold: bool = False
    italic: bool = False
    centred: bool = False

    @property
    def font(self) -> FontProperties:
        look: Look = {"weight": "bold" if self.bold else "normal", "style": "italic" if self.italic else "normal"}
        return FontProperties(family=STYLE["font.family"], size=self.size_pt, **look)

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

    kind: str
    compartments: list[list[_Line]]

    @property
    def width_pt(self) -> float:
        return max(line.width_pt for lines in self.compartments for line in lines) + 2 * _PAD_PT

    @property
    def height_pt(self) -> float:
        return sum(line.height_pt for lines in self.compartments for line in lines) + len(self.compartments) * _PAD_PT


def _from_graph(graph: ClassGraph | pd.DataFrame) -> tuple[pd.DataFrame, Arguments]:
    return (graph if isinstance(graph, pd.DataFrame) else graph.to_frame()), {}


@draws(
    {"row": str, "source": str, "target": str, "label": str, "note": str},
    empty="no class to draw: every one is hidden. Select with a larger depth or another pattern.",
    convert=_from_graph,
)
def class_diagram(table: pd.DataFrame, *, max_lines: int = 8) -> SuiteFigure:
    """Draw a class graph in the manner of UML.

    Mixins have a broken frame, classes of PyTorch a blue one, the Auto side a green one; abstract members and members
    that are overridden in the picture are in italics. A class that inherits from nn.Module and is no ancestor of the
    roots says so under its name, instead of by an arrow through the whole picture.

    The figure is at most as wide as a page. At a smaller width it is drawn smaller, down to letters of 6 pt; a diagram
    whose letters would be smaller stays wider.

    Args:
        table: a ClassGraph, filtered with :meth:`ClassGraph.select`, or its ``to_frame()``.
        max_lines: most attributes and most members in one box; the rest is counted.

    Example:
        >>> from glmlab.structure.graph import ClassNode, build_graph
        >>> figure = class_diagram(build_graph([ClassNode("A", "m", (), ("A",))], roots=["A"]))
        >>> [text.get_text() for text in figure.axes[0].texts][0]
        'A'
    """
    lineage = _lineage(table)
    written = (table["row"] == "inherits") & (table["target"] == "nn.Module") & ~table["source"].isin(lineage)
    boxes = _boxes(table, set(table.loc[written, "source"]), max_lines)
    arrows = _arrows(table[~written], boxes)
    layout, reduction = _readable_layout(boxes, arrows, current_settings().layout_width_in(PAGE_WIDTH_IN))
    left, bottom, right, top = _bounds(layout)
    width, scale = max(right - left, 60.0) + 2 * _PAD_PT, 1 / reduction
    legend = _legend_rows(boxes, arrows, width * scale)
    height = (top - bottom + 2 * _PAD_PT) * scale + len(legend) * _LEGEND_PT
    with drawing(PAGE_WIDTH_IN, 1, layout=None) as figure:
        set_size(figure, width * scale / _POINTS, height / _POINTS)
        axes = sheet(figure)
        axes.set_xlim(left - _PAD_PT, left - _PAD_PT + width)
        axes.set_ylim(bottom - _PAD_PT - len(legend) * _LEGEND_PT / scale, top + _PAD_PT)
        for name, box in boxes.items():
            _draw_box(axes, box, layout.get_node(name).attr["pos"], scale)
        for index, arrow in enumerate(arrows):
            _draw_arrow(axes, arrow, layout.get_edge(*_ends(arrow), key=str(index)), scale)
        for index, row in enumerate(legend):
            _draw_legend_row(axes, row, left, bottom - _PAD_PT - (index + 0.5) * _LEGEND_PT / scale, scale)
    has = [arrow for arrow in arrows if arrow.kind == "has"]
    held = ", ".join(tr("{whole} holds {part}", whole=arrow.source, part=arrow.target) for arrow in has)
    root, *bases = lineage or list(boxes)[:1]
    figure.alt_text = tr(
        "Class diagram of {count} classes. {root} inherits from {bases}. {held}",
        count=len(boxes), root=root, bases=", ".join(bases) or tr("nothing"), held=held,
    ).strip()  # fmt: skip
    figure.caption = tr(
        "{root} is what it inherits and what it holds. Hollow arrows point to what is inherited, filled diamonds "
        "stand at the class that holds the other, dashed arrows lead to the class that is built. Members in italics"
        " are abstract or overridden in the picture.",
        root=root,
    )
    return figure


def _lineage(table: pd.DataFrame) -> list[str]:
    """The roots and all that they inherit from, in the order of look-up as far as the picture shows it."""
    bases = table[table["row"] == "inherits"].groupby("source", sort=False)["target"].agg(list).to_dict()
    found: dict[str, None] = {}
    waiting = table.loc[(table["row"] == "class") & table["note"].str.contains("root"), "source"].tolist()
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = None
            waiting = [*bases.get(name, []), *waiting]
    return list(found)


def _boxes(table: pd.DataFrame, modules: set[str], max_lines: int) -> dict[str, _Box]:
    """Every class by name, those in ``modules`` with a line that says so."""
    boxes: dict[str, _Box] = {}
    for name, rows in table[~table["row"].isin(list(_ARROW_LOOKS))].groupby("source", sort=False):
        lines = [_Line(row["label"], italic=row["note"] != "") for row in rows.to_dict("records")]
        kind, note = rows["label"].iloc[0], rows["note"].iloc[0]
        if rows["row"].iloc[0] != "class" or kind not in NODE_LOOKS:
            raise FigureError(f"{name!r} is no class of a kind that can be drawn ({', '.join(NODE_LOOKS)}).")
        title = [_Line(str(name), _TITLE_PT, bold=True, italic="abstract" in note, centred=True)]
        if name in modules:
            title.append(_Line(tr("is an nn.Module"), centred=True))
        inside = [[line for line, is_part in zip(lines, rows["row"] == part, strict=True) if is_part]
                  for part in ("attribute", "member")]  # fmt: skip
        boxes[str(name)] = _Box(kind, [title, *(_cut(part, max_lines) for part in inside if part)])
    return boxes


def _cut(lines: list[_Line], max_lines: int) -> list[_Line]:
    if len(lines) <= max_lines:
        return lines
    return [*lines[: max_lines - 1], _Line(tr("… {count} more", count=len(lines) - max_lines + 1))]


def _arrows(table: pd.DataFrame, boxes: dict[str, _Box]) -> list[Arrow]:
    """Arrows of the picture; several attributes of one class share one."""
    merged: dict[tuple[Any, str, str], list[str]] = {}
    for row in table[table["row"].isin(list(_ARROW_LOOKS))].to_dict("records"):
        ends = row["source"], row["target"]
        if missing := [end for end in ends if end not in boxes]:
            raise FigureError(f"an arrow ends at {missing[0]!r}, which is no class of the table.")
        merged.setdefault((row["row"], *ends), []).append(row["label"])
    return [Arrow(*ends, "\n".join(filter(None, labels))) for ends, labels in merged.items()]


def _ends(arrow: Arrow) -> tuple[str, str]:
    """Lower and upper end: bases above, parts below what holds them, what is built below what leads to it."""
    return (arrow.source, arrow.target) if arrow.kind == "inherits" else (arrow.target, arrow.source)


def _bounds(layout: Any) -> tuple[float, ...]:
    """Left, bottom, right and upper edge, in points."""
    return tuple(float(value) for value in layout.graph_attr["bb"].split(","))


def _readable_layout(boxes: dict[str, _Box], arrows: Sequence[Arrow], width_in: float) -> tuple[Any, float]:
    """The first layout whose text prints readably at the width, else on a page, else the one that prints largest there.

    With it comes how many times smaller it is drawn: more than is readable only where a page has no more room.
    """
    layouts: list[Any] = []
    for rows in _ROWS:
        layouts.append(_layout(boxes, arrows, *rows))
        if (reduction := _reduction(layouts[-1], width_in)) <= _LEAST_READABLE:
            return layouts[-1], reduction
    reductions = [_reduction(layout, max(width_in, PAGE_WIDTH_IN)) for layout in layouts]
    fitting = [reduction for reduction in reductions if reduction <= _LEAST_READABLE]
    best = reductions.index(fitting[0] if fitting else min(reductions))
    return layouts[best], max(_LEAST_READABLE, reductions[best])


def _reduction(layout: Any, width_in: float) -> float:
    """How many times smaller the layout must be drawn to fit a page; 1 where it fits."""
    left, bottom, right, top = _bounds(layout)
    width, height = right - left + 2 * _PAD_PT, top - bottom + 2 * _PAD_PT
    return max(1.0, width / (width_in * _POINTS), height / (PAGE_HEIGHT_IN * _POINTS))


def _layout(boxes: dict[str, _Box], arrows: Sequence[Arrow], rows_of_bases: int, rows_of_parts: int) -> Any:
    """Place the boxes; bases without bases, and parts, take turns in rows: a single row of mixins is too wide."""
    from pygraphviz import AGraph

    inheriting = {arrow.source for arrow in arrows if arrow.kind == "inherits"}
    turns: Counter[tuple[str, str]] = Counter()
    layout = AGraph(directed=True, strict=False)
    layout.graph_attr.update(rankdir="BT", nodesep="0.1", ranksep="0.28", splines="true")
    for name, box in boxes.items():
        size = {"width": f"{box.width_pt / _POINTS:.4f}", "height": f"{box.height_pt / _POINTS:.4f}"}
        layout.add_node(name, label="", shape="box", fixedsize="true", **size)
    for index, arrow in enumerate(arrows):
        minlen = 1
        if arrow.kind == "has" or (arrow.kind == "inherits" and arrow.target not in inheriting):
            minlen += turns[arrow.kind, arrow.source] % (rows_of_parts if arrow.kind == "has" else rows_of_bases)
            turns[arrow.kind, arrow.source] += 1
        look = {"label": _room_for(arrow.label), "arrowhead": "none", "minlen": str(minlen)}
        layout.add_edge(*_ends(arrow), key=str(index), **look)
    layout.layout("dot")
    return layout


def _room_for(label: str) -> str:
    """An empty table of Graphviz as large as the label."""
    if not label:
        return ""
    lines = [_Line(text) for text in label.split("\n")]
    width, height = max(line.width_pt for line in lines) + 4, sum(line.height_pt for line in lines) + 2
    return (
        f'<<TABLE BORDER="0" CELLBORDER="0" CELLPADDING="0" FIXEDSIZE="TRUE" WIDTH="{width:.0f}" '
        f'HEIGHT="{height:.0f}"><TR><TD></TD></TR></TABLE>>'
    )


def _draw_box(axes: Axes, box: _Box, position: str, scale: float) -> None:
    x, y = (float(value) for value in position.split(","))
    left, top = x - box.width_pt / 2, y + box.height_pt / 2
    frame = Rectangle((left, top - box.height_pt), box.width_pt, box.height_pt, **_frame(box.kind, scale), zorder=2)
    axes.add_patch(frame)
    for index, lines in enumerate(box.compartments):
        if index:
            rule: Look = {"color": NODE_LOOKS[box.kind][2], "linewidth": pt(0.6 * scale), "zorder": 3}
            axes.plot([left, left + box.width_pt], [top, top], **rule)
        _write(axes, lines, x if lines[0].centred else left + _PAD_PT, top - _PAD_PT / 2, scale)
        top -= sum(line.height_pt for line in lines) + _PAD_PT


def _frame(kind: str, scale: float) -> Look:
    _, color, edge, line = NODE_LOOKS[kind]
    return {"facecolor": color, "edgecolor": edge, "linestyle": line, "linewidth": pt(0.9 * scale)}


def _write(axes: Axes, lines: Sequence[_Line], x: float, top: float, scale: float, color: str = "#000000") -> None:
    for line in lines:
        font = line.font
        font.set_size(pt(line.size_pt * scale))
        place: Look = {"ha": "center" if line.centred else "left", "va": "center_baseline", "zorder": 4}
        axes.text(x, top - line.height_pt / 2, line.text, fontproperties=font, color=color, **place)
        top -= line.height_pt


def _draw_arrow(axes: Axes, arrow: Arrow, edge: Any, scale: float) -> None:
    """The spline of Graphviz; at its upper end the triangle of inheritance or the diamond of holding."""
    points = [tuple(float(value) for value in pair.split(",")) for pair in edge.attr["pos"].split()]
    color = _ARROW_LOOKS[arrow.kind][1]
    style = _DASHED if arrow.kind == "builds" or arrow.label.startswith("via ") else "-"
    path = Path(points, [Path.MOVETO, *[Path.CURVE4] * (len(points) - 1)])
    look: Look = {"facecolor": "none", "edgecolor": color, "linestyle": style, "linewidth": pt(0.8 * scale)}
    axes.add_patch(PathPatch(path, zorder=1, **look))
    tip, towards = (points[0], points[1]) if arrow.kind == "builds" else (points[-1], points[-2])
    _draw_head(axes, tip, towards, arrow.kind, scale)
    if arrow.label:
        x, y = (float(value) for value in edge.attr["lp"].split(","))
        lines = [_Line(text, centred=True) for text in arrow.label.split("\n")]
        _write(axes, lines, x, y + sum(line.height_pt for line in lines) / 2, scale, color)


def _draw_head(axes: Axes, tip: tuple[float, ...], towards: tuple[float, ...], kind: str, scale: float) -> None:
    _, color, outline, filling = _ARROW_LOOKS[kind]
    dx, dy = towards[0] - tip[0], towards[1] - tip[1]
    length = (dx * dx + dy * dy) ** 0.5 or 1.0
    ux, uy = dx / length, dy / length
    corners = [(tip[0] + along * ux - across * uy, tip[1] + along * uy + across * ux) for along, across in outline]
    look: Look = {"facecolor": filling, "edgecolor": color, "linewidth": pt(0.8 * scale), "zorder": 3}
    axes.add_patch(Polygon(corners, closed=kind != "builds", **look))


def _legend_rows(boxes: dict[str, _Box], arrows: Sequence[Arrow], width_pt: float) -> list[list[tuple[str, _Line]]]:
    """Kinds and names of what occurs, in rows as wide as the diagram."""
    occurring = {box.kind for box in boxes.values()} | {arrow.kind for arrow in arrows}
    rows: list[list[tuple[str, _Line]]] = [[]]
    for kind, (name, *_) in {**NODE_LOOKS, **_ARROW_LOOKS}.items():
        if kind in occurring:
            line = _Line(tr(name))
            if rows[-1] and sum(other.width_pt + 30 for _, other in [*rows[-1], (kind, line)]) > width_pt:
                rows.append([])
            rows[-1].append((kind, line))
    return rows


def _draw_legend_row(axes: Axes, row: list[tuple[str, _Line]], x: float, y: float, scale: float) -> None:
    """Samples in the printed size, whatever the scale of the diagram."""
    for kind, line in row:
        end = x + 18 / scale
        if kind in NODE_LOOKS:
            axes.add_patch(Rectangle((x, y - 4 / scale), 18 / scale, 8 / scale, **_frame(kind, 1)))
        else:
            style = _DASHED if kind == "builds" else "-"
            axes.plot([x, end], [y, y], color=_ARROW_LOOKS[kind][1], linewidth=pt(0.8), linestyle=style, zorder=1)
            _draw_head(axes, *(((x, y), (end, y)) if kind == "has" else ((end, y), (x, y))), kind, 1)
        text = _Line(line.text, _TEXT_PT / scale)
        _write(axes, [text], end + 4 / scale, y + text.height_pt / 2, scale)
        x += (line.width_pt + 30) / scale


# -- module trees ------------------------------------------------------------------------------------------------------

_ROW_IN, _ROW_PT = 0.19, 6.8
_MARGIN_IN, _INDENT_IN, _GAP_IN = 0.06, 0.11, 0.16
_LEAST_BAR_IN, _SHARE_IN = 0.5, 0.45
_BAR_COLOR, _OWN_COLOR = "#b9d9ee", COLORS["allocated"]


def _from_tree(tree: "ModuleTree | pd.DataFrame") -> tuple[pd.DataFrame, Arguments]:
    return (tree, {}) if isinstance(tree, pd.DataFrame) else (tree.table, {"name": tree.name})


@draws(
    {"module": str, "label": str, "level": int, "parameters": int, "bytes": int, "own_bytes": int, "output_shape": str},
    empty="no module to draw: module_tree gives the tree.",
    convert=_from_tree,
)
def module_tree_figure(table: pd.DataFrame, *, name: str = "") -> SuiteFigure:
    """Draw a module tree as a table with a bar a row: the bytes of the module, as a share of the whole.

    Args:
        table: from :func:`glmlab.structure.module_tree.module_tree`, or its table.
        name: of the model; that of the tree.
    """
    titles = [tr(title) for title in (msg("module"), msg("parameters"), msg("bytes"), msg("step returns"))]
    numbers = table["parameters"].map("{:,}".format), table["bytes"].map(format_bytes)
    rows = list(zip(table["label"], *numbers, table["output_shape"], strict=True))
    indents = _MARGIN_IN + _INDENT_IN * table["level"].to_numpy()
    ends = _column_ends(titles, rows, indents)
    bar_left = ends[-1] + _GAP_IN
    width = max(current_settings().layout_width_in(PAGE_WIDTH_IN), bar_left + _LEAST_BAR_IN + _SHARE_IN)
    note = tr(
        "Dark: bytes of the module itself; they add up to 100 %. Light: with those of its parts. Returned shapes: "
        "those of a decode step."
    )
    note = wrapped(note, width - 2 * _MARGIN_IN, _ROW_PT)
    lines = len(rows) + 1.4 + 0.8 * len(note.splitlines())
    shares, own = table["bytes"] / table["bytes"].iloc[0], table["own_bytes"] / table["bytes"].iloc[0]
    with drawing(PAGE_WIDTH_IN, 1, layout=None) as figure:
        set_size(figure, width, lines * _ROW_IN)
        axes = sheet(figure)
        axes.set(xlim=(0, width), ylim=(1.0 - lines, 1.0))
        _write_row(axes, 0, titles, _MARGIN_IN, ends, weight="bold")
        _cell(axes, tr("share of bytes"), bar_left, 0, weight="bold")
        axes.axhline(-0.5, color="#333333", linewidth=pt(0.8))
        for line, (row, indent, share, of_own) in enumerate(zip(rows, indents, shares, own, strict=True), start=1):
            if line % 2 == 0:
                axes.axhspan(-line - 0.5, -line + 0.5, color="#f5f5f5", zorder=0, linewidth=0)
            _write_row(axes, -line, row, indent, ends)
            room = width - bar_left - _SHARE_IN
            axes.barh(-line, share * room, left=bar_left, height=0.62, color=_BAR_COLOR, zorder=1)
            axes.barh(-line, of_own * room, left=bar_left, height=0.62, color=_OWN_COLOR, zorder=2)
            _cell(axes, f"{share:.1%}", bar_left + share * room + 0.05, -line)
        axes.text(_MARGIN_IN, -len(rows) - 0.65, note, fontsize=pt(_ROW_PT), verticalalignment="top")
    figure.alt_text = tr(
        "Module tree of {name}: {parameters:,} parameters in {size}. The largest share of bytes, {share:.0%}, is in "
        "{module}.",
        name=name, parameters=table["parameters"].iloc[0], size=rows[0][2], share=own.max(),
        module=table["module"].iloc[int(own.argmax())],
    )  # fmt: skip
    figure.caption = tr(
        "The bytes of {name} are those of its modules: their parameters, bytes and the shape that each returns in "
        "one decode step. Equal layers are one row. Dark bars add up to the whole; a light bar contains the dark "
        "ones of its parts.",
        name=name,
    )
    return figure


def _column_ends(titles: Sequence[str], rows: Sequence[Sequence[str]], indents: Any) -> list[float]:
    """Right edges of the columns after the first, in inches."""
    end = max(text_width_in(row[0], _ROW_PT) * 1.1 + indent for row, indent in zip(rows, indents, strict=True))
    columns = list(zip(titles, *rows, strict=True))[1:]
    return [end := end + _GAP_IN + max(text_width_in(text, _ROW_PT) for text in column) * 1.1 for column in columns]


def _write_row(axes: Axes, y: float, cells: Sequence[str], left: float, ends: Sequence[float], **look: Any) -> None:
    """One line of the table: the first cell begins at ``left``, the others end at ``ends``."""
    _cell(axes, cells[0], left, y, **({"weight": "bold"} if left == _MARGIN_IN else {}) | look)
    for text, x in zip(cells[1:], ends, strict=True):
        _cell(axes, text, x, y, ha="right", **look)


def _cell(axes: Axes, text: str, x: float, y: float, **look: Any) -> None:
    axes.text(x, y, text, fontsize=pt(_ROW_PT), va="center_baseline", zorder=3, **look)
