"""Class graphs of source that is never executed, and of class facts kept in a file.

griffe reads classes, bases and methods from the text; the parts of a class are read from the text of its ``__init__``.
Nothing is imported: neither the file nor what it imports.
"""

import ast
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import griffe

from glmlab.structure.graph import Arrow, ClassGraph, ClassNode, Member, Part, StructureError, build_graph, linearize

_CONTAINERS = ("torch.nn.ModuleList", "torch.nn.ModuleDict", "torch.nn.Sequential")
_NO_MODULES = ("torch.nn.Parameter",)


def source_class_graph(folder_or_file: str | Path) -> ClassGraph:
    """Read the class graph of Python source without running it, such as modeling_chatglm.py beside a checkpoint.

    Args:
        folder_or_file: a ``.py`` file, or a folder with ``modeling_*.py`` files. If a config.json lies beside them,
            its ``auto_map`` tells which Auto class leads to which class of the file.

    Returns:
        The classes of the file. Bases from elsewhere are known by name only; :func:`~glmlab.structure.graph.join` fills
        them in. The roots are what ``auto_map`` names, else the classes that no other class inherits from or holds. A
        part that is made in a branch of ``__init__`` counts ``0..1``; how many a list holds, source does not tell.

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
    local = {path: griffe_class for module in modules for path, griffe_class in module.classes.items()}
    if not local:
        raise StructureError(f"{', '.join(file.name for file in files)} defines no class. Give a file that does.")
    names = _Names(local)
    nodes = [
        _node(module, path, griffe_class, names) for module in modules for path, griffe_class in module.classes.items()
    ]
    builds = _auto_map(files[0].with_name("config.json"), {node.name for node in nodes})
    outside = [*names.outside.values(), *(_outside(arrow.source, "transformers") for arrow in builds)]
    return _assemble([*nodes, *outside], builds)


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
    """A source file: as griffe reads it (names), and as Python parses it (the text of ``__init__``)."""

    griffe_module: Any
    tree: ast.Module
    classes: dict[str, Any]
    """Path -> griffe's class, in the file's order."""

    def resolve(self, dotted: str) -> str | None:
        """Where a name of the file leads: a path such as ``torch.nn.Linear``; None for a local variable."""
        first, dot, rest = dotted.partition(".")
        try:
            return f"{self.griffe_module.resolve(first)}{dot}{rest}"
        except griffe.NameResolutionError:
            return None


def _read_module(file: Path) -> _Module:
    try:
        text = file.read_text(encoding="utf-8-sig")  # Python reads past a byte order mark, too
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, on the file's style
            tree = ast.parse(text)
            module = griffe.visit(file.stem, filepath=file, code=text)
    except OSError as error:
        raise StructureError(f"{file} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise StructureError(f"{file.name} is not UTF-8 text ({error.reason}). Download it again.") from error
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise StructureError(f"{file.name}{where} is not Python: {reason}. Download it again, or mend it.") from error
    except (RecursionError, MemoryError) as error:
        raise StructureError(f"{file.name} is nested too deeply to be read. It is no ordinary source.") from error
    classes = {member.path: member for member in module.members.values() if isinstance(member, griffe.Class)}
    return _Module(module, tree, classes)


class _Names:
    """Names of nodes for paths: plain ones for classes of the files, ``nn.`` for PyTorch's, others by need."""

    def __init__(self, local: Mapping[str, Any]) -> None:
        self._local: dict[str, str] = {path: griffe_class.name for path, griffe_class in local.items()}
        self.outside: dict[str, ClassNode] = {}

    def is_local(self, path: str) -> bool:
        return path in self._local

    def plain(self, path: str) -> str:
        """Name of a class wherever it comes from."""
        if path in self._local:
            return self._local[path]
        if path.startswith("torch.nn."):
            return f"nn.{path.rpartition('.')[2]}"
        name = path.rpartition(".")[2]
        return path if name in self._local.values() else name

    def base(self, path: str) -> str:
        """Name of a base; one from outside the files is noted down."""
        name = self.plain(path)
        if path not in self._local and path != "object":
            self.outside[path] = _outside(name, path.rpartition(".")[0])
        return name


