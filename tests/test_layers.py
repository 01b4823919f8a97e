"""Imports run one way through the house, and what needs no torch loads none."""

import ast
import subprocess
import sys
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
WITHOUT_TORCH = (
    "glmlab",
    "glmlab.cli",
    "glmlab.figures",
    "glmlab.core.curve",
    "glmlab.allocator.program",
    "glmlab.allocator.caching",
    "glmlab.snapshots.replay",
    "glmlab.tracing.cached",
    "glmlab.forecast.forecast",
)


def _rank(module: str) -> int:
    """Number of the layer of ``glmlab.<module>…``."""
    (rank,) = [i for i, layer in enumerate(LAYERS) if module.split(".")[0] in layer]
    return rank


def _imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, also inside functions; those for type checkers only are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports inside the package are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("glmlab.") for name in found if name.startswith("glmlab.")}


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    upward = {name for name in _imports(path) if _rank(name) > _rank(module)}
    assert upward == set()


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_loads_no_torch(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_public_names_are_all_there():
    import glmlab

    assert all(getattr(glmlab, name).__name__ == name for name in glmlab.__all__)
    with pytest.raises(AttributeError, match="module 'glmlab' has no attribute 'nothing'; it has ChatSession"):
        _ = glmlab.nothing
