"""The module tree of a model: parameters and bytes of every module, and the shapes that pass through in a decode step.

Equal layers are folded into one row with a count, so that the tree of 28 layers is as long as that of one.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from glmlab.models.loading import LoadedModel
from glmlab.models.sizes import own_tensors, quantisation_state_of
from glmlab.structure.graph import StructureError
from glmlab.structure.tree import ModuleRow, ModuleTree, Shape


def module_tree(loaded: LoadedModel | nn.Module, *, context_tokens: int = 16) -> ModuleTree:
    """Lay out a model's modules with their sizes, and trace one decode step through them.

    Args:
        loaded: from ``load_model``, or a causal language model; on the meta device it costs neither memory nor time.
        context_tokens: tokens that are cached before the traced step.

    Returns:
        The tree. Its totals are those of the model's LoadReport: ``parameters`` (of the unquantised model, as there)
        and ``total_bytes``. Children of one list that are equal in class and in every shape are one row.

    Raises:
        StructureError: not a causal language model, or ``context_tokens`` below 1.

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
    if context_tokens < 1:
        raise StructureError(f"context_tokens={context_tokens}: a decode step needs at least one cached token.")
    sizes = _Sizes(model)  # before the first step: bitsandbytes repacks quantised weights for a CPU in it
    shapes = decode_shapes(model, context_tokens=context_tokens)
    name = loaded.report.name if isinstance(loaded, LoadedModel) else type(model).__name__
    return ModuleTree(name, tuple(sizes.rows(shapes)), context_tokens)


def decode_shapes(model: nn.Module, *, context_tokens: int) -> dict[str, Shape]:
    """Shape of the first tensor that every module returns in one decode step: module path -> shape.

    A prefill fills the cache; then hooks listen while one more token is read.
    """
    heard: dict[str, Shape] = {}

    def listen(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if (tensor := _first_tensor(output)) is not None:
                heard[path] = tuple(tensor.shape)

        return hook

    device = next(model.parameters()).device
    prompt = torch.ones(1, context_tokens, dtype=torch.long, device=device)
    with torch.no_grad():
        cache = model(input_ids=prompt, use_cache=True).past_key_values
        handles = [module.register_forward_hook(listen(path)) for path, module in model.named_modules()]
        try:
            model(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True)
        finally:
            for handle in handles:
                handle.remove()
    return heard


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):  # transformers' outputs; the logits come first
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return next((value for value in output if isinstance(value, Tensor)), None)
    return None


class _Sizes:
    """Rows of a model; a tied tensor counts where it is met first."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own: dict[str, tuple[int, int]] = {}
        seen: set[int] = set()
        for path, module in model.named_modules(remove_duplicate=False):
            fresh = [(name, tensor) for name, tensor in own_tensors(module) if id(tensor) not in seen]
            seen |= {id(tensor) for _, tensor in fresh}
            self._own[path] = (
                sum(_parameter_count(tensor) for name, tensor in fresh if name in module._parameters),
                sum(_stored_bytes(module, tensor) for _, tensor in fresh),
            )

    def rows(self, shapes: Mapping[str, Shape]) -> Iterator[ModuleRow]:
        """Every row, outermost first."""
        yield from self._rows([("", self._model)], "", "", 0, shapes)

    def _rows(
        self,
        same: Sequence[tuple[str, nn.Module]],
        shown_path: str,
        attribute: str,
        level: int,
        shapes: Mapping[str, Shape],
    ) -> Iterator[ModuleRow]:
        """Rows of equal modules that stand in corresponding places: their own row, then their parts'."""
        path, first = same[0]
        own = [self._own[member] for member, _ in same]
        below = [size for member, module in same for size in self._below(member, module)]
        own_parameters, own_bytes = sum(size[0] for size in own), sum(size[1] for size in own)
        yield ModuleRow(
            path=shown_path,
            attribute=attribute,
            class_name=type(first).__name__,
            level=level,
            count=len(same),
            parameters=own_parameters + sum(size[0] for size in below),
            own_parameters=own_parameters,
            total_bytes=own_bytes + sum(size[1] for size in below),
            own_bytes=own_bytes,
            output_shape=shapes.get(path),
        )
        for group in _equal_runs(first):
            members = [
                (f"{member}.{name}".lstrip("."), module.get_submodule(name))
                for member, module in same
                for name in group
            ]
            shown = group[0] if len(group) == 1 else f"{group[0]}-{group[-1].rpartition('.')[2]}"
            label = shown if len(group) == 1 else f"{shown}: {len(group)} x"
            yield from self._rows(members, f"{shown_path}.{shown}".lstrip("."), label, level + 1, shapes)

    def _below(self, path: str, module: nn.Module) -> Iterator[tuple[int, int]]:
        for name, _ in module.named_modules(remove_duplicate=False):
            if name:
                yield self._own[f"{path}.{name}".lstrip(".")]


def _equal_runs(module: nn.Module) -> Iterator[list[str]]:
    """Names of the children; of a list in the list's place its elements, equal neighbours together."""
    for name, child in module.named_children():
        if not isinstance(child, nn.ModuleList):
            yield [name]
            continue
        for _, run in groupby(child.named_children(), key=lambda element: _signature(element[1])):
            yield [f"{name}.{index}" for index, _ in run]


def _signature(module: nn.Module) -> Any:
    """Class, names and shapes of everything inside: what makes two layers equal."""
    return [
        (path, type(inner), [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in own_tensors(inner)])
        for path, inner in module.named_modules()
    ]


def _parameter_count(tensor: Tensor) -> int:
    """Elements before quantisation: a packed 4-bit weight has fewer than the layer has parameters."""
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else torch.Size(state.shape).numel()


def _stored_bytes(module: nn.Module, tensor: Tensor) -> int:
    """Bytes of a tensor with its quantisation state."""
    state = sum(part.numel() * part.element_size() for part in quantisation_state_of(module, tensor))
    return tensor.numel() * tensor.element_size() + state
