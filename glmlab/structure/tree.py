"""A module tree as data: one row a module, with sizes and the shape that it returns. Nothing here imports torch."""

from dataclasses import dataclass

import pandas as pd

from glmlab.core.units import format_bytes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModuleRow:
    """One module, or several equal ones in a row of their parent; parameters and bytes are those of all of them."""

    path: str
    """Dotted path from the model; a folded row has the first and last index: ``model.layers.0-27.mlp``."""
    attribute: str
    class_name: str
    level: int
    count: int
    """How many modules of the model the row stands for."""
    parameters: int
    own_parameters: int
    """Without those of its parts: over all rows they add up to the model's."""
    total_bytes: int
    """Parameters, buffers and quantisation state."""
    own_bytes: int
    output_shape: Shape | None
    """Of what it returns in a decode step; None where it is not called, or returns no tensor."""

    @property
    def label(self) -> str:
        """Attribute, count and class: ``layers.0-27: 28 x GlmDecoderLayer``."""
        if not self.attribute:
            return self.class_name
        return f"{self.attribute}{' ' if self.attribute.endswith(' x') else ': '}{self.class_name}"


@dataclass(frozen=True)
class ModuleTree:
    """Every row of the tree, outermost first; its repr is the table."""

    name: str
    rows: tuple[ModuleRow, ...]
    context_tokens: int
    """Tokens that were cached when the decode step was traced."""

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        return self.rows[0].parameters

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters, buffers and quantisation state, tied ones once."""
        return self.rows[0].total_bytes

    def to_frame(self) -> pd.DataFrame:
        """One line a row: path, class, count, parameters, bytes, share of the whole, output shape."""
        return pd.DataFrame(
            {
                "module": [row.path or self.name for row in self.rows],
                "class": [row.class_name for row in self.rows],
                "count": [row.count for row in self.rows],
                "parameters": [row.parameters for row in self.rows],
                "bytes": [row.total_bytes for row in self.rows],
                "share": [row.total_bytes / self.total_bytes for row in self.rows],
                "own_bytes": [row.own_bytes for row in self.rows],
                "output_shape": [format_shape(row.output_shape) for row in self.rows],
            }
        )

    def __repr__(self) -> str:
        cells = [
            (
                "  " * row.level + row.label,
                f"{row.parameters:,}",
                format_bytes(row.total_bytes),
                f"{row.total_bytes / self.total_bytes:.1%}",
                format_shape(row.output_shape),
            )
            for row in self.rows
        ]
        cells.insert(0, ("module", "parameters", "bytes", "share", "decode step"))
        widths = [max(len(line[column]) for line in cells) for column in range(5)]
        return "\n".join(
            f"{line[0]:<{widths[0]}}  "
            + "  ".join(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
            for line in cells
        )


def format_shape(shape: Shape | None) -> str:
    """A shape for a reader.

    Example:
        >>> format_shape((1, 1, 4096)), format_shape(None)
        ('1 × 1 × 4096', '')
    """
    return " × ".join(map(str, shape)) if shape else ""
