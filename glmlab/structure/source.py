"""Class graphs of source that is never executed, and of class facts kept in a file.

Classes, bases, members and parts are read from the syntax tree; neither the file nor what it imports is imported.
"""

import ast
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from glmlab.structure.graph import Arrow, ClassGraph, ClassNode, Member, MemberKind, Part, StructureError, build_graph

_CONTAINERS = ("torch.nn.ModuleList", "torch.nn.ModuleDict", "torch.nn.Sequential")
_NO_MODULES = ("torch.nn.Parameter",)


def source_class_graph(folder_or_file: str | Path) -> ClassGraph:
    """Read the class graph of Python source without running it, such as a checkpoint's modeling_chatglm.py.

    Args:
        folder_or_file: a ``.py`` file, or a folder with ``modeling_*.py`` files. The ``auto_map`` of a config.json
            beside them says which Auto class leads to which class of the file.

    Returns:
        The classes of the file. Of bases from elsewhere only the name is known; :func:`join` fills them in. The roots
        are the classes in ``auto_map``, else those that no other class inherits from or holds. A part that a branch of
        ``__init__`` makes counts ``0..1``; how many a list holds, source does not say.

    Raises:
        StructureError: nothing there, no ``.py`` file, no ``modeling_*.py`` in the folder, text that is not UTF-8 or
            not Python, no class in it, or classes that inherit from each other in a circle.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "modeling_a.py")
        >>> _ = file.write_text("class A(Base): pass\\nraise SystemExit('not run')")
        >>> source_class_graph(file).classes["A"].bases
        ('Base',)
    """
    files = _find_sources(Path(folder_or_file).expanduser())
    modules = [_read_module(file) for file in files]
    local = {path: definition.name for module in modules for path, definition in module.classes.items()}
    if not local:
        raise StructureError(f"{', '.join(file.name for file in files)} defines no class. Give a file that does.")
    nodes: list[ClassNode] = []
    outside: dict[str, ClassNode] = {}
    for module in modules:
        for definition in module.classes.values():
            paths = [path for base in definition.bases if (path := module.path(base)) != "object"]
            outside |= {path: _outside(path, local) for path in paths if path not in local}
            bases = tuple(_name(path, local) for path in paths)
            reader = _InitReader(module, local)
            for statement in definition.body:
                if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
                    reader.read(statement.body)
            parts = tuple(reader.found.values())
            nodes.append(ClassNode(definition.name, module.name, bases, (), tuple(_members(definition)), parts))
    builds = _auto_map(files[0].with_name("config.json"), {node.name for node in nodes})
    makers = [_outside(f"transformers.{arrow.source}", local) for arrow in builds]
    return _assemble([*nodes, *outside.values(), *makers], builds)


def _find_sources(path: Path) -> list[Path]:
    if path.is_dir():
        if found := sorted(path.glob("modeling_*.py")):
            return found
        raise StructureError(
            f"{path} has no modeling_*.py. Checkpoints of models that transformers knows bring none: use class_graph "
            "on the loaded model; or give a .py file."
        )
    if not path.exists():
        raise StructureError(f"{path} is not there. Give a .py file, or the folder of a checkpoint.")
    if path.suffix != ".py":
        raise StructureError(f"{path.name} is not a .py file. Give Python source, or the folder of a checkpoint.")
    return [path]


@dataclass(frozen=True)
class _Module:
    """The syntax tree of a source file: its classes, and what its names stand for."""

    name: str
    classes: dict[str, ast.ClassDef]  # path -> definition, in the file's order
    names: dict[str, str]  # name in the file -> path: nn -> torch.nn

    def path(self, expression: ast.expr) -> str:
        """Full path of a dotted name: ``nn.Linear`` -> ``torch.nn.Linear``; local variables stay as they are."""
        if isinstance(expression, ast.Subscript):  # Generic[T]
            return self.path(expression.value)
        first, dot, rest = ast.unparse(expression).partition(".")
        return f"{self.names.get(first, first)}{dot}{rest}"


def _read_module(file: Path) -> _Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about the file's style
            tree = ast.parse(file.read_text(encoding="utf-8-sig"), file.name)  # like Python, skips a byte order mark
    except OSError as error:
        raise StructureError(f"{file} cannot be read ({error.strerror}).") from error
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:  # not UTF-8, not Python, nested too deeply
        raise StructureError(f"{file.name} is not Python source: {error}. Download it again, or fix it.") from error
    names: dict[str, str] = {}
    classes = {}
    for statement, _ in _statements(tree.body):
        if isinstance(statement, ast.Import):  # import a.b binds a
            names |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in statement.names
            }
        elif isinstance(statement, ast.ImportFrom):
            names |= {a.asname or a.name: f"{statement.module or ''}.{a.name}".lstrip(".") for a in statement.names}
        elif isinstance(statement, ast.ClassDef):
            names[statement.name] = f"{file.stem}.{statement.name}"
            classes[names[statement.name]] = statement
    return _Module(file.stem, classes, names)


