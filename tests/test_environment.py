"""pyproject.toml, constraints.txt and environment.yml say the same."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
NAMED = {"jupyterlab", "ipykernel", "torch", "transformers", "matplotlib", "pandas", "gpustat", "bitsandbytes"}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins() -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    assert len({requirement.name for requirement in requirements}) == len(requirements)
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


@pytest.fixture(scope="module")
def environment() -> tuple[list[str], list[str]]:
    """The conda and the pip entries of environment.yml."""
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in entries if isinstance(entry, dict)]
    return [entry for entry in entries if isinstance(entry, str)], pip


def _by_name(requirements) -> dict[str, Requirement]:
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in requirements}


def test_environment_names_the_eight_packages_as_the_project_does(project, environment):
    declared = _by_name(project["dependencies"])
    listed = _by_name(line for line in environment[1] if not line.startswith("-"))
    assert set(listed) == NAMED
    assert {name: str(listed[name].specifier) for name in NAMED} == {
        name: str(declared[name].specifier) for name in NAMED
    }


def test_environment_installs_the_suite_with_the_pins(project, environment):
    conda, pip = environment
    assert f"python{project['requires-python']}" in conda
    assert {"-c constraints.txt", "-e ."} <= set(pip)


def test_every_pin_is_exact_and_allowed(project, pins):
    declared = _by_name([*project["dependencies"], *project["optional-dependencies"]["test"]])
    assert set(declared) <= set(pins)
    for name, pin in pins.items():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", name
        if name in declared:
            assert declared[name].specifier.contains(specifier.version), name
    assert str(pins["torch"].specifier) == "==2.13.0"


def test_what_is_installed_is_what_is_pinned(project, pins):
    """Every package that the suite pulls in, on this machine."""
    lines = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    waiting = [(Requirement(line), frozenset()) for line in lines]
    seen: set[str] = set()
    while waiting:
        requirement, extras = waiting.pop()
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if name in seen or (marker and not any(marker.evaluate({"extra": extra}) for extra in extras | {""})):
            continue
        seen.add(name)
        wanted = frozenset(requirement.extras)
        waiting += [(Requirement(line), wanted) for line in importlib.metadata.requires(name) or []]
    nvidia = {name for name in seen if name.startswith(("nvidia-", "cuda-")) or name == "triton"} - {"nvidia-ml-py"}
    assert seen - nvidia - set(pins) == set()
    for name in seen - nvidia:
        assert pins[name].specifier.contains(importlib.metadata.version(name).partition("+")[0]), name
