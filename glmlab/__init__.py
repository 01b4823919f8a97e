"""glmlab takes a chat model apart and shows where its GPU memory goes.

The public names load on first use: ``import glmlab`` imports neither torch nor transformers.

Example:
    >>> import glmlab
    >>> glmlab.load_model("embedded").report.name
    'embedded'
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("glmlab")

_HOMES = {  # public name -> module that defines it
    "GlmlabError": "core.errors",
    "load_model": "models.loading",
    "encode_chat": "prompts.encoding",
    "decode_steps": "generation.decoding",
    "ChatSession": "generation.chat",
    "Forecast": "forecast.forecast",
    "class_graph": "structure.live",
    "source_class_graph": "structure.source",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'glmlab' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    value = getattr(import_module(f"glmlab.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
