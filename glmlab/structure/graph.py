"""Classes as data: a :class:`ClassGraph` of nodes and arrows, to filter, to ask, and to hand to other tools.

It knows nothing of where the classes come from: live.py reads them from Python, source.py from text. Nothing here
imports torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import pandas as pd

from glmlab.core.errors import GlmlabError

NodeKind = Literal["class", "mixin", "torch", "auto", "outside"]
"""``torch``: a class of PyTorch; ``auto``: of transformers' Auto side; ``outside``: known by its name only."""

ArrowKind = Literal["inherits", "has", "builds"]

Members = Literal["calls", "public", "all", "none"] | Sequence[str]
"""Which members are shown: what a user calls, all public ones, all, none, or those of the names given."""

USER_CALLS = (
    "__call__",
    "forward",
    "generate",
    "from_pretrained",
    "from_config",
    "save_pretrained",
    "push_to_hub",
    "prepare_inputs_for_generation",
    "get_input_embeddings",
    "get_output_embeddings",
    "resize_token_embeddings",
    "set_attn_implementation",
    "can_generate",
    "num_parameters",
    "load_adapter",
    "add_adapter",
    "parameters",
    "named_modules",
    "state_dict",
    "to",
    "eval",
    "train",
    "register",
    "for_model",
    "to_dict",
)
"""What users call on a model, a config or an Auto class; every other member of a library class is its own affair."""

_LIBRARIES = ("torch", "transformers")
_STANDARD_LIBRARY = ("abc", "typing", "collections", "enum", "contextlib")


class StructureError(GlmlabError):
    """What was given has no structure to show; the text says why and what to give instead."""


@dataclass(frozen=True)
class Member:
    """A method or property in the class that defines it."""

    name: str
    kind: Literal["method", "class method", "static method", "property"] = "method"
    abstract: bool = False
    overrides: str | None = None
    """The next class in the MRO that defines the same name, or None."""

    @property
    def label(self) -> str:
        """The member as a diagram writes it.

        Example:
            >>> Member("forward").label, Member("device", "property").label
            ('forward()', 'device')
        """
        return self.name if self.kind == "property" else f"{self.name}()"


@dataclass(frozen=True)
class Part:
    """What an instance of a class holds: an attribute, the class of what is in it, and how many."""

    attribute: str
    class_name: str
    at_least: int | None = 1
    """Fewest over all instances in the model; None where source alone does not tell."""
    at_most: int | None = 1

    @property
    def count(self) -> str:
        """How many, where it is not simply one.

        Example:
            >>> Part("layers", "Block", 28, 28).count, Part("mlp", "Moe", 0, 1).count
            ('28 x', '0..1 x')
        """
        if self.at_least is None or self.at_most is None:
            return "n x"
        if self.at_least != self.at_most:
            return f"{self.at_least}..{self.at_most} x"
        return "" if self.at_most == 1 else f"{self.at_most} x"

    @property
    def label(self) -> str:
        """Attribute, count and class.

        Example:
            >>> Part("layers", "GlmDecoderLayer", 28, 28).label
            'layers: 28 x GlmDecoderLayer'
        """
        return f"{self.attribute}: {f'{self.count} ' if self.count else ''}{self.class_name}"


@dataclass(frozen=True)
class ClassNode:
    """One class: where it is defined, what it inherits, what it defines and what it holds."""

    name: str
    module: str
    bases: tuple[str, ...]
    """Direct bases in the order of the class statement, without ``object``."""
    mro: tuple[str, ...]
    """Itself and everything it inherits from in the order of look-up, without ``object``."""
    members: tuple[Member, ...] = ()
    """All that the class itself defines, in its own order."""
    parts: tuple[Part, ...] = ()
    kind: NodeKind = "class"

    @property
    def abstract(self) -> bool:
        """Whether it defines an abstract method."""
        return any(member.abstract for member in self.members)

    def defines(self, name: str) -> bool:
        """Whether the class itself defines a member of this name."""
        return any(member.name == name for member in self.members)


