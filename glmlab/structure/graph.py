"""Classes as data: a :class:`ClassGraph` of classes and arrows, to filter, to query and to export.

live.py builds graphs from Python objects, source.py from text. Nothing here imports torch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import pandas as pd

from glmlab.core.errors import GlmlabError

NodeKind = Literal["class", "mixin", "torch", "auto", "config", "suite", "outside"]
"""``torch``: a class of PyTorch; ``auto``: an Auto class of transformers; ``outside``: only its name is known."""

ArrowKind = Literal["inherits", "has", "builds"]

MemberKind = Literal["method", "class method", "static method", "property"]

Members = Literal["calls", "all", "none"]
"""Which members are shown: of classes of PyTorch and transformers those in :data:`USER_CALLS`, of others the public
ones; all; or none."""

USER_CALLS = (
    "__call__", "forward", "generate", "from_pretrained", "from_config", "save_pretrained", "push_to_hub",
    "prepare_inputs_for_generation", "get_input_embeddings", "get_output_embeddings", "resize_token_embeddings",
    "set_attn_implementation", "can_generate", "num_parameters", "load_adapter", "add_adapter", "parameters",
    "named_modules", "state_dict", "to", "eval", "train", "register", "for_model", "to_dict",
)  # fmt: skip
"""What users call on a model, a config or an Auto class; other members of library classes are not shown."""

_LIBRARIES = ("torch", "transformers")


class StructureError(GlmlabError):
    """The given object has no structure to show; the message says why and what to give instead."""


@dataclass(frozen=True)
class Member:
    """A method or property of the class that defines it."""

    name: str
    kind: MemberKind = "method"
    abstract: bool = False
    overrides: str | None = None  # the next class in the MRO that defines the same name

    @property
    def label(self) -> str:
        """The member as diagrams write it: ``forward()``, or ``device`` for a property."""
        return self.name if self.kind == "property" else f"{self.name}()"


@dataclass(frozen=True)
class Part:
    """What instances of a class hold: an attribute, the class of its value, and how many.

    The counts are the fewest and the most over all instances in the model; None if the source alone does not say.
    """

    attribute: str
    class_name: str
    at_least: int | None = 1
    at_most: int | None = 1

    @property
    def count(self) -> str:
        """How many, if not exactly one.

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
        """Attribute, count and class: ``layers: 28 x GlmDecoderLayer``."""
        return f"{self.attribute}: {f'{self.count} ' if self.count else ''}{self.class_name}"


@dataclass(frozen=True)
class ClassNode:
    """One class: where it is defined, what it inherits from, what it defines and what it holds."""

    name: str
    module: str
    bases: tuple[str, ...]  # in the order of the class statement, without object
    mro: tuple[str, ...]  # the class and all its ancestors, without object
    members: tuple[Member, ...] = ()  # in the order of the class statement
    parts: tuple[Part, ...] = ()
    kind: NodeKind = "class"

    def defines(self, name: str) -> bool:
        """Whether the class itself defines a member of this name."""
        return any(member.name == name for member in self.members)


@dataclass(frozen=True)
class Arrow:
    """A relation between two visible classes."""

    kind: ArrowKind
    source: str
    target: str
    label: str = ""


