"""Class graphs can be filtered by distance and name, queried, and exported."""

import pytest

from glmlab.structure.graph import Arrow, ClassNode, Member, Part, StructureError, build_graph
from glmlab.structure.source import join, linearize


def _graph():
    nodes = [
        ClassNode("Leaf", "m", ("Middle", "SaveMixin"), ("Leaf", "Middle", "Top", "SaveMixin"), (Member("run"),)),
        ClassNode("Middle", "m", ("Top",), ("Middle", "Top"), (Member("__init__"), Member("run")),
                  (Part("layers", "Layer", 3, 3), Part("head", "nn.Linear"))),
        ClassNode("Top", "m", (), ("Top",), (Member("run", abstract=True), Member("_hidden"))),
        ClassNode("SaveMixin", "m", (), ("SaveMixin",), (Member("save"),)),
        ClassNode("Layer", "m", (), ("Layer",)),
        ClassNode("Maker", "m", (), ("Maker",), kind="auto"),
    ]  # fmt: skip
    return build_graph(nodes, ["Leaf"], [Arrow("builds", "Maker", "Leaf", "builds")])


def _names(graph) -> set[str]:
    return {node.name for node in graph.nodes}


def _labels(graph, row: str, name: str) -> list[str]:
    table = graph.to_frame()
    return table.loc[(table["row"] == row) & (table["source"] == name), "label"].tolist()


class TestSelect:
    def test_depth_counts_steps_along_bases_parts_and_builders(self):
        graph = _graph()
        assert _names(graph.select(depth=0)) == {"Leaf"}
        assert _names(graph.select(depth=1)) == {"Leaf", "Middle", "SaveMixin", "Maker"}
        assert _names(graph.select(depth=2)) == _names(graph)
        assert _names(graph.select(depth=1).select(depth=2)) == _names(graph.select(depth=1)), "hidden stays hidden"

    def test_names_are_patterns_and_the_root_stays(self):
        assert _names(_graph().select(include=["*Mixin", "Top"])) == {"Leaf", "Top", "SaveMixin"}

    def test_an_arrow_names_the_hidden_classes_between_its_ends(self):
        arrows = _graph().select(include=["Top", "Layer"]).arrows
        assert arrows == (Arrow("inherits", "Leaf", "Top", "via Middle"),)

    def test_no_arrow_past_a_hidden_class_to_what_another_arrow_reaches(self):
        bases = {"A": [], "B": ["A"], "C": ["A"], "D": ["B", "C"]}
        lineages = linearize(bases)
        nodes = [ClassNode(name, "m", tuple(above), lineages[name]) for name, above in bases.items()]
        graph = build_graph(nodes, ["D"]).select(include=["A", "B"])
        assert [(arrow.source, arrow.target) for arrow in graph.arrows] == [("B", "A"), ("D", "B")]

    def test_hidden_parts_become_attributes_and_hidden_classes_still_answer(self):
        graph = _graph()
        assert _labels(graph, "attribute", "Middle") == ["head: nn.Linear"]
        assert _labels(graph.select(include=["Middle"]), "attribute", "Middle") == [
            "layers: 3 x Layer", "head: nn.Linear",
        ]  # fmt: skip
        assert graph.select(depth=0).definers("save") == ("SaveMixin",)

    @pytest.mark.parametrize(
        ("members", "shown"),
        [("all", ["run()", "_hidden()"]), ("calls", ["run()"]), ("none", [])],
    )
    def test_members_that_are_shown(self, members, shown):
        assert _labels(_graph().select(members=members), "member", "Top") == shown

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"depth": -1}, "depth=-1 is negative. Use 0"),
            ({"include": "Nobody*"}, r"no class matches 'Nobody\*'. The classes are Layer, Leaf"),
            ({"members": "some"}, "members='some' is not known. Use calls, all, none"),
        ],
    )
    def test_what_selects_nothing_is_refused(self, arguments, message):
        with pytest.raises(StructureError, match=message):
            _graph().select(**arguments)


def test_overridden_definitions_are_noted():
    (run,) = _graph().classes["Leaf"].members
    assert run.overrides == "Middle"
    assert _graph().calls(["run", "nothing"]).values.tolist() == [["run", "Leaf", "Middle, Top"]]


