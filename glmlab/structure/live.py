"""Class graphs of live classes: bases from ``__mro__``, parts from the module tree, Auto classes from the registry."""

import functools
import inspect
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from glmlab.models.loading import LoadedModel
from glmlab.structure.graph import Arrow, ClassGraph, ClassNode, Member, NodeKind, Part, StructureError, build_graph

_LEAF_PACKAGES = ("torch.", "bitsandbytes.", "transformers.activations.")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_OUTSIDE = ("abc", "typing", "collections", "enum", "contextlib", "builtins")  # abc.ABC, typing.Generic: no design


def class_graph(model_or_class: Any) -> ClassGraph:
    """Read the class graph of a model or a class from Python itself.

    The graph of a class is everything in its MRO. A model adds the classes of its parts, with attribute and count, from
    the module tree; layers of PyTorch itself stay attributes. A class that transformers' Auto classes build adds them
    and its config, from ``model_type`` to the class.

    Args:
        model_or_class: a class, a module, or what ``load_model`` returns. A class alone has no parts; a skeleton from
            :func:`glmlab.models.loading.build_skeleton` has them and needs no memory.

    Raises:
        StructureError: neither a class nor a module.

    Example:
        >>> from transformers import GlmForCausalLM
        >>> graph = class_graph(GlmForCausalLM)
        >>> graph.definers("generate"), graph.classes["GenerationMixin"].kind
        (('GenerationMixin',), 'mixin')
    """
    model = model_or_class.model if isinstance(model_or_class, LoadedModel) else model_or_class
    if not isinstance(model, (nn.Module, type)):
        raise StructureError(
            f"{type(model).__name__} {str(model)[:60]!r} is neither a class nor a module. Give a class, a model, or "
            "what load_model returns."
        )
    root = model if isinstance(model, type) else type(model)
    parts = _parts(model) if isinstance(model, nn.Module) else {}
    builds = _builders(root)
    starts = [root, *parts, *(maker for maker, _, _ in builds)]
    classes = list(dict.fromkeys(above for cls in starts for above in cls.__mro__ if above is not object))
    names = _unique_names(classes)
    nodes = [_node(cls, names, parts.get(cls, {})) for cls in classes]
    return build_graph(
        nodes, [names[root]], [Arrow("builds", names[maker], names[made], label) for maker, made, label in builds]
    )


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
    names = {cls: _plain_name(cls) for cls in classes}
    uses = Counter(names.values())
    return {cls: name if uses[name] == 1 else f"{cls.__module__}.{cls.__qualname__}" for cls, name in names.items()}


def _kind(cls: type) -> NodeKind:
    package = cls.__module__.partition(".")[0]
    if package == "torch":
        return "torch"
    if cls.__module__.startswith("transformers.models.auto."):
        return "auto"
    if package == "glmlab":
        return "suite"
    if issubclass(cls, PreTrainedConfig):
        return "config"
    return "outside" if package in _OUTSIDE else "class"


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
        is_leaf = f"{type(module).__module__}.".startswith(_LEAF_PACKAGES)
        if not isinstance(module, _CONTAINERS) and (module is model or not is_leaf):
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


def _builders(root: Any) -> list[tuple[type, type, str]]:
    """Who builds whom on the way from ``model_type`` to ``root``; empty if no Auto class builds it."""
    config_class = getattr(root, "config_class", None)
    if not issubclass(root, PreTrainedModel) or config_class is None:
        return []
    found = [
        (auto, root, "builds")
        for auto in vars(modeling_auto).values()
        if isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass) and _is_built(auto, config_class, root)
    ]
    if found:
        model_type = config_class.model_type
        found.append((config_class, root, f"model_type '{model_type}'"))
        if model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] is config_class:  # a model can be without
            found.append((AutoConfig, config_class, f"'{model_type}'"))
    return found


def _is_built(auto: Any, config_class: Any, root: type) -> bool:
    """Whether the Auto class builds ``root`` from this config; some list several classes for one config."""
    registry = auto._model_mapping
    entry = registry[config_class] if registry is not None and config_class in registry else ()
    return root in entry if isinstance(entry, tuple) else entry is root
