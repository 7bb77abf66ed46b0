"""The image's health check tells a service that is well from one that is not, and from none."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from tests.deploy import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503 if self.path == "/readyz" else 200)
        self.end_headers()
        self.wfile.write(b"the store does not write" if self.path == "/readyz" else b"ok")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def check(port: int, *path: str) -> subprocess.CompletedProcess[str]:
    # A proxy that leads nowhere: the check must not ask it.
    environment = {**os.environ, "TARE_PORT": str(port), "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    command = [sys.executable, str(ROOT / "deploy/healthcheck.py"), *path]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_200_is_healthy_and_a_proxy_is_not_asked(port: int) -> None:
    assert check(port).returncode == 0


def test_a_503_is_not_healthy_and_its_reason_is_printed(port: int) -> None:
    done = check(port, "/readyz")
    assert done.returncode == 1
    assert "503 the store does not write" in done.stderr


def test_a_port_where_nobody_listens_is_not_healthy() -> None:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        done = check(free.getsockname()[1])
    assert done.returncode == 1
    assert "Connection refused" in done.stderr