@dataclass(frozen=True)
class Arrow:
    """A relation between two classes that are both in the picture."""

    kind: ArrowKind
    source: str
    target: str
    label: str = ""


@dataclass(frozen=True)
class ClassGraph:
    """Classes and their relations. Filtering hides classes; what they contribute can still be asked.

    In JupyterLab it shows itself as a mermaid class diagram.
    """

    classes: Mapping[str, ClassNode]
    """Every class by name, the hidden ones too."""
    roots: tuple[str, ...]
    """The classes that were asked for."""
    builds: tuple[Arrow, ...] = ()
    """Who makes instances of whom: transformers' Auto side."""
    members: Members = "calls"
    hidden: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def nodes(self) -> tuple[ClassNode, ...]:
        """The classes that are not hidden."""
        return tuple(node for node in self.classes.values() if node.name not in self.hidden)

    @property
    def arrows(self) -> tuple[Arrow, ...]:
        """Relations between visible classes: bases in order, then parts, then who builds whom.

        Where a class between two others is hidden, the arrow says which: ``via GlmPreTrainedModel``.
        """
        found: list[Arrow] = []
        for node in self.nodes:
            found += self._inheritance(node)
        for node in self.nodes:
            for part in node.parts:
                if self._visible(part.class_name):
                    label = f"{part.attribute}: {part.count}" if part.count else part.attribute
                    found.append(Arrow("has", node.name, part.class_name, label))
        found += [arrow for arrow in self.builds if self._visible(arrow.source) and self._visible(arrow.target)]
        return tuple(found)

    def _visible(self, name: str) -> bool:
        return name in self.classes and name not in self.hidden

    def _inheritance(self, node: ClassNode) -> list[Arrow]:
        """Arrows to the nearest visible ancestors; a base that another one leads to anyway gets none twice."""
        found: dict[str, Arrow] = {}
        waiting: list[tuple[str, tuple[str, ...]]] = [(base, ()) for base in reversed(node.bases)]
        while waiting:
            name, between = waiting.pop()
            if self._visible(name):
                label = f"via {', '.join(between)}" if between else ""
                found.setdefault(name, Arrow("inherits", node.name, name, label))
            elif name in self.classes:
                waiting += [(base, (*between, name)) for base in reversed(self.classes[name].bases)]
        reached = {above for name in found for above in self.classes[name].mro[1:]}
        return [arrow for name, arrow in found.items() if not arrow.label or name not in reached]

    def shown_members(self, node: ClassNode) -> tuple[Member, ...]:
        """Members that a picture of this graph shows; abstract ones always unless it shows none."""
        return tuple(member for member in node.members if self._shown(node, member))

    def _shown(self, node: ClassNode, member: Member) -> bool:
        if self.members == "none":
            return False
        if self.members == "all" or member.abstract:
            return True
        if self.members == "public":
            return not member.name.startswith("_")
        if self.members == "calls":
            in_library = node.module.partition(".")[0] in _LIBRARIES
            return member.name in USER_CALLS if in_library else not member.name.startswith("_")
        return member.name in self.members

    def shown_parts(self, node: ClassNode) -> tuple[Part, ...]:
        """Parts that no arrow shows, because their class is not in the picture."""
        return tuple(part for part in node.parts if not self._visible(part.class_name))

    def select(
        self,
        *,
        depth: int | None = None,
        include: str | Sequence[str] | None = None,
        members: Members | None = None,
    ) -> "ClassGraph":
        """Hide classes by distance and by name, and choose the members that are shown.

        Args:
            depth: most steps away from the roots, along bases, parts and (both ways) who builds whom.
            include: shell patterns of class names, such as ``"Glm*"``; the first root always stays.
            members: see :data:`Members`.

        Raises:
            StructureError: a negative depth, a pattern that no class matches, or an unknown ``members``.

        Example:
            >>> lattice = [ClassNode("A", "m", (), ("A",)), ClassNode("B", "m", ("A",), ("B", "A")),
            ...            ClassNode("C", "m", ("B",), ("C", "B", "A"))]
            >>> graph = build_graph(lattice, roots=["C"])
            >>> [node.name for node in graph.select(depth=1).nodes]
            ['B', 'C']
            >>> graph.select(include="A").arrows
            (Arrow(kind='inherits', source='C', target='A', label='via B'),)
        """
        if members is not None and isinstance(members, str) and members not in ("calls", "public", "all", "none"):
            raise StructureError(f"members={members!r} is not known. Use calls, public, all, none, or a list of names.")
        hidden = set(self.hidden)
        if depth is not None:
            if depth < 0:
                raise StructureError(f"depth={depth} is negative. Use 0 for the class alone, None for everything.")
            near = self._within(depth)
            hidden |= {name for name in self.classes if name not in near}
        if include is not None:
            patterns = [include] if isinstance(include, str) else list(include)
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in self.classes):
                    raise StructureError(
                        f"no class matches {pattern!r}. The classes are {', '.join(sorted(self.classes))}."
                    )
            hidden |= {
                name
                for name in self.classes
                if name != self.roots[0] and not any(fnmatchcase(name, pattern) for pattern in patterns)
            }
        return replace(self, hidden=frozenset(hidden), members=self.members if members is None else members)

    def _within(self, depth: int) -> set[str]:
        reached = frontier = set(self.roots)
        for _ in range(depth):
            frontier = {near for name in frontier for near in self._neighbours(name)} - reached
            reached = reached | frontier
        return reached

    def _neighbours(self, name: str) -> set[str]:
        node = self.classes[name]
        near = {*node.bases, *(part.class_name for part in node.parts)}
        for arrow in self.builds:
            if name in (arrow.source, arrow.target):
                near |= {arrow.source, arrow.target}
        return near & set(self.classes)

    def definers(self, call: str, root: str | None = None) -> tuple[str, ...]:
        """Classes of a class's MRO that define ``call``, in order: Python takes the first.

        Args:
            call: name of a member.
            root: the class that is called; the first of the roots without it.

        Raises:
            StructureError: ``root`` is not in the graph.
        """
        return tuple(name for name in self._node(root or self.roots[0]).mro if self.classes[name].defines(call))

    def _node(self, name: str) -> ClassNode:
        if name not in self.classes:
            raise StructureError(f"no class {name!r} in this graph. It has {', '.join(sorted(self.classes))}.")
        return self.classes[name]

    def calls(self, names: Iterable[str] = USER_CALLS, root: str | None = None) -> pd.DataFrame:
        """Which class answers a call, and which definitions it hides; calls that nothing answers are left out.

        Example:
            >>> base = ClassNode("Base", "m", (), ("Base",), (Member("forward"),))
            >>> leaf = ClassNode("Leaf", "m", ("Base",), ("Leaf", "Base"), (Member("forward"),))
            >>> build_graph([base, leaf], roots=["Leaf"]).calls(["forward"]).to_dict("records")
            [{'call': 'forward', 'defined in': 'Leaf', 'hides': 'Base'}]
        """
        rows = [(name, self.definers(name, root)) for name in names]
        return pd.DataFrame(
            [(name, found[0], ", ".join(found[1:])) for name, found in rows if found],
            columns=["call", "defined in", "hides"],
        )

    def contributions(self, name: str, root: str | None = None) -> tuple[str, ...]:
        """Members of a class's own that reach the root unhidden: what the root would lose without the class.

        Raises:
            StructureError: the class is not in the graph, or not one of the root's ancestors.
        """
        lineage = self._node(root or self.roots[0]).mro
        if self._node(name).name not in lineage:
            raise StructureError(f"{name} is no ancestor of {lineage[0]}. Its ancestors are {', '.join(lineage[1:])}.")
        return tuple(m.name for m in self.classes[name].members if self.definers(m.name, lineage[0])[0] == name)

    def to_frame(self) -> pd.DataFrame:
        """Visible relations as a table: relation, source, target, label."""
        rows = [(arrow.kind, arrow.source, arrow.target, arrow.label) for arrow in self.arrows]
        return pd.DataFrame(rows, columns=["relation", "source", "target", "label"])

    def to_mermaid(self) -> str:
        """Text of a mermaid ``classDiagram``.

        Example:
            >>> print(build_graph([ClassNode("A", "m", (), ("A",), (Member("run"),))], roots=["A"]).to_mermaid())
            %%{init: {"class": {"hideEmptyMembersBox": true}}}%%
            classDiagram
                accTitle: ClassGraph of A; 1 classes, 0 arrows
                direction BT
                class A["A"] {
                    run()
                }
        """
        ids = {node.name: _identifier(node.name) for node in self.nodes}
        lines = ['%%{init: {"class": {"hideEmptyMembersBox": true}}}%%', "classDiagram"]
        lines += [f"    accTitle: {repr(self).replace(':', ';')}", "    direction BT"]  # the picture's alt text
        for node in self.nodes:
            inside = [f"<<{node.kind}>>"] if node.kind != "class" else []
            inside += [_mermaid_text(part.label) for part in self.shown_parts(node)]
            inside += [f"{member.label}{'*' if member.abstract else ''}" for member in self.shown_members(node)]
            lines.append(f'    class {ids[node.name]}["{node.name}"]' + (" {" if inside else ""))
            lines += [f"        {line}" for line in inside]
            lines += ["    }"] if inside else []
        for arrow in self.arrows:  # from the lower end to the upper: bases, wholes and builders stand above
            label = f" : {_mermaid_text(arrow.label)}" if arrow.label else ""
            source, target = ids[arrow.source], ids[arrow.target]
            relation = {"inherits": f"{source} --|> {target}", "has": f"{target} --* {source}"}
            lines.append(f"    {relation.get(arrow.kind, f'{target} <.. {source}')}{label}")
        return "\n".join(lines)

    def to_plantuml(self) -> str:
        """Text of a PlantUML class diagram.

        Example:
            >>> node = ClassNode("A", "m", (), ("A",), (Member("run", abstract=True),))
            >>> print(build_graph([node], roots=["A"]).to_plantuml())
            @startuml
            hide empty members
            abstract class "A" as A {
                {abstract} run()
            }
            @enduml
        """
        ids = {node.name: _identifier(node.name) for node in self.nodes}
        lines = ["@startuml", "hide empty members"]
        for node in self.nodes:
            inside = [f"{{field}} {part.label}" for part in self.shown_parts(node)]
            inside += [f"{'{abstract} ' if m.abstract else ''}{m.label}" for m in self.shown_members(node)]
            stereotype = f" <<{node.kind}>>" if node.kind != "class" else ""
            head = f'{"abstract " if node.abstract else ""}class "{node.name}" as {ids[node.name]}{stereotype}'
            lines.append(head + (" {" if inside else ""))
            lines += [f"    {line}" for line in inside]
            lines += ["}"] if inside else []
        signs = {"inherits": "--|>", "has": "*--", "builds": "..>"}
        for arrow in self.arrows:
            label = f" : {arrow.label}" if arrow.label else ""
            lines.append(f"{ids[arrow.source]} {signs[arrow.kind]} {ids[arrow.target]}{label}")
        return "\n".join([*lines, "@enduml"])

    def __repr__(self) -> str:
        return (
            f"ClassGraph of {', '.join(self.roots)}: {len(self.nodes)} classes"
            + (f" ({len(self.hidden)} hidden)" if self.hidden else "")
            + f", {len(self.arrows)} arrows"
        )

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {"text/vnd.mermaid": self.to_mermaid(), "text/plain": repr(self)}


