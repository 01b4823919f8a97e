"""Plates of notebook 01: classes and modules."""

from glmlab.core.resources import data_path
from glmlab.figures.module_tree import module_tree_figure
from glmlab.figures.structure import class_diagram
from glmlab.gallery.captions import caption
from glmlab.gallery.plate import Plate, embedded, model_provenance
from glmlab.models.checkpoints import find_config
from glmlab.structure.comparison import chat_side
from glmlab.structure.source import join, read_class_facts


def class_hierarchy() -> Plate:
    """The classes of ChatGLM3-6B as transformers has them now."""
    from glmlab.models.loading import build_skeleton, load_config
    from glmlab.structure.live import class_graph

    graph = class_graph(build_skeleton(load_config(find_config("chatglm3-6b"))))
    versions = {
        "transformers": embedded().report.versions["transformers"],
        "torch": embedded().report.versions["torch"],
    }
    return Plate(
        class_diagram(graph),
        graph.to_frame(),
        {"model": "chatglm3-6b", "versions": versions},
        caption("class_hierarchy"),
    )


def original_hierarchy() -> Plate:
    """The classes of the published file, without what a chat does not touch."""
    facts = [data_path("structure", name) for name in ("chatglm3-6b.json", "transformers-4.38.json")]
    graph = chat_side(join(*map(read_class_facts, facts)))
    provenance = {"source": [f"data/structure/{path.name}" for path in facts], "model": "chatglm3-6b"}
    return Plate(class_diagram(graph), graph.to_frame(), provenance, caption("original_hierarchy"))


def module_tree() -> Plate:
    """The embedded model's modules with their bytes."""
    from glmlab.structure.module_tree import module_tree as tree_of

    tree = tree_of(embedded())
    return Plate(module_tree_figure(tree), tree.table, model_provenance(), caption("module_tree"))
