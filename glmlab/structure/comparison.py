"""Where each class and method of the published ChatGLM3 code is today."""

from pkgutil import resolve_name

import pandas as pd

from glmlab.core.resources import data_path
from glmlab.structure.graph import ClassGraph, StructureError

ASIDE = ("InvalidScoreLogitsProcessor", "LogitsProcessor", "PrefixEncoder", "AutoModelForSeq2SeqLM")
"""Classes of the published file, beside those for classification, that a chat does not use."""


def side_by_side(original: ClassGraph) -> pd.DataFrame:
    """List the published classes and the methods that moved, beside what does their work today.

    Args:
        original: graph of the published file, from :func:`~glmlab.structure.source.source_class_graph` or
            :func:`~glmlab.structure.source.read_class_facts`.

    Returns:
        One row a class or method, from ``data/structure/chatglm3-today.csv``: original, today, change. Every name of
        today is looked up, so that no row outlives what it names.

    Raises:
        StructureError: the graph is not of ChatGLM3's file, or a name of today no longer exists.

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
        if class_name not in original.classes or (method and not original.classes[class_name].defines(method)):
            continue
        try:
            resolve_name(today)
        except (ImportError, AttributeError) as error:
            raise StructureError(f"{today} no longer exists ({error}): update chatglm3-today.csv.") from error
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
    kept = [name for name in original.classes if name not in ASIDE and "SequenceClassification" not in name]
    return original.select(include=kept)


def _short(path: str) -> str:
    """A path without the modules inside transformers and PyTorch."""
    library, _, _ = path.partition(".")
    if library == "torch":
        return f"nn.{path.rpartition('.')[2]}"
    parts = path.split(".")
    named = [part for index, part in enumerate(parts) if part[:1].isupper() or index == len(parts) - 1]
    return f"{library}.{'.'.join(named)}"