def _outside(name: str, module: str) -> ClassNode:
    kind = "torch" if module.partition(".")[0] == "torch" else "outside"
    return ClassNode(name, module, (), (name,), kind=kind)  # type: ignore[arg-type]


def _node(module: _Module, path: str, griffe_class: Any, names: _Names) -> ClassNode:
    paths = [getattr(base, "canonical_path", str(base)) for base in griffe_class.bases]
    bases = tuple(names.base(base) for base in paths if base != "object")
    definition = next(
        node
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
        and node.name == griffe_class.name
        and node.end_lineno == griffe_class.endlineno
    )
    return ClassNode(
        name=names.plain(path),
        module=module.griffe_module.name,
        bases=bases,
        mro=(),
        members=tuple(_members(griffe_class)),
        parts=tuple(_parts(module, definition, names)),
    )


def _members(griffe_class: Any) -> Iterator[Member]:
    for name, member in griffe_class.members.items():
        abstract = "abstractmethod" in member.labels
        if "property" in member.labels or "cached" in member.labels:
            yield Member(name, "property", abstract)
        elif isinstance(member, griffe.Function):
            kind = "class method" if "classmethod" in member.labels else "method"
            yield Member(name, "static method" if "staticmethod" in member.labels else kind, abstract)  # type: ignore[arg-type]


def _assemble(nodes: Iterable[ClassNode], builds: Iterable[Arrow], roots: Iterable[str] = ()) -> ClassGraph:
    by_name = {node.name: node for node in nodes}
    lineages = linearize({name: node.bases for name, node in by_name.items()})
    complete = [replace(node, mro=lineages[name]) for name, node in by_name.items()]
    builds = list(builds)
    used = {name for node in complete for name in (*node.bases, *(part.class_name for part in node.parts))}
    chosen = list(roots) or list(dict.fromkeys(arrow.target for arrow in builds))
    chosen = chosen or [node.name for node in complete if node.name not in used]
    return build_graph(complete, chosen, builds)


# ------------------------------------------------------------------------------------------ parts, from __init__


def _parts(module: _Module, definition: ast.ClassDef, names: _Names) -> Iterator[Part]:
    """What ``__init__`` puts into attributes of self: instances of the file's classes and of torch.nn's."""
    for statement in definition.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            reader = _InitReader(module, names)
            reader.read(statement.body, certain=True)
            yield from reader.found.values()


