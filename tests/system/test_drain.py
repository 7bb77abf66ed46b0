"""SIGTERM under load: what was accepted is answered, once, and the process ends well in its set time."""

import asyncio
import contextlib
import json
import time

import pytest

from tests.system.crowd import answer, asked, get, metric, post
from tests.tiny import png

pytestmark = pytest.mark.slow

WAITING = 64


@pytest.fixture
def slow(service):
    """A service that takes 0.2 s for a batch of sixteen at most."""
    fault = service.folder / "fault"
    fault.write_text("slow")
    service.start(
        module="tests.service.broken_engine",
        ENGINE_FAULT=str(fault),
        TARE_WORKERS="1",
        TARE_LONE_THREADS="1",
        TARE_DRAIN_S="20",
    )
    return service


def recorded(service):
    """How many predictions a service finds on this state."""
    return service.start().get("/monitor").json()["predictions"]


def test_what_waits_at_a_sigterm_is_answered_whole_and_no_new_connection_is_taken(slow, pixels):
    async def script():
        waiting = [asyncio.ensure_future(asked(slow.port, post(png(pixels)))) for _ in range(WAITING)]
        while (
            metric((await asked(slow.port, get("/metrics")))[2].decode(), "tare_queue_images") < WAITING / 2
        ):
            pass
        slow.process.terminate()
        started = time.monotonic()
        answers = await asyncio.gather(*waiting)
        with pytest.raises(OSError, match="Connect"):
            while True:  # the listener closes a moment after the signal, long before the answers are out
                await asked(slow.port, get("/healthz"))
        code = await asyncio.to_thread(slow.process.wait, 30)
        return answers, code, time.monotonic() - started

    answers, code, seconds = asyncio.run(script())
    assert code == 0
    assert seconds < 20
    assert [status for status, *_ in answers] == [200] * WAITING
    identities = {json.loads(body)["predictions"][0]["prediction_id"] for _, _, body, _ in answers}
    assert len(identities) == WAITING
    assert [line for line in slow.log() if "traceback" in line or line["level"] == "error"] == []
    assert recorded(slow) == WAITING


def test_clients_that_go_on_asking_lose_no_answer_to_a_sigterm(service, pixels):
    """A request may meet a closed door, and is not answered then; none that was kept goes unanswered."""
    service.start()
    answered = []

    async def ask():
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
                head = ""
                try:
                    while "connection: close" not in head:
                        writer.write(post(png(pixels)))
                        status, head, body = await answer(reader)
                        assert status == 200, body
                        answered.append(json.loads(body)["predictions"][0]["prediction_id"])
                finally:
                    writer.close()

    async def script():
        asking = [asyncio.ensure_future(ask()) for _ in range(16)]
        while len(answered) < 500:
            await asyncio.sleep(0.01)
        service.process.terminate()
        await asyncio.gather(*asking)
        return await asyncio.to_thread(service.process.wait, 30)

    assert asyncio.run(script()) == 0
    assert len(set(answered)) == len(answered)
    assert [line for line in service.log() if "traceback" in line or line["level"] == "error"] == []
    assert recorded(service) == len(answered)
