"""Where each class and method of the published ChatGLM3 code is today."""

import pandas as pd

from glmlab.core.resources import data_path
from glmlab.structure.graph import ClassGraph, StructureError

_ASIDE = ("InvalidScoreLogitsProcessor", "LogitsProcessor", "PrefixEncoder", "AutoModelForSeq2SeqLM")


def side_by_side(original: ClassGraph) -> pd.DataFrame:
    """List the published classes and the methods that moved, beside what does their work today.

    Args:
        original: graph of the published file, from :func:`~glmlab.structure.source.source_class_graph` or
            :func:`~glmlab.structure.source.read_class_facts`.

    Returns:
        One row a class or method, from ``data/structure/chatglm3-today.csv``: original, today, change.

    Raises:
        StructureError: the graph is not of ChatGLM3's file.

    Example:
        >>> from glmlab.structure.source import read_class_facts
        >>> table = side_by_side(read_class_facts(data_path("structure", "chatglm3-6b.json")))
        >>> table.set_index("original").loc["  stream_generate()", "today"]
        'glmlab.decode_steps'
    """
    if "ChatGLMForConditionalGeneration" not in original.classes:
        raise StructureError(
            f"{original!r} is not the graph of ChatGLM's published file. Read it with source_class_graph from the "
            "folder of a downloaded chatglm3-6b, or take the facts in data/structure."
        )
    rows = []
    for name, today, change in places_today().itertuples(index=False):
        class_name, _, method = name.partition(".")
        if class_name in original.classes and (not method or original.classes[class_name].defines(method)):
            rows.append((f"  {method}()" if method else class_name, _short(today), change))
    return pd.DataFrame(rows, columns=["original", "today", "change"])


def places_today() -> pd.DataFrame:
    """Every class of the published file, and each public method that moved away from its class, with its new place."""
    return pd.read_csv(data_path("structure", "chatglm3-today.csv"))


def chat_side(original: ClassGraph) -> ClassGraph:
    """The published classes without what a chat does not use: classification and prefix tuning.

    Example:
        >>> from glmlab.structure.source import read_class_facts
        >>> graph = read_class_facts(data_path("structure", "chatglm3-6b.json"))
        >>> "PrefixEncoder" in graph.classes, any(node.name == "PrefixEncoder" for node in chat_side(graph).nodes)
        (True, False)
    """
    kept = [name for name in original.classes if name not in _ASIDE and "SequenceClassification" not in name]
    return original.select(include=kept)


def _short(path: str) -> str:
    """A path without the modules inside transformers and PyTorch."""
    library, *inner, name = path.split(".")
    if library == "torch":
        return f"nn.{name}"
    return ".".join([library, *(part for part in inner if part[0].isupper()), name])