def _statements(body: Iterable[ast.stmt], certain: bool = True) -> Iterator[tuple[ast.stmt, bool]]:
    """Statements with those inside their blocks, and whether each one runs whenever the body does."""
    for statement in body:
        yield statement, certain
        if isinstance(statement, (ast.With, ast.Try)):
            yield from _statements(statement.body, certain)
            for handler in getattr(statement, "handlers", ()):
                yield from _statements(handler.body, False)
        elif isinstance(statement, (ast.If, ast.For, ast.While)):
            yield from _statements([*statement.body, *statement.orelse], False)


def _name(path: str, local: Mapping[str, str]) -> str:
    """Name in the graph: plain, ``nn.`` for PyTorch's; the full path if a class of the files has the same name."""
    if path in local:
        return local[path]
    name = path.rpartition(".")[2]
    if path.startswith("torch.nn."):
        return f"nn.{name}"
    return path if name in local.values() else name


def _outside(path: str, local: Mapping[str, str]) -> ClassNode:
    name, module = _name(path, local), path.rpartition(".")[0]
    return ClassNode(name, module, (), (name,), kind="torch" if module.partition(".")[0] == "torch" else "outside")


_MEMBER_KINDS: dict[str, MemberKind] = {  # decorator -> kind
    "property": "property", "cached_property": "property", "classmethod": "class method",
    "staticmethod": "static method",
}  # fmt: skip


def _members(definition: ast.ClassDef) -> Iterable[Member]:
    found: dict[str, Member] = {}
    for statement, _ in _statements(definition.body):
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            marks = [ast.unparse(decorator).rpartition(".")[2] for decorator in statement.decorator_list]
            kind: MemberKind = next((_MEMBER_KINDS[mark] for mark in marks if mark in _MEMBER_KINDS), "method")
            found.setdefault(statement.name, Member(statement.name, kind, "abstractmethod" in marks))
    return found.values()


class _InitReader:
    """Notes in ``found`` what an ``__init__`` stores in self: instances of the files' classes and of torch.nn's.

    ``_made_by`` maps its local names to the classes that they make.
    """

    def __init__(self, module: _Module, local: Mapping[str, str]) -> None:
        self._module = module
        self._local = local
        self._made_by: dict[str, list[str]] = {}
        self.found: dict[tuple[str, str], Part] = {}

    def read(self, body: Iterable[ast.stmt]) -> None:
        for statement, certain in _statements(body):
            if isinstance(statement, ast.FunctionDef):
                returned = [node.value for node in ast.walk(statement) if isinstance(node, ast.Return)]
                self._made_by[statement.name] = [path for value in returned for path in self._instances(value)]
            elif isinstance(statement, ast.Assign):
                for target in statement.targets:
                    self._assign(target, statement.value, certain)
            elif isinstance(statement, ast.AnnAssign):
                self._assign(statement.target, statement.value, certain)

    def _assign(self, target: ast.expr, value: ast.expr | None, certain: bool) -> None:
        if isinstance(target, ast.Name):
            self._made_by[target.id] = [*self._instances(value), *self._classes(value)]
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            made = set(self._instances(value))
            calls = [node for node in ast.walk(value or target) if isinstance(node, ast.Call)]
            many = any(self._module.path(call.func) in _CONTAINERS for call in calls)
            for path in dict.fromkeys(self._instances(value)):
                name = _name(path, self._local)
                least, most = (None, None) if many else (int(certain and len(made) == 1), 1)
                self.found.setdefault((target.attr, name), Part(target.attr, name, least, most))

    def _instances(self, value: ast.expr | None) -> Iterator[str]:
        """Paths of the classes whose instances the expression makes."""
        match value:
            case ast.Call():
                yield from self._called(value)
            case ast.IfExp(body=first, orelse=second):
                yield from self._instances(first)
                yield from self._instances(second)
            case ast.List(elts=values) | ast.Tuple(elts=values):
                for inner in values:
                    yield from self._instances(inner)
            case ast.ListComp(elt=inner) | ast.GeneratorExp(elt=inner):
                yield from self._instances(inner)

    def _called(self, call: ast.Call) -> Iterator[str]:
        path = self._module.path(call.func)
        if self._made_by.get(path):
            yield from self._made_by[path]
        elif path in _CONTAINERS:
            for argument in call.args:
                yield from self._instances(argument)
        elif self._is_class(path):
            yield path
        elif path not in ("isinstance", "issubclass", "hasattr"):
            for argument in call.args:  # a helper such as skip_init(Linear, …) makes what it is given
                yield from self._classes(argument)

    def _classes(self, value: ast.expr | None) -> Iterator[str]:
        """Paths of the classes that the expression is: ``Norm`` and ``Other`` in ``Norm if … else Other``."""
        if isinstance(value, ast.IfExp):
            yield from self._classes(value.body)
            yield from self._classes(value.orelse)
        elif isinstance(value, (ast.Name, ast.Attribute)) and self._is_class(path := self._module.path(value)):
            yield path

    def _is_class(self, path: str) -> bool:
        of_torch = path.startswith("torch.nn.") and path.rpartition(".")[2][:1].isupper() and path not in _NO_MODULES
        return path in self._local or of_torch


