"""Class graphs of live classes: bases from ``__mro__``, parts from the module tree, Auto classes from the registry."""

import functools
import inspect
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from glmlab.models.loading import LoadedModel
from glmlab.structure.graph import (
    Arrow,
    ClassGraph,
    ClassNode,
    Member,
    Members,
    NodeKind,
    Part,
    StructureError,
    build_graph,
)

_LEAF_PACKAGES = ("torch", "bitsandbytes", "transformers.activations")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_OUTSIDE = ("abc", "typing", "collections", "enum", "contextlib", "builtins")  # abc.ABC, typing.Generic: no design


def class_graph(
    model_or_class: Any,
    *,
    depth: int | None = None,
    members: Members = "calls",
    include: str | Sequence[str] | None = None,
) -> ClassGraph:
    """Read the class graph of a model or a class from Python itself.

    The graph of a class is everything in its MRO. A model adds the classes of its parts, with attribute and count, from
    the module tree; layers of PyTorch itself stay attributes. A class that transformers' Auto classes build adds them
    and its config, from ``model_type`` to the class.

    Args:
        model_or_class: a class, a module, or what ``load_model`` returns. A class alone has no parts; a skeleton from
            :func:`glmlab.models.loading.build_skeleton` has them and needs no memory.
        depth: most steps away from the class, along bases, parts and builders; None for everything.
        members: "calls" (what a user calls), "public", "all", "none", or a list of names.
        include: shell patterns of class names, such as ``"Glm*"``.

    Raises:
        StructureError: neither a class nor a module, a negative depth, a pattern that matches nothing.

    Example:
        >>> from transformers import GlmForCausalLM
        >>> graph = class_graph(GlmForCausalLM)
        >>> graph.definers("generate"), graph.classes["GenerationMixin"].kind
        (('GenerationMixin',), 'mixin')
    """
    model = model_or_class.model if isinstance(model_or_class, LoadedModel) else model_or_class
    if isinstance(model, nn.Module):
        root: type = type(model)
    elif isinstance(model, type):
        root = model
    else:
        raise StructureError(
            f"{type(model).__name__} {str(model)[:60]!r} is neither a class nor a module. Give a class, a model, or "
            "what load_model returns."
        )
    parts = _parts(model) if isinstance(model, nn.Module) else {}
    builders, registered = _auto_side(root)
    starts = [root, *parts, *builders]
    classes = list(dict.fromkeys(above for cls in starts for above in cls.__mro__ if above is not object))
    names = _unique_names(classes)
    nodes = [_node(cls, names, parts.get(cls, {})) for cls in classes]
    builds = [Arrow("builds", names[maker], names[made], label) for maker, made, label in registered]
    return build_graph(nodes, [names[root]], builds).select(depth=depth, include=include, members=members)


def _node(cls: type, names: dict[type, str], parts: "_Counts") -> ClassNode:
    return ClassNode(
        name=names[cls],
        module=cls.__module__,
        bases=tuple(names[base] for base in cls.__bases__ if base is not object),
        mro=tuple(names[above] for above in cls.__mro__ if above is not object),
        members=tuple(_members(cls)),
        parts=tuple(
            Part(attribute, names.get(part_class, _plain_name(part_class)), at_least, at_most)
            for (attribute, part_class), (at_least, at_most) in parts.items()
        ),
        kind=_kind(cls),
    )


def _plain_name(cls: type) -> str:
    return f"nn.{cls.__qualname__}" if cls.__module__.startswith("torch.nn.") else cls.__qualname__


def _unique_names(classes: Sequence[type]) -> dict[type, str]:
    """Plain names; classes that share one get their module in front."""
    uses = Counter(map(_plain_name, classes))
    return {
        cls: name if uses[name] == 1 else f"{cls.__module__}.{cls.__qualname__}"
        for cls, name in zip(classes, map(_plain_name, classes), strict=True)
    }


def _kind(cls: type) -> NodeKind:
    if cls.__module__.partition(".")[0] == "torch":
        return "torch"
    if cls.__module__.startswith("transformers.models.auto."):
        return "auto"
    return "outside" if cls.__module__.partition(".")[0] in _OUTSIDE else "class"


def _members(cls: type) -> Iterable[Member]:
    """Methods and properties that the class itself defines."""
    for name, value in vars(cls).items():
        abstract = bool(getattr(value, "__isabstractmethod__", False))
        if isinstance(value, classmethod):
            yield Member(name, "class method", abstract)
        elif isinstance(value, staticmethod):
            yield Member(name, "static method", abstract)
        elif isinstance(value, (property, functools.cached_property)):
            yield Member(name, "property", abstract)
        elif inspect.isroutine(value):
            # nn.Module.forward is abstract in effect: a stand-in that raises NotImplementedError
            unimplemented = getattr(value, "__name__", "") == "_forward_unimplemented"
            yield Member(name, "method", abstract or unimplemented)


_Counts = dict[tuple[str, type], tuple[int, int]]


def _parts(model: nn.Module) -> dict[type, _Counts]:
    """Class -> (attribute, class of the part) -> fewest and most in one instance; leaf classes are no keys."""
    held: dict[type, list[Counter[tuple[str, type]]]] = {}
    for module in model.modules():
        if not isinstance(module, _CONTAINERS) and (module is model or not _is_leaf(type(module))):
            counts = Counter((name, type(part)) for name, child in module.named_children() for part in _flat(child))
            held.setdefault(type(module), []).append(counts)
    return {
        cls: {
            key: (min(counts[key] for counts in instances), max(counts[key] for counts in instances))
            for key in dict.fromkeys(key for counts in instances for key in counts)
        }
        for cls, instances in held.items()
    }


def _flat(module: nn.Module) -> Iterable[nn.Module]:
    """The module, or what a container holds."""
    if isinstance(module, _CONTAINERS):
        for child in module.children():
            yield from _flat(child)
    else:
        yield module


def _is_leaf(cls: type) -> bool:
    return any(cls.__module__ == package or cls.__module__.startswith(f"{package}.") for package in _LEAF_PACKAGES)


def _auto_side(root: Any) -> tuple[list[type], list[tuple[type, type, str]]]:
    """Auto classes that build ``root``, its config class, and who builds whom; empty if nothing is registered."""
    config_class = getattr(root, "config_class", None)
    if not issubclass(root, PreTrainedModel) or config_class is None:
        return [], []
    makers = [
        auto
        for auto in vars(modeling_auto).values()
        if isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass) and _is_built(auto, config_class, root)
    ]
    if not makers:
        return [], []
    model_type = config_class.model_type
    registered = [(maker, root, "builds") for maker in makers]
    registered.append((config_class, root, f"model_type '{model_type}'"))
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] is not config_class:
        return [*makers, config_class], registered  # one can register a model without its config
    registered.append((AutoConfig, config_class, f"'{model_type}'"))
    return [*makers, config_class, AutoConfig], registered


def _is_built(auto: Any, config_class: Any, root: type) -> bool:
    """Whether the Auto class builds ``root`` from this config; some list several classes for one config."""
    registry = auto._model_mapping
    if registry is None or config_class not in registry:
        return False
    entry = registry[config_class]
    return root in entry if isinstance(entry, tuple) else entry is root