def build_graph(
    classes: Iterable[ClassNode],
    roots: Sequence[str],
    builds: Iterable[Arrow] = (),
    members: Members = "calls",
) -> ClassGraph:
    """Put classes together: notes what each member overrides, and tells mixins from ordinary bases.

    A mixin is a class named so, or one that brings methods but no ``__init__``, and is inherited beside a base that
    has one and with which it shares no ancestor. What a mixin inherits from is a mixin, too.
    """
    by_name = {node.name: node for node in classes}
    mixins = _mixins(by_name)
    noted = {}
    for node in by_name.values():
        kind = "mixin" if node.name in mixins else node.kind
        lineage = [by_name[name] for name in node.mro[1:] if name in by_name]
        seen = [
            replace(m, overrides=next((above.name for above in lineage if above.defines(m.name)), None))
            for m in node.members
        ]
        noted[node.name] = replace(node, kind=kind, members=tuple(seen))
    return ClassGraph(noted, tuple(roots), tuple(builds), members)


def _mixins(classes: Mapping[str, ClassNode]) -> set[str]:
    def has_init(name: str) -> bool:
        return any(above not in classes or classes[above].defines("__init__") for above in classes[name].mro)

    found = {name for name, node in classes.items() if name.endswith("Mixin") and node.kind in ("class", "outside")}
    for node in classes.values():
        for base in node.bases:
            if base not in classes or classes[base].kind != "class" or has_init(base) or not classes[base].members:
                continue
            others = [classes[other] for other in node.bases if other != base and other in classes]
            apart = all(not set(classes[base].mro) & set(other.mro) for other in others)
            if apart and any(other.kind == "outside" or has_init(other.name) for other in others):
                found.add(base)
    return found | {
        above
        for name in found
        for above in classes[name].mro
        if above in classes and classes[above].kind == "class" and not has_init(above)
    }


