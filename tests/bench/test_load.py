"""wrk's figures, from real runs against a small server and against ours."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import ClassVar

import pytest

from bench import load


class _Alternating(BaseHTTPRequestHandler):
    """Answers 200 and 503 by turns, and remembers what it was sent."""

    protocol_version = "HTTP/1.1"
    bodies: ClassVar = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.bodies.append(body)
        self.send_response(200 if len(self.bodies) % 2 else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words):
        pass


@pytest.fixture
def alternating():
    _Alternating.bodies = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Alternating)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_every_image_is_posted_by_turns_and_refusals_are_counted_apart(alternating, tmp_path):
    images = [bytes([place, 0, 255, 10, 13]) * 100 for place in range(3)]
    for place, image in enumerate(images):
        (tmp_path / f"{place}").write_bytes(image)
    result = load.post(alternating, tmp_path, connections=1, seconds=1)
    sent = _Alternating.bodies
    assert set(sent) == set(images)
    places = [images.index(body) for body in sent]
    assert all(later == (place + 1) % 3 for place, later in pairwise(places))
    assert abs(result.refused - result.requests / 2) <= 1
    assert result.broken == 0
    assert 0 < result.p50_ms <= result.p99_ms
    # Half of them are good, and the sending lasts a little less than the second: a faster pace than both say.
    assert result.per_s == pytest.approx(result.requests / 2, rel=0.25)


def test_the_pace_is_that_between_the_first_sending_and_the_last_answer():
    line = (
        '{"requests": 100, "seconds": 4.0, "refused": 25, "broken": 1, "p50_ms": 1, "p99_ms": 2,'
        ' "sent": 164, "sending_s": 2.0}'
    )
    result = load.parsed(f"Running 4s test\n{line}\n", connections=64)
    assert result.per_s == (164 - 64) / 2.0 * 0.75
    assert load.parsed(line.replace("164", "64"), connections=64).per_s == 0  # none of the first was answered


def test_a_port_where_nobody_listens_is_no_measurement(tmp_path):
    (tmp_path / "0").write_bytes(b"image")
    with pytest.raises(load.LoadError, match="wrk failed"):
        load.post("http://127.0.0.1:1/", tmp_path, connections=1, seconds=1)


def test_output_without_figures_is_an_error():
    with pytest.raises(load.LoadError, match="without its figures"):
        load.parsed("Running 1s test\n", connections=1)


def test_where_wrk_is_missing_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(load.LoadError, match="apt install wrk"):
        load.check_wrk()