def _auto_map(config_file: Path, known: set[str]) -> list[Arrow]:
    """Arrows from Auto classes to classes of the file, from the checkpoint's config.json."""
    if not config_file.is_file():
        return []
    try:
        auto_map = json.loads(config_file.read_text(encoding="utf-8")).get("auto_map") or {}
        built = [(auto, str(target).rpartition(".")[2]) for auto, target in auto_map.items()]
    except (ValueError, AttributeError) as error:
        raise StructureError(f"{config_file} is not a config ({error}). Download it again.") from error
    return [Arrow("builds", auto, target, "auto_map") for auto, target in built if target in known]


def _assemble(nodes: Iterable[ClassNode], builds: Sequence[Arrow], roots: Sequence[str] = ()) -> ClassGraph:
    by_name = {node.name: node for node in nodes}
    lineages = linearize({name: node.bases for name, node in by_name.items()})
    complete = [replace(node, mro=lineages[name]) for name, node in by_name.items()]
    used = {name for node in complete for name in (*node.bases, *(part.class_name for part in node.parts))}
    roots = roots or list(dict.fromkeys(arrow.target for arrow in builds))
    return build_graph(complete, roots or [node.name for node in complete if node.name not in used], builds)


def join(graph: ClassGraph, other: ClassGraph) -> ClassGraph:
    """Both graphs in one; if one knows only the name of a class, the other fills in the rest.

    Example:
        >>> from glmlab.core.resources import data_path
        >>> published = read_class_facts(data_path("structure", "chatglm3-6b.json"))
        >>> library = read_class_facts(data_path("structure", "transformers-4.38.json"))
        >>> join(published, library).classes["ChatGLMModel"].mro[:4]
        ('ChatGLMModel', 'ChatGLMPreTrainedModel', 'PreTrainedModel', 'nn.Module')
    """
    classes = dict(other.classes)
    for name, node in graph.classes.items():
        if name not in classes or node.bases or node.members:
            classes[name] = replace(node, kind="class") if node.kind == "mixin" else node
    builds = list(dict.fromkeys([*graph.builds, *other.builds]))
    return replace(_assemble(classes.values(), builds, graph.roots), members=graph.members)


def linearize(bases: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The MRO of every class from names alone, computed by Python itself on empty classes of the same shape.

    Raises:
        StructureError: a class inherits from itself, or Python refuses its bases or its name.

    Example:
        >>> linearize({"A": [], "B": ["A"], "C": ["A"], "D": ["B", "C"]})["D"]
        ('D', 'B', 'C', 'A')
    """
    made: dict[str, type] = {}

    def make(name: str, below: tuple[str, ...]) -> type:
        if name in below:
            raise StructureError(f"{' -> '.join([*below, name])}: a class cannot inherit from itself. Fix the source.")
        if name not in made:
            above = tuple(make(base, (*below, name)) for base in bases.get(name, ()))
            try:
                made[name] = type(name, above, {})
            except (TypeError, ValueError) as error:
                raise StructureError(f"{name!r} with the bases {bases[name]} cannot be a class: {error}") from error
        return made[name]

    return {name: tuple(cls.__name__ for cls in make(name, ()).__mro__[:-1]) for name in bases}


def write_class_facts(graph: ClassGraph, path: str | Path, *, source: str) -> None:
    """Write the names of a graph's classes, bases, members and parts as JSON, with the source that they come from."""
    classes = [
        {
            "name": node.name,
            "module": node.module,
            "kind": node.kind if node.kind != "mixin" else "class",
            "bases": list(node.bases),
            "members": {m.name: m.kind + (" abstract" if m.abstract else "") for m in node.members},
            "parts": [[part.attribute, part.class_name, part.at_least, part.at_most] for part in node.parts],
        }
        for node in graph.classes.values()
    ]
    builds = [[arrow.source, arrow.target, arrow.label] for arrow in graph.builds]
    facts = {"source": source, "roots": list(graph.roots), "builds": builds, "classes": classes}
    Path(path).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_class_facts(path: str | Path) -> ClassGraph:
    """Read a graph that :func:`write_class_facts` wrote.

    Raises:
        StructureError: the file is missing or is not such a file.

    Example:
        >>> from glmlab.core.resources import data_path
        >>> read_class_facts(data_path("structure", "chatglm3-6b.json")).classes["ChatGLMModel"].bases
        ('ChatGLMPreTrainedModel',)
    """
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
        nodes = [
            ClassNode(
                **{key: entry[key] for key in ("name", "module", "kind")},
                bases=tuple(entry["bases"]),
                mro=(),
                members=tuple(
                    Member(name, kind.removesuffix(" abstract"), kind.endswith(" abstract"))
                    for name, kind in entry["members"].items()
                ),
                parts=tuple(Part(*part) for part in entry["parts"]),
            )
            for entry in facts["classes"]
        ]
        builds, roots = [Arrow("builds", *arrow) for arrow in facts["builds"]], facts["roots"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StructureError(f"{path} holds no class facts ({error}). Write it with write_class_facts.") from error
    return _assemble(nodes, builds, roots)
