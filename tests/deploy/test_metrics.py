"""The dashboard and the alert rules ask only for what the service exposes, in PromQL that parses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests import tiny
from tests.deploy import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMETHEUS = ROOT / "deploy/prometheus"
GRAFANA = ROOT / "deploy/grafana"
DASHBOARD = GRAFANA / "dashboards/tare.json"

# Made by Prometheus itself, beside what it scrapes.
BY_PROMETHEUS = {"up": {"job", "instance"}, "ALERTS": {"alertname", "alertstate", "job", "instance"}}
ADDED_BY_SCRAPING = {"job", "instance"}

# A series in PromQL: a name, not followed by an argument list, with or without its selectors.
SERIES = re.compile(r"\b([a-zA-Z_:][\w:]*)\b(?!\s*\()(?:\s*\{([^}]*)\})?")
LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
ONE_VALUE = re.compile(r'\b(route|outcome|stage)="([^"]*)"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
PART_OF_HISTOGRAM = re.compile(r"_(bucket|sum|count)$")
WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "bool", "inf"}


def series(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each series that a PromQL expression asks for, with the labels that it selects by."""
    bare = GROUPING.sub(" ", expression)
    bare = re.sub(r"\[[^\]]*\]", " ", bare)
    strings: list[str] = re.findall(r'"[^"]*"', bare)
    for text in strings:
        bare = bare.replace(text, '""', 1)
    for match in SERIES.finditer(bare):
        if match[1] not in WORDS:
            yield match[1], set(LABEL.findall(match[2] or ""))


def grouped(expression: str) -> set[str]:
    """The labels that an expression groups by."""
    return {label.strip() for names in GROUPING.findall(expression) for label in names.split(",")}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


def panel_expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def variable_expressions() -> list[str]:
    definitions = [variable["definition"] for variable in dashboard()["templating"]["list"]]
    return [
        re.sub(r"label_values\((.*), (\w+)\)", r"sum by (\2) (\1)", definition) for definition in definitions
    ]


def annotation_expressions() -> list[str]:
    return [annotation["expr"] for annotation in dashboard()["annotations"]["list"]]


def expressions() -> list[str]:
    return [
        *(rule["expr"] for rule in rules()),
        *panel_expressions(),
        *variable_expressions(),
        *annotation_expressions(),
    ]


@pytest.fixture(scope="session")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    return found


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_reading_of_promql_finds_names_and_labels() -> None:
    expression = 'sum by (a, le) (rate(x_total{b=~"y|z", c!="by (d)"}[5m])) / on (e) up > 0.5 unless q{}'
    assert list(series(expression)) == [("x_total", {"b", "c"}), ("up", set()), ("q", set())]
    assert grouped("sum by (a, le) (x) / on (e) up") == {"a", "le", "e"}