@dataclass(frozen=True)
class ClassGraph:
    """Classes and their relations. Filtering hides classes; hidden ones still answer questions.

    JupyterLab shows it as a mermaid class diagram.
    """

    classes: Mapping[str, ClassNode]  # by name, hidden ones included
    roots: tuple[str, ...]  # the classes that were asked for
    builds: tuple[Arrow, ...] = ()  # which Auto class or config leads to which class
    members: Members = "calls"
    hidden: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def nodes(self) -> tuple[ClassNode, ...]:
        """The visible classes."""
        return tuple(node for node in self.classes.values() if node.name not in self.hidden)

    @property
    def arrows(self) -> tuple[Arrow, ...]:
        """Relations between visible classes: bases in order, then parts, then builders.

        If a class between two others is hidden, the arrow names it: ``via GlmPreTrainedModel``.
        """
        found = [arrow for node in self.nodes for arrow in self._inheritance(node)]
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
        """Arrows to the nearest visible ancestors; past a hidden class only to those that no other arrow reaches."""
        nearest: dict[str, tuple[str, ...]] = {}
        for name, between in self._visible_bases(node):
            nearest.setdefault(name, between)
        reached = {above for name in nearest for above in self.classes[name].mro[1:]}
        return [
            Arrow("inherits", node.name, name, f"via {', '.join(between)}" if between else "")
            for name, between in nearest.items()
            if not between or name not in reached
        ]

    def _visible_bases(self, node: ClassNode, between: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The nearest visible ancestors, each with the hidden classes in between."""
        for base in node.bases:
            if self._visible(base):
                yield base, between
            elif base in self.classes:
                yield from self._visible_bases(self.classes[base], (*between, base))

    def _shows(self, node: ClassNode, member: Member) -> bool:
        """Whether a picture shows a member; abstract ones always, unless it shows none."""
        if self.members == "none":
            return False
        if self.members == "all" or member.abstract:
            return True
        if node.module.partition(".")[0] in _LIBRARIES:
            return member.name in USER_CALLS
        return not member.name.startswith("_")

    def select(
        self,
        *,
        depth: int | None = None,
        include: str | Sequence[str] | None = None,
        members: Members | None = None,
    ) -> "ClassGraph":
        """Hide classes by distance and by name, and choose the members that are shown.

        Args:
            depth: most steps away from the roots, along bases, parts and (both ways) builders.
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
        if members is not None and members not in get_args(Members):
            raise StructureError(f"members={members!r} is not known. Use {', '.join(get_args(Members))}.")
        kept = set(self.classes) - self.hidden
        if depth is not None:
            if depth < 0:
                raise StructureError(f"depth={depth} is negative. Use 0 for the class alone, None for everything.")
            kept &= self._within(depth)
        if include is not None:
            named = {self.roots[0]}
            for pattern in [include] if isinstance(include, str) else include:
                if not (matching := {name for name in self.classes if fnmatchcase(name, pattern)}):
                    raise StructureError(
                        f"no class matches {pattern!r}. The classes are {', '.join(sorted(self.classes))}."
                    )
                named |= matching
            kept &= named
        return replace(self, hidden=frozenset(set(self.classes) - kept), members=members or self.members)

    def _within(self, depth: int) -> set[str]:
        """Classes at most so many steps away from the roots."""
        steps: dict[str, set[str]] = {
            name: {*node.bases, *(part.class_name for part in node.parts)} for name, node in self.classes.items()
        }
        for arrow in self.builds:
            steps[arrow.source].add(arrow.target)
            steps[arrow.target].add(arrow.source)
        reached = set(self.roots)
        for _ in range(depth):
            reached |= {near for name in reached for near in steps[name] if near in self.classes}
        return reached

    def definers(self, call: str) -> tuple[str, ...]:
        """Classes of the first root's MRO that define a member of this name; Python takes the first."""
        return tuple(name for name in self.classes[self.roots[0]].mro if self.classes[name].defines(call))

    def calls(self, names: Iterable[str] = USER_CALLS) -> pd.DataFrame:
        """Which class answers a call, and which definitions it hides; calls that no class defines are left out.

        Example:
            >>> base = ClassNode("Base", "m", (), ("Base",), (Member("forward"),))
            >>> leaf = ClassNode("Leaf", "m", ("Base",), ("Leaf", "Base"), (Member("forward"),))
            >>> build_graph([base, leaf], roots=["Leaf"]).calls(["forward"]).to_dict("records")
            [{'call': 'forward', 'defined in': 'Leaf', 'hides': 'Base'}]
        """
        rows = [(name, self.definers(name)) for name in names]
        return pd.DataFrame(
            [(name, found[0], ", ".join(found[1:])) for name, found in rows if found],
            columns=["call", "defined in", "hides"],
        )

    def to_frame(self) -> pd.DataFrame:
        """Everything that a picture of the graph shows, one row each; a picture can be drawn from it alone.

        ========== ============= ============= ================== =================================
        row        source        target        label              note
        ========== ============= ============= ================== =================================
        class      the class                   its kind           ``root``, ``abstract``, or both
        attribute  the class                   q_proj: nn.Linear
        member     the class                   forward()          ``abstract``, ``overridden``
        inherits   the class     its base      via GlmModel
        has        the whole     the part      layers: 28 x
        builds     the builder   what it makes model_type 'glm'
        ========== ============= ============= ================== =================================

        Example:
            >>> graph = build_graph([ClassNode("A", "m", (), ("A",), (Member("run", abstract=True),))], roots=["A"])
            >>> graph.to_frame().values.tolist()
            [['class', 'A', '', 'class', 'root abstract'], ['member', 'A', '', 'run()', 'abstract']]
        """
        shown = {node.name: [m for m in node.members if self._shows(node, m)] for node in self.nodes}
        overridden = {(member.overrides, member.name) for members in shown.values() for member in members}
        rows: list[tuple[str, ...]] = []
        for node in self.nodes:
            notes = {"root": node.name in self.roots, "abstract": any(member.abstract for member in node.members)}
            rows.append(("class", node.name, "", node.kind, _noted(notes)))
            for part in node.parts:
                if not self._visible(part.class_name):
                    rows.append(("attribute", node.name, "", part.label, ""))
            for member in shown[node.name]:
                notes = {"abstract": member.abstract, "overridden": (node.name, member.name) in overridden}
                rows.append(("member", node.name, "", member.label, _noted(notes)))
        rows += [(arrow.kind, arrow.source, arrow.target, arrow.label, "") for arrow in self.arrows]
        return pd.DataFrame(rows, columns=["row", "source", "target", "label", "note"])

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
        lines = ['%%{init: {"class": {"hideEmptyMembersBox": true}}}%%', "classDiagram"]
        lines += [f"    accTitle: {repr(self).replace(':', ';')}", "    direction BT"]  # accTitle: the alternative text
        inside: dict[str, list[str]] = {}
        for row, name, target, label, note in self.to_frame().itertuples(index=False):
            if row == "class":
                inside[name] = [f"<<{label}>>"] if label != "class" else []
            elif not target:
                text = label if row == "member" else _mermaid_text(label)
                inside[name].append(f"{text}{'*' if 'abstract' in note else ''}")
        for name, texts in inside.items():
            head = f'    class {_identifier(name)}["{name}"]'
            lines += [f"{head} {{", *(f"        {text}" for text in texts), "    }"] if texts else [head]
        for arrow in self.arrows:  # from the lower end to the upper: bases, wholes and builders stand above
            label = f" : {_mermaid_text(arrow.label)}" if arrow.label else ""
            source, target = _identifier(arrow.source), _identifier(arrow.target)
            relation = {"inherits": f"{source} --|> {target}", "has": f"{target} --* {source}"}
            lines.append(f"    {relation.get(arrow.kind, f'{target} <.. {source}')}{label}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        hidden = f" ({len(self.hidden)} hidden)" if self.hidden else ""
        return f"ClassGraph of {', '.join(self.roots)}: {len(self.nodes)} classes{hidden}, {len(self.arrows)} arrows"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {"text/vnd.mermaid": self.to_mermaid(), "text/plain": repr(self)}


def build_graph(classes: Iterable[ClassNode], roots: Sequence[str], builds: Iterable[Arrow] = ()) -> ClassGraph:
    """Put classes together: note what each member overrides, and mark mixins.

    A mixin is a class whose name ends in Mixin, or a class without ``__init__`` that is inherited beside one with.
    """
    by_name = {node.name: node for node in classes}
    mixins = _mixins(by_name)
    noted = {}
    for node in by_name.values():
        lineage = [by_name[name] for name in node.mro[1:] if name in by_name]
        seen = [
            replace(m, overrides=next((above.name for above in lineage if above.defines(m.name)), None))
            for m in node.members
        ]
        kind = "mixin" if node.name in mixins else node.kind
        noted[node.name] = replace(node, kind=kind, members=tuple(seen))
    return ClassGraph(noted, tuple(roots), tuple(builds))


def _mixins(classes: Mapping[str, ClassNode]) -> set[str]:
    def may_have_init(name: str) -> bool:
        lineage = [classes.get(above) for above in classes[name].mro] if name in classes else [None]
        return any(node is None or node.kind == "outside" or node.defines("__init__") for node in lineage)

    named = {name for name, node in classes.items() if name.endswith("Mixin") and node.kind in ("class", "outside")}
    with_init = {name for name in classes if may_have_init(name)}
    beside = {base for node in classes.values() if with_init.intersection(node.bases) for base in node.bases}
    return named | {name for name in beside - with_init if name in classes and classes[name].kind == "class"}


def _noted(notes: Mapping[str, bool]) -> str:
    return " ".join(note for note, holds in notes.items() if holds)


def _identifier(name: str) -> str:
    return "".join(char if char.isalnum() or char == "_" else "_" for char in name)


def _mermaid_text(text: str) -> str:
    """The text without characters that mermaid reads as syntax."""
    return text.replace('"', "'").replace("{", "(").replace("}", ")").replace(": ", " ").replace("~", "-")
