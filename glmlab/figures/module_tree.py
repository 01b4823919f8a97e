"""Module trees: a table with a bar a row, in which the bytes add up."""

from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes

from glmlab.core.units import format_bytes
from glmlab.figures.settings import current_settings, pt, tr
from glmlab.figures.style import COLORS, SuiteFigure, drawing, set_size, text_width_in, wrapped

if TYPE_CHECKING:
    from glmlab.structure.module_tree import ModuleTree

_WIDTH_IN = 7.1
_ROW_IN = 0.19
_TEXT_PT = 6.8
_MARGIN_IN, _INDENT_IN, _GAP_IN = 0.06, 0.11, 0.16
_LEAST_BAR_IN, _SHARE_IN = 0.5, 0.45
_BAR_COLOR, _OWN_COLOR = "#b9d9ee", COLORS["allocated"]


def module_tree_figure(tree: "ModuleTree") -> SuiteFigure:
    """Draw a module tree as a table with a bar a row: the bytes of the module, as a share of the whole.

    Args:
        tree: from :func:`glmlab.structure.module_tree.module_tree`.

    Returns:
        A figure of the page's width, or of the width that is set (``figure_settings``), but no narrower than its
        columns. Dark bars are bytes that no row below shows; they add up to the whole.
    """
    titles = [tr(title) for title in ("module", "parameters", "bytes", "step returns")]
    modules = tree.table.to_dict("records")
    rows = [_cells(row) for row in modules]
    columns = [max(text_width_in(text, _TEXT_PT) for text in column) for column in zip(titles, *rows, strict=True)]
    names_in = max(text_width_in(row["label"], _TEXT_PT) * 1.1 + _INDENT_IN * row["level"] for row in modules)
    ends = [_MARGIN_IN + names_in]
    for width_in in columns[1:]:
        ends.append(ends[-1] + _GAP_IN + width_in * 1.1)
    bar_left = ends[-1] + _GAP_IN
    width = max(current_settings().layout_width_in(_WIDTH_IN), bar_left + _LEAST_BAR_IN + _SHARE_IN)
    note = tr(
        "Dark: bytes of the module itself; they add up to 100 %. Light: with those of its parts. Returned shapes: "
        "those of a decode step."
    )
    note = wrapped(note, width - 2 * _MARGIN_IN, _TEXT_PT)
    lines = len(modules) + 1.4 + 0.8 * len(note.splitlines())
    with drawing(_WIDTH_IN, 1, layout=None) as figure:
        set_size(figure, width, lines * _ROW_IN)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(1.0 - lines, 1.0)
        for text, x, right in zip(titles, [_MARGIN_IN, *ends[1:]], (False, True, True, True), strict=True):
            _cell(axes, text, x, 0, right=right, bold=True)
        _cell(axes, tr("share of bytes"), bar_left, 0, bold=True)
        axes.axhline(-0.5, color="#333333", linewidth=pt(0.8))
        bar_width = width - bar_left - _SHARE_IN
        for line, (row, cells) in enumerate(zip(modules, rows, strict=True), start=1):
            if line % 2 == 0:
                axes.axhspan(-line - 0.5, -line + 0.5, color="#f5f5f5", zorder=0, linewidth=0)
            _cell(axes, row["label"], _MARGIN_IN + _INDENT_IN * row["level"], -line, bold=row["level"] == 0)
            for text, x in zip(cells[1:], ends[1:], strict=True):
                _cell(axes, text, x, -line, right=True)
            share, own = row["bytes"] / tree.total_bytes, row["own_bytes"] / tree.total_bytes
            axes.barh(-line, share * bar_width, left=bar_left, height=0.62, color=_BAR_COLOR, zorder=1)
            axes.barh(-line, own * bar_width, left=bar_left, height=0.62, color=_OWN_COLOR, zorder=2)
            _cell(axes, f"{share:.1%}", bar_left + share * bar_width + 0.05, -line)
        axes.text(_MARGIN_IN, -len(modules) - 0.65, note, fontsize=pt(_TEXT_PT), verticalalignment="top")
    largest = max(modules, key=lambda row: row["own_bytes"])
    figure.alt_text = tr(
        "Module tree of {name}: {parameters:,} parameters in {size}. The largest share of bytes, {share:.0%}, is in "
        "{module}.",
        name=tree.name, parameters=tree.parameters, size=format_bytes(tree.total_bytes), module=largest["module"],
        share=largest["own_bytes"] / tree.total_bytes,
    )  # fmt: skip
    return figure


def _cells(row: dict[Any, Any]) -> tuple[str, str, str, str]:
    return (row["label"], f"{row['parameters']:,}", format_bytes(row["bytes"]), row["output_shape"])


def _cell(axes: Axes, text: str, x: float, y: float, *, right: bool = False, bold: bool = False) -> None:
    axes.text(
        x, y, text, fontsize=pt(_TEXT_PT), weight="bold" if bold else "normal", zorder=3,
        horizontalalignment="right" if right else "left", verticalalignment="center_baseline", parse_math=False,
    )  # fmt: skip
