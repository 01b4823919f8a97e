"""The module tree of a model: parameters, bytes and returned shape of every module, equal layers in one row.

torchinfo prints such trees, too, but not of these models: it miscounts packed 4-bit and tied weights, knows no
quantisation state, lists each of 28 equal layers, and fails on a decode step with a cache.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from glmlab.core.units import format_bytes
from glmlab.models.loading import LoadedModel
from glmlab.models.placement import own_tensors, quantisation_state_of
from glmlab.structure.graph import StructureError

_CONTEXT_TOKENS = 16  # cached before the traced step; the shapes do not depend on it


@dataclass(frozen=True)
class ModuleTree:
    """The rows of a module tree as a table, outermost module first; its repr prints the tree."""

    name: str
    table: pd.DataFrame
    """Columns:

    - module: dotted path from the model; a folded row has the first and last index, ``model.layers.0-27.mlp``
    - label: attribute, count and class, ``layers.0-27: 28 x GlmDecoderLayer``; level: its indentation
    - count: how many modules of the model the row stands for; the sums are those of all of them
    - parameters, bytes: with the module's parts; bytes include buffers and quantisation state
    - own_parameters, own_bytes: without its parts; over all rows they add up to the model's
    - output_shape: of the first tensor that a decode step returns; empty if the module is not called
    """

    @property
    def parameters(self) -> int:
        """All parameters of the unquantised model, tied ones once."""
        return int(self.table["parameters"].iloc[0])

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters, buffers and quantisation state, tied ones once."""
        return int(self.table["bytes"].iloc[0])

    def __repr__(self) -> str:
        modules = self.table["level"].map("  ".__mul__) + self.table["label"]
        width = max(map(len, modules))
        shown = {
            "module".ljust(width): modules.str.ljust(width),
            "parameters": self.table["parameters"].map("{:,}".format),
            "bytes": self.table["bytes"].map(format_bytes),
            "share": (self.table["bytes"] / self.total_bytes).map("{:.1%}".format),
            "decode step": self.table["output_shape"],
        }
        return pd.DataFrame(shown).to_string(index=False)


def module_tree(loaded: LoadedModel | nn.Module) -> ModuleTree:
    """Lay out a model's modules with their sizes, and trace one decode step through them.

    Args:
        loaded: from ``load_model``, or a causal language model; on the meta device it needs neither memory nor time.

    Returns:
        The tree. Its totals are those of the model's LoadReport. Neighbours in a list whose classes and shapes are
        equal are one row.

    Raises:
        StructureError: not a causal language model.

    Example:
        >>> from glmlab import load_model
        >>> loaded = load_model("embedded", precision="fp32", device="cpu")
        >>> tree = module_tree(loaded)
        >>> tree.total_bytes == loaded.report.total_bytes, tree.parameters == loaded.report.parameters
        (True, True)
    """
    model = loaded.model if isinstance(loaded, LoadedModel) else loaded
    if not isinstance(model, nn.Module) or not hasattr(model, "generate"):
        raise StructureError(
            f"{type(model).__name__} is not a causal language model. Give what load_model returns, or a skeleton from "
            "build_skeleton."
        )
    own = _own_sizes(model)  # before the first step, in which bitsandbytes repacks quantised weights for a CPU
    whole: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path, sizes in own.items():
        for inside in ("", *(path[:end] for end in range(1, len(path) + 1) if f"{path}."[end] == ".")):
            whole[inside] = [total + size for total, size in zip(whole[inside], sizes, strict=True)]
    shapes = _decode_shapes(model)
    rows = [
        {
            "module": shown_path,
            "label": label,
            "level": level,
            "class": type(model.get_submodule(paths[0])).__name__,
            "count": len(paths),
            "parameters": sum(whole[path][0] for path in paths),
            "own_parameters": sum(own[path][0] for path in paths),
            "bytes": sum(whole[path][1] for path in paths),
            "own_bytes": sum(own[path][1] for path in paths),
            "output_shape": " × ".join(map(str, shapes.get(paths[0], ()))),
        }
        for shown_path, label, level, paths in _folded(model)
    ]
    name = loaded.report.name if isinstance(loaded, LoadedModel) else type(model).__name__
    return ModuleTree(name, pd.DataFrame(rows))


def _decode_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of the first tensor that every module returns in one decode step: module path -> shape."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(path: str, output: Any) -> None:
        values = (
            tuple(output.values()) if isinstance(output, dict) else output
        )  # of transformers; the logits come first
        values = values if isinstance(values, (tuple, list)) else [values]
        if tensors := [value for value in values if isinstance(value, Tensor)]:
            shapes[path] = tuple(tensors[0].shape)

    prompt = torch.ones(1, _CONTEXT_TOKENS, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad(), ExitStack() as hooks:
        cache = model(input_ids=prompt, use_cache=True).past_key_values
        for path, module in model.named_modules():
            handle = module.register_forward_hook(lambda _module, _inputs, output, path=path: note(path, output))
            hooks.callback(handle.remove)
        model(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True)
    return shapes


def _own_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Module path -> parameters and bytes of its own tensors; a tied tensor counts in the first that holds it."""
    sizes = {}
    seen: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        fresh = [(name, tensor) for name, tensor in own_tensors(module) if id(tensor) not in seen]
        seen |= {id(tensor) for _, tensor in fresh}
        sizes[path] = (
            sum(_parameter_count(tensor) for name, tensor in fresh if name in module._parameters),
            sum(part.nbytes for _, tensor in fresh for part in (tensor, *quantisation_state_of(module, tensor))),
        )
    return sizes


def _parameter_count(tensor: Tensor) -> int:
    """Elements before quantisation: a packed 4-bit weight has fewer than the layer has parameters."""
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else torch.Size(state.shape).numel()


def _folded(
    model: nn.Module, paths: Sequence[str] = ("",), shown: str = "", label: str = "", level: int = 0
) -> Iterator[tuple[str, str, int, Sequence[str]]]:
    """Shown path, label, level and paths of equal modules in corresponding places; then the rows of their parts."""
    module = model.get_submodule(paths[0])
    yield shown, f"{label}{type(module).__name__}", level, paths
    for run in _equal_runs(module):
        inner = [f"{path}.{name}".lstrip(".") for path in paths for name in run]
        name = run[0] if len(run) == 1 else f"{run[0]}-{run[-1].rpartition('.')[2]}"
        count = "" if len(run) == 1 else f"{len(run)} x "
        yield from _folded(model, inner, f"{shown}.{name}".lstrip("."), f"{name}: {count}", level + 1)


def _equal_runs(module: nn.Module) -> Iterator[list[str]]:
    """Names of the children; a list is replaced by its elements, equal neighbours together."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            for _, run in groupby(child.named_children(), key=lambda element: _signature(element[1])):
                yield [f"{name}.{index}" for index, _ in run]
        else:
            yield [name]


def _signature(module: nn.Module) -> Any:
    """Class, names and shapes of everything inside: what makes two layers equal."""
    return [
        (path, type(inner), [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in own_tensors(inner)])
        for path, inner in module.named_modules()
    ]
