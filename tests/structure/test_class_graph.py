"""Graphs can be filtered by distance and name, asked, and written for other tools."""

import pytest

from glmlab.structure.graph import Arrow, ClassNode, Member, Part, StructureError, build_graph, join, linearize


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


class TestSelect:
    def test_depth_counts_steps_along_bases_parts_and_builders(self):
        graph = _graph()
        assert _names(graph.select(depth=0)) == {"Leaf"}
        assert _names(graph.select(depth=1)) == {"Leaf", "Middle", "SaveMixin", "Maker"}
        assert _names(graph.select(depth=2)) == _names(graph)

    def test_names_are_patterns_and_the_root_stays(self):
        graph = _graph().select(include=["*Mixin", "Top"])
        assert _names(graph) == {"Leaf", "Top", "SaveMixin"}

    def test_what_is_hidden_between_two_classes_is_said_on_the_arrow(self):
        arrows = _graph().select(include=["Top", "Layer"]).arrows
        assert arrows == (Arrow("inherits", "Leaf", "Top", "via Middle"),)

    def test_a_base_that_another_arrow_leads_to_gets_no_second_one(self):
        bases = {"A": [], "B": ["A"], "C": ["A"], "D": ["B", "C"]}
        lineages = linearize(bases)
        nodes = [ClassNode(name, "m", tuple(above), lineages[name]) for name, above in bases.items()]
        graph = build_graph(nodes, ["D"]).select(include=["A", "B"])
        assert [(arrow.source, arrow.target) for arrow in graph.arrows] == [("B", "A"), ("D", "B")]

    def test_hidden_parts_become_attributes(self):
        graph = _graph()
        middle = graph.classes["Middle"]
        assert [part.attribute for part in graph.shown_parts(middle)] == ["head"]
        assert [part.label for part in graph.select(include=["Middle"]).shown_parts(middle)] == [
            "layers: 3 x Layer", "head: nn.Linear",
        ]  # fmt: skip

    def test_hidden_classes_still_answer(self):
        assert _graph().select(depth=0).definers("save") == ("SaveMixin",)

    @pytest.mark.parametrize(
        ("members", "shown"),
        [("all", ["run", "_hidden"]), ("public", ["run"]), ("none", []), (["_hidden"], ["run", "_hidden"])],
    )
    def test_members_that_are_shown(self, members, shown):
        graph = _graph().select(members=members)
        assert [m.name for m in graph.shown_members(graph.classes["Top"])] == shown

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"depth": -1}, "depth=-1 is negative. Use 0"),
            ({"include": "Nobody*"}, r"no class matches 'Nobody\*'. The classes are Layer, Leaf"),
            ({"members": "some"}, "members='some' is not known. Use calls, public, all, none"),
        ],
    )
    def test_what_selects_nothing_is_refused(self, arguments, message):
        with pytest.raises(StructureError, match=message):
            _graph().select(**arguments)


class TestQuestions:
    def test_overridden_definitions_are_noted(self):
        (run,) = _graph().classes["Leaf"].members
        assert run.overrides == "Middle"
        assert _graph().calls(["run", "nothing"]).values.tolist() == [["run", "Leaf", "Middle, Top"]]

    def test_strangers_are_refused(self):
        with pytest.raises(StructureError, match="no class 'Nobody' in this graph. It has Layer"):
            _graph().definers("run", root="Nobody")
        with pytest.raises(StructureError, match="Layer is no ancestor of Leaf. Its ancestors are Middle, Top, S"):
            _graph().contributions("Layer")

    def test_table_of_arrows(self):
        table = _graph().to_frame()
        assert table["relation"].tolist() == ["inherits"] * 3 + ["has", "builds"]
        assert table.iloc[3].tolist() == ["has", "Middle", "Layer", "layers: 3 x"]


class TestTexts:
    def test_mermaid(self):
        text = _graph().to_mermaid()
        assert text.splitlines()[1] == "classDiagram"
        assert '"hideEmptyMembersBox": true' in text
        assert '    class Layer["Layer"]\n' in text, "no empty compartment"
        assert "        run()*\n" in text
        assert "        <<mixin>>\n" in text
        for line in ("Leaf --|> Middle", "Layer --* Middle : layers 3 x", "Leaf <.. Maker : builds"):
            assert f"    {line}\n" in f"{text}\n"

    def test_plantuml(self):
        lines = _graph().to_plantuml().splitlines()
        assert (lines[0], lines[-1]) == ("@startuml", "@enduml")
        assert lines[1] == "hide empty members"
        assert 'abstract class "Top" as Top {' in lines
        assert 'class "SaveMixin" as SaveMixin <<mixin>> {' in lines
        assert 'class "Layer" as Layer' in lines
        assert "Middle *-- Layer : layers: 3 x" in lines

    def test_names_with_dots_have_plain_identifiers(self):
        graph = build_graph([ClassNode("nn.Module", "torch", (), ("nn.Module",), kind="torch")], ["nn.Module"])
        assert 'class nn_Module["nn.Module"] {' in graph.to_mermaid()
        assert 'class "nn.Module" as nn_Module <<torch>>' in graph.to_plantuml()

    def test_jupyterlab_gets_mermaid_and_others_a_line(self):
        bundle = _graph()._repr_mimebundle_()
        assert bundle["text/vnd.mermaid"] == _graph().to_mermaid()
        assert bundle["text/plain"] == "ClassGraph of Leaf: 6 classes, 5 arrows"
        assert repr(_graph().select(depth=0)) == "ClassGraph of Leaf: 1 classes (5 hidden), 0 arrows"


def test_join_fills_in_what_one_side_knows_by_name_only():
    stub = ClassNode("Top", "elsewhere", (), ("Top",), kind="outside")
    file = build_graph([ClassNode("Mine", "f", ("Top",), ("Mine", "Top"), (Member("run"),)), stub], ["Mine"])
    both = join(file, _graph())
    assert both.roots == ("Mine",)
    assert both.classes["Top"].kind == "class"
    assert both.classes["Mine"].members[0].overrides == "Top"
    assert both.builds == _graph().builds


class TestLinearize:
    def test_equals_pythons_own(self):
        assert linearize({"O": [], "A": ["O"], "B": ["O"], "C": ["A", "B"]})["C"] == ("C", "A", "B", "O")

    def test_a_circle_is_refused(self):
        with pytest.raises(StructureError, match="A -> B -> A: a class cannot inherit from itself"):
            linearize({"A": ["B"], "B": ["A"]})

    def test_bases_without_a_common_order_are_refused(self):
        with pytest.raises(StructureError, match=r"D\(A, B\) has no order of look-up"):
            linearize({"A": [], "B": ["A"], "D": ["A", "B"]})
