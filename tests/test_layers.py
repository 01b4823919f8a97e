"""Imports run one way through the house, no room is crowded, and what needs no torch loads none."""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "glmlab"

LAYERS = (  # lowest first; a module may import from its own layer and those before it
    ("core",),
    ("models", "allocator"),
    ("structure", "prompts", "snapshots"),
    ("figures",),
    ("generation",),
    ("tracing", "memory"),
    ("forecast",),
    ("latency",),
    ("evidence", "suite"),
    ("cli",),
    ("__main__",),
)
WITHOUT_TORCH = ("core", "allocator", "snapshots", "figures", "cli")

SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def _rank(module: str) -> int:
    """Number of the layer of ``glmlab.<module>…``."""
    (rank,) = [i for i, layer in enumerate(LAYERS) if module.split(".")[0] in layer]
    return rank


def _imports(tree: ast.Module) -> set[str]:
    """Names of the package that a module imports, also inside functions; those for type checkers only are left out."""
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in typing_only:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and id(node) not in typing_only:
            found |= {f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("glmlab.") for name in found if name.startswith(("glmlab.", "."))}


IMPORTS = {module: _imports(tree) for module, tree in SOURCES.items()}


def test_imports_run_one_way():
    upward = {(module, name) for module, names in IMPORTS.items() for name in names if _rank(name) > _rank(module)}
    assert upward == set()


def test_no_module_needs_itself():
    modules = {
        module: {other for other in SOURCES for name in names if f"{name}.".startswith(f"{other}.")}
        for module, names in IMPORTS.items()
    }
    assert len(list(TopologicalSorter(modules).static_order())) == len(SOURCES)  # raises CycleError, which names them


def test_what_needs_no_torch_loads_none():
    modules = [f"glmlab.{module}" for module in SOURCES if module.split(".")[0] in WITHOUT_TORCH]
    code = (
        "import sys, importlib\n"
        f"for module in {['glmlab', *modules]}:\n"
        "    importlib.import_module(module)\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), module\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_all_there():
    import glmlab

    assert all(getattr(glmlab, name).__name__ == name for name in glmlab.__all__)
    with pytest.raises(AttributeError, match="module 'glmlab' has no attribute 'nothing'; it has ChatSession"):
        _ = glmlab.nothing


def test_no_folder_holds_more_than_eight_modules():
    counts = Counter(module.rpartition(".")[0] for module in SOURCES)
    assert {folder: n for folder, n in counts.items() if n > 8} == {}
