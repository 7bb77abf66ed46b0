"""How the process starts, refuses to start, and stops."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from tests.tiny import png

pytestmark = pytest.mark.slow


def refused(service, mentions, **variables):
    code, lines = service.refusal(**variables)
    assert code == 2, lines
    (line,) = lines
    assert line.startswith("tare: ")
    for word in mentions:
        assert word in line, line


@pytest.mark.parametrize(
    ("variables", "mentions"),
    [
        ({"TARE_PROT": "1"}, ["TARE_PROT", "TARE_PORT"]),
        ({"TARE_TAU": "nan"}, ["TARE_TAU"]),
        ({"TARE_HOST": "0.0.0.0"}, ["TARE_ADMIN_TOKEN", "TARE_ALLOW_ANONYMOUS"]),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_2(service, variables, mentions):
    refused(service, mentions, **variables)


def test_a_port_that_is_taken_is_one_line_and_exit_2(service):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(service, ["TARE_PORT"], TARE_PORT=str(taken.getsockname()[1]))


def test_a_state_that_another_service_has_is_one_line_and_exit_2(service):
    client = service.start()
    refused(service, ["state"])
    assert client.get("/readyz").status_code == 200


def test_a_state_of_a_newer_version_is_one_line_and_exit_2(service):
    service.start()
    assert service.terminate() == 0
    with contextlib.closing(sqlite3.connect(service.folder / "state" / "tare.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    refused(service, ["newer"])


def test_both_runtimes_are_one_line_and_exit_2(service):
    other = "onnxruntime_gpu"
    try:
        import onnxruntime  # noqa: F401, PLC0415
    except ImportError:
        pytest.skip("no onnxruntime is installed here")
    extra = service.folder / "extra" / f"{other}-1.0.dist-info"
    extra.mkdir(parents=True)
    (extra / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.0\n")
    path = os.pathsep.join([service.environment()["PYTHONPATH"], str(extra.parent)])
    refused(service, ["onnxruntime"], PYTHONPATH=path)


def test_an_address_for_others_starts_with_a_token_or_when_told_that_none_is_needed(service):
    service.start(TARE_HOST="0.0.0.0", TARE_ALLOW_ANONYMOUS="1")
    assert service.terminate() == 0
    service.start(TARE_HOST="0.0.0.0", TARE_ADMIN_TOKEN="adm")


def test_nothing_is_written_under_home(service, pixels):
    client = service.start()
    assert client.post("/predict", content=png(pixels)).status_code == 200
    service.terminate()
    assert list(service.home.rglob("*")) == []


def test_without_a_state_directory_the_state_lies_under_home(service):
    service.start(TARE_STATE_DIR="")
    service.terminate()
    assert (service.home / ".local" / "state" / "tare").is_dir()


def test_without_a_bundle_it_runs_and_says_why_it_is_not_ready(service, tmp_path):
    client = service.start(TARE_MODELS_DIR=str(tmp_path / "nowhere"))
    assert client.get("/healthz").status_code == 200
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["code"]) == (503, "no-model")


def test_what_kubernetes_injects_does_not_keep_it_from_starting(service):
    service.start(TARE_SERVICE_HOST="10.0.0.1", TARE_PORT_8000_TCP="tcp://10.0.0.1:8000")
    logged = [line["message"] for line in service.log()]
    assert any("TARE_SERVICE_HOST" in message for message in logged)


def test_sigterm_answers_what_is_in_flight_closes_the_state_and_exits_0(service, pixels):
    client = service.start()
    body = png(pixels)
    statuses = []

    def ask():
        # In pieces, so that the request is in flight when the signal comes.
        def pieces():
            yield body[:10]
            time.sleep(0.5)
            yield body[10:]

        statuses.append(client.post("/predict", content=pieces()).status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.2)
    service.process.terminate()
    asking.join()
    assert service.process.wait(60) == 0
    assert statuses == [200]
    service.start()  # the state is free again


@pytest.mark.parametrize("delay_s", [0.3, 0.8, 1.3, 1.8])
def test_a_signal_at_any_moment_of_the_start_ends_the_process(service, delay_s):
    process = subprocess.Popen(
        [sys.executable, "-m", "service"],
        env=service.environment(),
        cwd=service.folder,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(delay_s)
        process.terminate()
        # -15 before there is a handler, 143 while parts open, 0 once there is a server to stop gently.
        assert process.wait(60) in {-signal.SIGTERM, 128 + signal.SIGTERM, 0}
    finally:
        process.kill()
        process.wait()


def test_every_line_of_the_log_is_an_object_with_the_requests_id(service):
    client = service.start()
    client.get("/models", headers={"X-Request-Id": "look-for-me"})
    client.get("/nowhere")
    service.terminate()
    lines = service.log()
    (mine,) = [line for line in lines if line.get("request_id") == "look-for-me"]
    assert (mine["route"], mine["status"], mine["level"]) == ("/models", 200, "info")
    assert any(line.get("code") == "path-not-found" for line in lines)


def test_bytes_that_are_no_http_get_a_400_and_harm_nobody(service):
    client = service.start()
    for junk in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x00" * 100_000,
    ):
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as raw:
            raw.sendall(junk)
            raw.shutdown(socket.SHUT_WR)
            raw.recv(1000)
    assert client.get("/readyz").status_code == 200


def test_a_client_that_hangs_up_half_way_harms_nobody(service, pixels):
    client = service.start()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as raw:
            raw.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    assert client.post("/predict", content=png(pixels)).status_code == 200
    assert "tare_held_body_bytes 0.0" in client.get("/metrics").text
    assert not [line for line in service.log() if line["level"] == "error"]


def test_a_body_without_end_is_cut_off_at_the_limit(service):
    client = service.start(TARE_MAX_BODY_BYTES="100000")

    def endless():
        for _ in range(1000):
            yield b"x" * 10_000

    answer = client.post("/predict", content=endless())
    assert (answer.status_code, answer.json()["code"]) == (413, "body-too-large")
    assert client.get("/readyz").status_code == 200
