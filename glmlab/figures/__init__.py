"""Figures: pure functions from data to matplotlib Figures.

Nothing here knows of GPUs or models, and nothing imports torch. What was measured is drawn as dots, what was forecast
as a solid line, what others reported as hollow markers; a memory component has the same colour in every figure.
"""

from glmlab.figures.decoding import candidates_chart, decode_strip, lens_heatmap
from glmlab.figures.deployment import precision_chart
from glmlab.figures.forecast import component_chart, components, pool_map, segments_table
from glmlab.figures.latency import account_chart, first_token_curve, latency_curve, polling_chart, token_parts_chart
from glmlab.figures.memory import curves_table, memory_column, memory_curve
from glmlab.figures.module_tree import module_tree_figure
from glmlab.figures.prompts import format_figure, growth_figure, printable, prompt_figure, roles_figure
from glmlab.figures.saving import FORMATS, save_figure
from glmlab.figures.settings import FigureError, figure_settings
from glmlab.figures.structure import class_diagram
from glmlab.figures.style import COLORS, STYLE, SuiteFigure

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
    "components",
    "curves_table",
    "decode_strip",
    "figure_settings",
    "first_token_curve",
    "format_figure",
    "growth_figure",
    "latency_curve",
    "lens_heatmap",
    "memory_column",
    "memory_curve",
    "module_tree_figure",
    "polling_chart",
    "pool_map",
    "precision_chart",
    "printable",
    "prompt_figure",
    "roles_figure",
    "save_figure",
    "segments_table",
    "token_parts_chart",
]
