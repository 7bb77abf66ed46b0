"""docs/errors.md lists every code that the source can answer, with its status, and no other."""

import ast
import re
from pathlib import Path

from service.api.problems import STATUS

ROOT = Path(__file__).parents[2]
SECTIONS = dict(
    re.findall(r"^## (\w+ ?\w*)\n(.*?)(?=^## |\Z)", (ROOT / "docs/errors.md").read_text(), re.M | re.S)
)
STATUSES = {kind.__name__: status for kind, status in STATUS.items()}
BUNDLE_ERRORS = {"BundleError", "BundleExistsError", "RefusedBundle"}


def calls(*folders):
    """Each call in the source, with the name of what is called."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield getattr(node.func, "id", getattr(node.func, "attr", "")), node


def constants(argument):
    """The texts that an argument can be, where the source says so."""
    if isinstance(argument, ast.IfExp):
        return constants(argument.body) | constants(argument.orelse)
    return {argument.value} if isinstance(argument, ast.Constant) else set()


def documented(section):
    return {row[0]: row[1] for row in re.findall(r"^\| `([\w-]+)` \| ([^|]+) \|", SECTIONS[section], re.M)}


def test_every_problem_is_listed_with_its_status_and_no_other_is():
    said = {}
    for name, call in calls("service"):
        if name in STATUSES and call.args:
            said |= {code: str(STATUSES[name]) for code in constants(call.args[0])}
        elif name == "problem" and len(call.args) >= 3:
            said |= {code: ast.unparse(call.args[1]) for code in constants(call.args[2])}
    said["request-refused"] = "any other"
    said["provider-unavailable"] = "503"  # a refused bundle's code, answered where that model is named
    assert documented("Problems") == said


def test_every_reason_to_refuse_a_bundle_is_listed_and_no_other_is():
    said = set()
    for name, call in calls("service", "bundle"):
        if name in BUNDLE_ERRORS:
            said |= constants(call.args[name == "RefusedBundle"])
    assert set(documented("Bundles")) == said


def test_every_reason_to_reject_an_item_is_listed_and_no_other_is():
    source = (ROOT / "service/adapters/sql_feedback.py").read_text()
    said = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Return) and node.value is not None:
            said |= {text for text in constants(node.value) if isinstance(text, str) and "-" in text}
    assert set(documented("Feedback items")) == said


def test_a_code_is_words_and_hyphens():
    for section in ("Problems", "Feedback items", "Bundles"):
        assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in documented(section))
