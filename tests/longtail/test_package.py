"""The package as a whole: its examples run, and the parts that a serving process imports start fast."""

import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import longtail

MODULES = [f"longtail.{module.name}" for module in pkgutil.iter_modules(longtail.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_every_example_in_a_docstring_gives_what_it_says(name):
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0


def test_importing_the_package_imports_no_scipy():
    program = (
        f"import sys, {', '.join(MODULES)}; sys.exit(any(m.split('.')[0] == 'scipy' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_example_in_the_page_of_mathematics_gives_what_it_says():
    page = Path(__file__).parents[2] / "docs" / "maths.md"
    results = doctest.testfile(str(page), module_relative=False)
    assert results.attempted > 0
    assert results.failed == 0
