"""pyproject.toml names all that is installed: each package of ours, and what each of them imports."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("longtail", "bundle", "training", "service")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]

# What comes with a distribution that is named: onnx needs protobuf, and uvicorn[standard] uvloop.
BROUGHT_BY = {"protobuf": "onnx", "uvloop": "uvicorn"}


def names(requirements):
    """The distributions that requirements name, as pip compares them."""
    return {re.split(r"[^\w.-]", one)[0].lower().replace("_", "-") for one in requirements}


def imported(folder):
    """The top-level modules that a package's source imports, or looks for by name."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module.partition(".")[0]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "find_spec":
                yield from (argument.value for argument in node.args)


def test_every_folder_of_source_is_a_package_that_is_installed():
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for top in OURS for path in (ROOT / top).rglob("*.py")
    }
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


@pytest.fixture(scope="module")
def distributions():
    """Which distributions bring each module that is installed here; it takes a second to find out."""
    return importlib.metadata.packages_distributions()


@pytest.mark.parametrize("folder", OURS)
def test_what_is_imported_is_what_is_asked_for(folder, distributions):
    asked = names(PROJECT["project"]["dependencies"]) | names(EXTRAS["cpu"])
    if folder == "training":
        asked |= names(EXTRAS["training"])
    if folder == "service":
        asked |= names(EXTRAS["tracing"])
    for module in set(imported(folder)) - set(OURS) - set(sys.stdlib_module_names):
        brings = {one.lower().replace("_", "-") for one in distributions[module]}
        brings |= {BROUGHT_BY[one] for one in brings & BROUGHT_BY.keys()}
        assert brings & asked, f"{folder} imports {module}, and nothing that is asked for brings it"
