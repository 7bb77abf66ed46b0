"""Traces as a collector receives them: a real one, of a few lines, that speaks OTLP over HTTP."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from service.core.exceptions import Unavailable
from service.settings import collector_is_named
from tests.process import ROOT
from tests.service import v2
from tests.service.conftest import client_by

pytest.importorskip("opentelemetry.sdk.trace", reason="needs the extra tracing")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra tracing")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from service.adapters import tracing

pytestmark = pytest.mark.slow

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Collector(ThreadingHTTPServer):
    """Keeps what is sent to /v1/traces."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Receiver)
        self.resources = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def spans(self):
        return [span for sent in self.resources for scope in sent.scope_spans for span in scope.spans]


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        assert self.path == "/v1/traces"
        self.server.resources += ExportTraceServiceRequest.FromString(body).resource_spans
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """Whatever this machine's environment says."""
    for name in (ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def collector():
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=["asgi", "http"])
def way(request):
    """The application itself, and its server, which takes plain predictions before the application."""
    return request.param


@pytest.fixture
def traced(way, collector, settings_for, monkeypatch):
    """Open a client of a traced service; its spans are all there when the block ends."""
    monkeypatch.setenv(ENDPOINT, collector.url)
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")  # by which FastAPI would send spans of its own

    @contextmanager
    def opened():
        with client_by(way, settings_for()) as client:
            yield client

    return opened


def attributes(span):
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


def split(spans):
    """The requests' spans, and by the id of each the stages in it."""
    roots = [span for span in spans if span.kind == span.SPAN_KIND_SERVER]
    inside = {root.span_id: [] for root in roots}
    for span in spans:
        if span.kind != span.SPAN_KIND_SERVER:
            inside[span.parent_span_id].append(span)
    return roots, inside


def test_a_prediction_is_a_span_of_the_clients_trace_with_the_stages_of_its_server_timing(
    traced, collector, image
):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
    with traced() as client:
        answer = client.post("/predict", content=image, headers=headers)
    assert answer.status_code == 200
    (root,), inside = split(collector.spans())
    assert (root.name, root.trace_id.hex(), root.parent_span_id.hex()) == ("POST /predict", TRACE, PARENT)
    assert attributes(root) == {
        "http.request.method": "POST",
        "http.route": "/predict",
        "http.response.status_code": 200,
        "tare.request_id": "mine",
    }
    timing = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    stages = inside[root.span_id]
    assert [span.name for span in stages] == ["queue", "decode", "infer", "store"]
    start = stages[0].start_time_unix_nano
    assert start >= root.start_time_unix_nano
    for span in stages:
        assert span.trace_id == root.trace_id
        assert span.start_time_unix_nano == start
        start = span.end_time_unix_nano
        assert (start - span.start_time_unix_nano) / 1e6 == pytest.approx(float(timing[span.name]), abs=0.006)
    assert start == pytest.approx(root.end_time_unix_nano, abs=10)
    (resource,) = {sent.resource.SerializeToString() for sent in collector.resources}
    assert b"tare" in resource


def test_of_a_trace_that_is_not_sampled_there_is_nothing(traced, collector, image):
    with traced() as client:
        sent = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        assert client.post("/predict", content=image, headers=sent).status_code == 200
    assert collector.spans() == []


@pytest.mark.parametrize(
    "parent", [None, "", "junk", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "\xe9"]
)
def test_without_a_good_parent_a_request_begins_a_trace(traced, collector, image, parent):
    headers = {} if parent is None else {"traceparent": parent.encode("latin-1")}
    with traced() as client:
        for _ in range(2):
            assert client.post("/predict", content=image, headers=headers).status_code == 200
    roots, _ = split(collector.spans())
    assert len({root.trace_id for root in roots}) == 2
    assert {root.parent_span_id for root in roots} == {b""}


def test_whatever_else_is_answered_is_a_span_and_probes_are_none(traced, collector, image):
    with traced() as client:
        for path in ("/healthz", "/readyz", "/metrics"):
            assert client.get(path).status_code == 200
        client.post("/predict", content=b"<html>")
        client.post("/predict?tau=nan", content=image)
        client.get("/nothing/at/all")
        client.put("/priors/mine", json={"uniform": True})
        v2.outputs(v2.post(client, *v2.images([image])))
    roots, inside = split(collector.spans())
    said = {
        (root.name, attributes(root)["http.response.status_code"], attributes(root).get("error.type"))
        for root in roots
    }
    assert said == {
        ("POST /predict", 415, "unknown-image-format"),
        ("POST /predict", 422, "invalid-parameter"),
        ("GET unmatched", 404, "path-not-found"),
        ("PUT /priors/{name}", 200, None),
        ("POST /v2/models/{name}/infer", 200, None),
    }
    assert {root.name: len(inside[root.span_id]) for root in roots}["POST /v2/models/{name}/infer"] == 4
    assert sum(map(len, inside.values())) == 4
    assert {root.status.code for root in roots} == {0}


def test_a_failure_of_the_service_is_marked_as_one(traced, collector, image, monkeypatch):
    def fail(*_, **__):
        raise Unavailable("engine-failed", "The engine failed.")

    monkeypatch.setattr("service.core.decide.Decider.run", fail)
    with traced() as client:
        assert client.post("/predict", content=image).status_code == 503
    (root,), _ = split(collector.spans())
    assert root.status.code == root.status.STATUS_CODE_ERROR
    assert attributes(root)["error.type"] == "engine-failed"


def test_a_collector_that_is_not_there_costs_no_answer_and_no_stop(way, settings_for, image, monkeypatch):
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setattr(tracing, "_CLOSING_S", 1.0)
    with client_by(way, settings_for()) as client:
        for _ in range(5):
            assert client.post("/predict", content=image).status_code == 200
        started = time.monotonic()
    assert time.monotonic() - started < 20  # and not the half a minute for which it would go on trying
    left = [thread.name for thread in threading.enumerate()]
    assert not [name for name in left if name.startswith(("Otel", "traces"))]


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, False),
        ({ENDPOINT: "http://x:4318"}, True),
        ({ENDPOINT: ""}, False),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://x"}, False),
        ({ENDPOINT: "http://x", "OTEL_SDK_DISABLED": "True"}, False),
        ({ENDPOINT: "http://x", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({ENDPOINT: "http://x", "OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({ENDPOINT: "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, False),
        ({ENDPOINT: "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
    ],
)
def test_the_standard_variables_decide(monkeypatch, caplog, variables, named):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert collector_is_named() is named
    assert ("no traces" in caplog.text) == ("OTEL_EXPORTER_OTLP_PROTOCOL" in variables and not named)


def test_a_collector_without_the_extra_is_said_once_and_the_service_serves(
    client_for, image, monkeypatch, caplog
):
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.delitem(sys.modules, "service.adapters.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)  # which is how Python says "not there"
    assert client_for().post("/predict", content=image).status_code == 200
    assert caplog.text.count("the extra tracing is missing") == 1


def test_where_no_collector_is_named_nothing_of_it_is_imported_and_no_thread_runs(tmp_path):
    code = (
        "import sys, threading\n"
        "from service.app import create_app\n"
        "from service.settings import Settings\n"
        "app = create_app(Settings())\n"
        "assert app.state.traces is None\n"
        "found = [name for name in sys.modules if name.startswith('opentelemetry.')]\n"
        "print([name for name in found if 'sdk' in name or 'exporter' in name], threading.active_count())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "1"]
