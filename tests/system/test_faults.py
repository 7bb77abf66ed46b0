"""What becomes of the process and of /readyz when the engine hangs, fails, or is lost for good."""

import contextlib
import threading
import time

import httpx
import pytest

from tests.tiny import png

pytestmark = pytest.mark.slow

POISONED = "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; file=/src/cuda_call.cc"


@pytest.fixture
def faulty(service):
    """A service and the file that says what ails its engine."""
    fault = service.folder / "fault"
    client = service.start(module="tests.service.broken_engine", ENGINE_FAULT=str(fault))
    return service, client, fault


def seconds_until(client, status):
    """How long /readyz takes to say this."""
    started = time.monotonic()
    while (answer := client.get("/readyz")).status_code != status:
        assert time.monotonic() - started < 30
        time.sleep(0.05)
    return time.monotonic() - started, answer.json()


def test_a_failing_engine_is_not_ready_and_never_replaced_and_ready_again_when_it_has_recovered(
    faulty, pixels
):
    _, client, fault = faulty
    assert client.post("/predict", content=png(pixels)).status_code == 200
    fault.write_text("CUDA failure 2: out of memory")
    answer = client.post("/predict", content=png(pixels))
    assert (answer.status_code, answer.json()["code"]) == (503, "engine-failed")
    assert client.get("/models").json()["models"][0]["ready"] is False
    _, problem = seconds_until(client, 503)
    assert problem["code"] == "engine-failed"
    assert "out of memory" in problem["detail"]
    fault.write_text("")
    seconds_until(client, 200)
    assert client.post("/predict", content=png(pixels)).status_code == 200


def test_a_stuck_engine_turns_readiness_and_costs_callers_a_504_by_their_own_deadlines(faulty, pixels):
    _, client, fault = faulty
    assert client.post("/predict", content=png(pixels)).status_code == 200
    fault.write_text("hang")
    started = time.monotonic()
    answer = client.post("/predict", content=png(pixels), headers={"X-Request-Timeout-Ms": "300"})
    assert (answer.status_code, answer.json()["code"]) == (504, "deadline-exceeded")
    _, problem = seconds_until(client, 503)
    # Two seconds where the machine is not busy with something else.
    assert time.monotonic() - started < 10
    assert problem["code"] == "engine-silent"
    assert client.get("/healthz").status_code == 200
    assert 'tare_dropped_requests_total{model="tiny",reason="deadline"} 1.0' in client.get("/metrics").text
    fault.write_text("")
    seconds_until(client, 200)
    assert client.post("/predict", content=png(pixels)).status_code == 200


def test_a_poisoned_cuda_context_ends_the_process_with_a_line_that_says_so(faulty, pixels):
    service, client, fault = faulty
    fault.write_text(POISONED)

    def ask():
        with contextlib.suppress(httpx.HTTPError):  # the process is gone, in whichever way the client sees it
            client.post("/predict", content=png(pixels))

    asking = threading.Thread(target=ask)
    asking.start()
    assert service.process.wait(30) == 70
    asking.join()
    (line,) = [line for line in service.log() if line["level"] == "critical"]
    assert "the device is lost" in line["message"]
    assert "illegal memory access" in line["message"]
    fault.unlink()
    client = service.start()  # as a supervisor would
    assert client.post("/predict", content=png(pixels)).status_code == 200


def test_sigterm_ends_the_process_in_its_set_time_whatever_hangs(faulty, pixels):
    service, _, fault = faulty
    service.terminate()
    client = service.start(module="tests.service.broken_engine", ENGINE_FAULT=str(fault), TARE_DRAIN_S="0.5")
    fault.write_text("hang")
    statuses = []
    asking = threading.Thread(
        target=lambda: statuses.append(client.post("/predict", content=png(pixels)).status_code)
    )
    asking.start()
    while "tare_held_body_bytes 0.0" in client.get("/metrics").text:
        time.sleep(0.01)
    service.process.terminate()
    assert service.process.wait(30) == 0
    asking.join()
    assert statuses == [503]