def test_the_rules_parse_and_the_configuration_names_them(promtool: str) -> None:
    checked = run(promtool, "check", "config", str(PROMETHEUS / "prometheus.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules())} rules found" in checked.stdout


@pytest.mark.slow
def test_each_rule_fires_when_it_should_and_not_otherwise(promtool: str) -> None:
    checked = run(promtool, "test", "rules", str(PROMETHEUS / "alerts_test.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_no_rule_is_without_a_case_in_which_it_fires() -> None:
    cases = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    fired = {check["alertname"] for case in cases for check in case["alert_rule_test"] if check["exp_alerts"]}
    assert fired == {rule["alert"] for rule in rules()}


def test_every_expression_of_the_dashboard_parses(promtool: str, tmp_path: Path) -> None:
    filled = [expression.replace("$__rate_interval", "1m") for expression in expressions()]
    recorded = [{"record": f"dashboard:{i}", "expr": expression} for i, expression in enumerate(filled)]
    written = tmp_path / "dashboard.yml"
    written.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    checked = run(promtool, "check", "rules", str(written))
    assert checked.returncode == 0, checked.stdout + checked.stderr


Exposed = dict[str, list[tuple[dict[str, str], float]]]


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> Exposed:
    """What /metrics of a real service shows after a little of everything: each series, by name."""
    folder = tmp_path_factory.mktemp("metrics")
    tiny.make(folder / "models" / "tiny")
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(picture, "PNG")
    with running(folder) as client:
        assert client.get("/readyz").status_code == 200
        assert client.get("/nowhere").status_code == 404
        made = client.post("/predict", content=picture.getvalue()).json()["predictions"][0]
        feedback = {"prediction_id": made["prediction_id"], "label": made["label"]}
        assert client.post("/feedback", json=feedback).json()["accepted"] == 1
        families = list(text_string_to_metric_families(client.get("/metrics").text))
    shown: Exposed = {}
    for family in families:
        for sample in family.samples:
            shown.setdefault(sample.name, []).append((sample.labels, sample.value))
    return shown


@contextlib.contextmanager
def running(folder: Path) -> Iterator[httpx.Client]:
    """A service of its own, on a free port, with the bundles of folder/models."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TARE_")}
    settings = {"PORT": "0", "MODELS_DIR": str(folder / "models"), "STATE_DIR": str(folder / "state")}
    environment |= {f"TARE_{name}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "service"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = (json.loads(line) for line in process.stderr if line.startswith("{"))
            url = next(line["url"] for line in lines if line["message"] == "listening")
            with httpx.Client(base_url=url, timeout=30) as client:
                yield client
        finally:
            process.terminate()


@pytest.mark.slow
def test_every_metric_and_label_asked_for_is_exposed(exposed: Exposed) -> None:
    asked = {
        (name, label)
        for expression in expressions()
        for name, selected in series(expression)
        for label in selected | grouped(expression)
    }
    names = {name for expression in expressions() for name, _ in series(expression)}
    known = {name: {label for labels, _ in of_name for label in labels} for name, of_name in exposed.items()}
    known = {name: labels | ADDED_BY_SCRAPING for name, labels in known.items()} | BY_PROMETHEUS
    assert names - known.keys() == set()
    assert {(name, label) for name, label in asked if label not in known[name]} == set()


@pytest.mark.slow
def test_every_route_and_outcome_selected_by_is_exposed(exposed: Exposed) -> None:
    shown = {pair for of_name in exposed.values() for labels, _ in of_name for pair in labels.items()}
    selected = {pair for expression in expressions() for pair in ONE_VALUE.findall(expression)}
    assert selected
    assert selected - shown == set()


@pytest.mark.slow
def test_every_metric_of_ours_is_drawn_or_watched(exposed: Exposed) -> None:
    asked = {name for expression in expressions() for name, _ in series(expression)}
    ours = {PART_OF_HISTOGRAM.sub("", name) for name in exposed if name.startswith("tare_")}
    assert ours - {PART_OF_HISTOGRAM.sub("", name) for name in asked} == set()


@pytest.mark.slow
def test_every_metric_moved_with_what_happened(exposed: Exposed) -> None:
    # Nothing waits, nothing is in memory and nothing is refused when all is quiet and well.
    at_rest = {"tare_queue_images", "tare_queue_bytes", "tare_held_body_bytes", "tare_bundles_refused"}
    at_rest |= {"tare_shed_requests_total", "tare_dropped_requests_total"}
    largest = {name: max(value for _, value in of_name) for name, of_name in exposed.items()}
    assert {name for name, value in largest.items() if name.startswith("tare_") and not value > 0} == at_rest


def test_the_scrape_carries_the_job_that_the_rules_select_by() -> None:
    [job] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    assert set(re.findall(r'job="([^"]*)"', " ".join(expressions()))) == {job["job_name"]}


def test_the_operations_page_says_what_to_do_about_each_alert() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    assert [rule["alert"] for rule in rules() if f"`{rule['alert']}`" not in page] == []


def test_the_dashboard_asks_the_data_source_that_is_provisioned() -> None:
    provisioned = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())
    [source] = provisioned["datasources"]
    panels = dashboard()["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert {target["datasource"]["uid"] for panel in panels for target in panel["targets"]} == {source["uid"]}


def test_no_two_panels_of_the_dashboard_cover_each_other() -> None:
    covered: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert columns.stop <= 24
        assert not cells & covered, panel["title"]
        covered |= cells
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])
