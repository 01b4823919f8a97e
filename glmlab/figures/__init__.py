"""Figures: pure functions from one table to a matplotlib Figure.

Nothing here knows of GPUs or models, and nothing imports torch. What was measured is drawn as dots, what was forecast
as a solid line, what others reported as hollow markers; a memory component has the same colour in every figure. A saved
figure can be drawn again from its table (saving.py).
"""

from glmlab.figures.decoding import candidates_chart, decode_strip, lens_heatmap
from glmlab.figures.latency import (
    account_chart,
    first_token_curve,
    latency_curve,
    polling_chart,
    precision_chart,
    token_parts_chart,
)
from glmlab.figures.memory import (
    component_chart,
    curves_table,
    memory_curve,
    pool_map,
    segments_table,
)
from glmlab.figures.prompts import format_figure, growth_figure, prompt_figure, roles_figure
from glmlab.figures.saving import FORMATS, read_figure, redraw, save_figure
from glmlab.figures.structure import class_diagram, module_tree_figure
from glmlab.figures.style import COLORS, STYLE, FigureError, SuiteFigure, figure_settings

__all__ = [
    "COLORS",
    "FORMATS",
    "STYLE",
    "FigureError",
    "SuiteFigure",
    "account_chart",
    "candidates_chart",
    "class_diagram",
    "component_chart",
    "curves_table",
    "decode_strip",
    "figure_settings",
    "first_token_curve",
    "format_figure",
    "growth_figure",
    "latency_curve",
    "lens_heatmap",
    "memory_curve",
    "module_tree_figure",
    "polling_chart",
    "pool_map",
    "precision_chart",
    "prompt_figure",
    "read_figure",
    "redraw",
    "roles_figure",
    "save_figure",
    "segments_table",
    "token_parts_chart",
]