def join(graph: ClassGraph, other: ClassGraph) -> ClassGraph:
    """Both graphs in one; where one knows a class by its name only, the other's knowledge fills in.

    Example:
        >>> file = build_graph([ClassNode("Model", "m", ("Base",), ("Model", "Base")),
        ...     ClassNode("Base", "library", (), ("Base",), kind="outside")], roots=["Model"])
        >>> library = build_graph([ClassNode("Base", "library", ("Root",), ("Base", "Root")),
        ...     ClassNode("Root", "library", (), ("Root",))], roots=["Base"])
        >>> join(file, library).classes["Model"].mro
        ('Model', 'Base', 'Root')
    """
    classes = dict(other.classes)
    for name, node in graph.classes.items():
        if name not in classes or node.bases or node.members:
            classes[name] = node
    lineages = linearize({name: node.bases for name, node in classes.items()})
    builds = dict.fromkeys([*graph.builds, *other.builds])
    joined = [
        replace(node, mro=lineages[name], kind="class" if node.kind == "mixin" else node.kind)
        for name, node in classes.items()
    ]
    return build_graph(joined, graph.roots, builds, graph.members)


def linearize(bases: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Every class's MRO from names alone: Python itself computes it, on empty classes of the same shape.

    Raises:
        StructureError: a class inherits from itself, its bases have no common order, or a name is none for a class.

    Example:
        >>> linearize({"A": [], "B": ["A"], "C": ["A"], "D": ["B", "C"]})["D"]
        ('D', 'B', 'C', 'A')
    """
    made: dict[str, type] = {}

    def make(name: str, below: tuple[str, ...]) -> type:
        if name in below:
            raise StructureError(f"{' -> '.join([*below, name])}: a class cannot inherit from itself. Mend the source.")
        if name not in made:
            above = tuple(make(base, (*below, name)) for base in bases.get(name, ()))
            try:
                made[name] = type(name, above, {})
            except TypeError as error:
                raise StructureError(f"{name}({', '.join(bases[name])}) has no order of look-up: {error}") from error
            except ValueError as error:
                raise StructureError(f"{name!r} cannot be the name of a class ({error}). Mend the source.") from error
        return made[name]

    return {name: tuple(cls.__name__ for cls in make(name, ()).__mro__[:-1]) for name in bases}


def standard_library(module: str) -> bool:
    """Whether a base such as ``abc.ABC`` or ``typing.Generic`` comes from here: no part of a model's design."""
    return module.partition(".")[0] in _STANDARD_LIBRARY


def _identifier(name: str) -> str:
    return "".join(char if char.isalnum() or char == "_" else "_" for char in name)


def _mermaid_text(text: str) -> str:
    """No character that mermaid reads as syntax."""
    return text.replace('"', "'").replace("{", "(").replace("}", ")").replace(": ", " ").replace("~", "-")