def test_the_table_has_everything_that_a_picture_shows():
    rows = _graph().to_frame().values.tolist()
    assert [row[:2] for row in rows].count(["class", "Leaf"]) == 1
    assert {row[1]: row[3:] for row in rows if row[0] == "class"} == {
        "Leaf": ["class", "root"], "Middle": ["class", ""], "Top": ["class", "abstract"], "SaveMixin": ["mixin", ""],
        "Layer": ["class", ""], "Maker": ["auto", ""],
    }  # fmt: skip
    assert [row for row in rows if row[0] == "attribute"] == [["attribute", "Middle", "", "head: nn.Linear", ""]]
    assert [row[3:] for row in rows if row[:2] == ["member", "Top"]] == [["run()", "abstract overridden"]]
    arrows = [row[:4] for row in rows if row[2]]
    assert arrows == [[arrow.kind, arrow.source, arrow.target, arrow.label] for arrow in _graph().arrows]
    assert arrows[3] == ["has", "Middle", "Layer", "layers: 3 x"]


def test_jupyterlab_gets_a_mermaid_diagram_and_others_a_line():
    bundle = _graph()._repr_mimebundle_()
    assert bundle["text/plain"] == "ClassGraph of Leaf: 6 classes, 5 arrows"
    assert repr(_graph().select(depth=0)) == "ClassGraph of Leaf: 1 classes (5 hidden), 0 arrows"
    lines = bundle["text/vnd.mermaid"].splitlines()
    assert lines[1] == "classDiagram"
    assert {
        '    class Layer["Layer"]',  # no empty compartment
        "        run()*", "        <<mixin>>", "        head nn.Linear",
        "    Leaf --|> Middle", "    Layer --* Middle : layers 3 x", "    Leaf <.. Maker : builds",
    } <= set(lines)  # fmt: skip
    dotted = build_graph([ClassNode("nn.Module", "torch", (), ("nn.Module",), kind="torch")], ["nn.Module"])
    assert '    class nn_Module["nn.Module"] {' in dotted.to_mermaid().splitlines()


def test_join_fills_in_what_one_side_knows_by_name_only():
    stub = ClassNode("Top", "elsewhere", (), ("Top",), kind="outside")
    file = build_graph([ClassNode("Mine", "f", ("Top",), ("Mine", "Top"), (Member("run"),)), stub], ["Mine"])
    both = join(file, _graph())
    assert both.roots == ("Mine",)
    assert both.classes["Top"].kind == "class"
    assert both.classes["Mine"].members[0].overrides == "Top"
    assert both.builds == _graph().builds


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        (ClassNode("Loud", "m", (), ("Loud",), (Member("shout"),)), "mixin"),
        (ClassNode("Loud", "m", (), ("Loud",), (Member("__init__"),)), "class"),
        (ClassNode("Loud", "m", ("Unknown",), ("Loud", "Unknown"), (Member("shout"),)), "class"),
    ],
)
def test_a_mixin_has_no_init_beside_a_class_that_has_one(base, kind):
    main = ClassNode("Main", "m", (), ("Main",), (Member("__init__"),))
    unknown = ClassNode("Unknown", "elsewhere", (), ("Unknown",), kind="outside")
    leaf = ClassNode("Leaf", "m", ("Loud", "Main"), ("Leaf", *base.mro, "Main"))
    graph = build_graph([leaf, base, main, unknown], ["Leaf"])
    assert graph.classes["Loud"].kind == kind
    assert graph.classes["Main"].kind == "class"


@pytest.mark.parametrize(
    ("bases", "message"),
    [
        ({"A": ["B"], "B": ["A"]}, "A -> B -> A: a class cannot inherit from itself"),
        ({"A": [], "B": ["A"], "D": ["A", "B"]}, r"'D' with the bases \['A', 'B'\] cannot be a class: .*method res"),
        ({"A\0": []}, "cannot be a class: type name must not contain null"),
    ],
    ids=["circle", "order", "name"],
)
def test_classes_that_python_would_not_define_are_refused(bases, message):
    with pytest.raises(StructureError, match=message):
        linearize(bases)