class _InitReader:
    """Walks the statements of one ``__init__``; ``_made_by`` remembers what its local names stand for."""

    def __init__(self, module: _Module, names: _Names) -> None:
        self._module = module
        self._names = names
        self._made_by: dict[str, list[str]] = {}
        self.found: dict[tuple[str, str], Part] = {}

    def read(self, statements: Iterable[ast.stmt], *, certain: bool) -> None:
        """Note the parts that statements make; ``certain``: they run whenever ``__init__`` does."""
        for statement in statements:
            if isinstance(statement, ast.FunctionDef):
                returned = [node.value for node in ast.walk(statement) if isinstance(node, ast.Return)]
                self._made_by[statement.name] = [path for value in returned for path in self._classes(value)]
            elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                for target in targets:
                    self._assign(target, statement.value, certain)
            elif isinstance(statement, ast.If):
                self.read(statement.body, certain=False)
                self.read(statement.orelse, certain=False)
            elif isinstance(statement, (ast.With, ast.Try)):
                self.read(statement.body, certain=certain)
                for handler in getattr(statement, "handlers", ()):
                    self.read(handler.body, certain=False)
            elif isinstance(statement, (ast.For, ast.While)):
                self.read(statement.body, certain=False)

    def _assign(self, target: ast.expr, value: ast.expr | None, certain: bool) -> None:
        if isinstance(target, ast.Name):
            self._made_by[target.id] = [*self._classes(value), *self._mentioned(value)]
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            made = list(dict.fromkeys(self._classes(value)))
            many = any(
                isinstance(node, ast.Call) and self._path(node.func) in _CONTAINERS
                for node in ast.walk(value or target)
            )
            for path in made:
                name = self._names.plain(path)
                least, most = (None, None) if many else (int(certain and len(made) == 1), 1)
                self.found.setdefault((target.attr, name), Part(target.attr, name, least, most))

    def _classes(self, value: ast.expr | None) -> Iterator[str]:
        """Paths of the classes of which the expression makes instances."""
        if isinstance(value, ast.IfExp):
            yield from self._classes(value.body)
            yield from self._classes(value.orelse)
        elif isinstance(value, (ast.List, ast.Tuple)):
            for element in value.elts:
                yield from self._classes(element)
        elif isinstance(value, (ast.ListComp, ast.GeneratorExp)):
            yield from self._classes(value.elt)
        elif isinstance(value, ast.Call):
            yield from self._called(value)

    def _called(self, call: ast.Call) -> Iterator[str]:
        path = self._path(call.func)
        if isinstance(call.func, ast.Name) and self._made_by.get(call.func.id):
            yield from self._made_by[call.func.id]
        elif path in _CONTAINERS:
            for argument in call.args:
                yield from self._classes(argument)
        elif path and self._is_class(path):
            yield path
        elif path not in ("isinstance", "issubclass", "hasattr"):
            for argument in call.args:  # a helper such as skip_init(Linear, …) makes what it is given
                yield from self._mentioned(argument)

    def _mentioned(self, value: ast.expr | None) -> Iterator[str]:
        """Paths of the classes that an expression is, not makes: ``Norm`` in ``Norm if … else Other``."""
        if isinstance(value, ast.IfExp):
            yield from self._mentioned(value.body)
            yield from self._mentioned(value.orelse)
        elif (path := self._path(value)) and self._is_class(path):
            yield path

    def _path(self, value: ast.expr | None) -> str | None:
        if isinstance(value, (ast.Name, ast.Attribute)):
            dotted = ast.unparse(value)
            return self._module.resolve(dotted) or dotted
        return None

    def _is_class(self, path: str) -> bool:
        of_torch = path.startswith("torch.nn.") and path.rpartition(".")[2][:1].isupper() and path not in _NO_MODULES
        return self._names.is_local(path) or of_torch


# --------------------------------------------------------------------------------------- auto_map, facts in a file


def _auto_map(config_file: Path, known: set[str]) -> list[Arrow]:
    """Arrows from Auto classes to classes of the file, as the checkpoint's config.json says."""
    if not config_file.is_file():
        return []
    try:
        auto_map = json.loads(config_file.read_text(encoding="utf-8")).get("auto_map") or {}
        built = [(auto, str(target).rpartition(".")[2]) for auto, target in auto_map.items()]
    except (ValueError, AttributeError) as error:
        raise StructureError(f"{config_file} is not a config ({error}). Download it again.") from error
    return [Arrow("builds", auto, target, "auto_map") for auto, target in built if target in known]


def write_class_facts(graph: ClassGraph, path: str | Path, *, source: str) -> None:
    """Keep what a graph knows of its classes as JSON: names of classes, bases, members and parts, no code.

    Args:
        graph: such as :func:`source_class_graph` gives.
        path: the file.
        source: where the facts come from; it is kept with them.

    Raises:
        StructureError: the file cannot be written.
    """
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
    try:
        Path(path).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise StructureError(f"{path} cannot be written ({error.strerror}). Name a file in another folder.") from error


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
                name=entry["name"],
                module=entry["module"],
                bases=tuple(entry["bases"]),
                mro=(),
                members=tuple(
                    Member(name, kind.removesuffix(" abstract"), kind.endswith(" abstract"))
                    for name, kind in entry["members"].items()
                ),
                parts=tuple(Part(*part) for part in entry["parts"]),
                kind=entry["kind"],
            )
            for entry in facts["classes"]
        ]
        builds = [Arrow("builds", *arrow) for arrow in facts["builds"]]
        roots = facts["roots"]
    except OSError as error:
        raise StructureError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StructureError(f"{path} holds no class facts ({error}). Write it with write_class_facts.") from error
    return _assemble(nodes, builds, roots)
