"""How the short way ends where it cannot answer: limits, deadlines, failures, clients that leave."""

import asyncio
import json
import time

from service.api import express as express_module
from service.app import create_app
from tests.service.short_way import answer, held, post, talk, until


def test_a_client_that_hangs_up_half_way_through_its_body_leaves_nothing(app, image):
    async def script(connect):
        _, writer = await connect()
        writer.write(post(image[:50], length=len(image)))
        await until(lambda: held(app) == 50)
        writer.close()
        await until(lambda: held(app) == 0)

    talk(app, script)


def test_a_body_that_does_not_come_is_given_up_and_what_comes_of_it_later_ignored(app, image):
    app.state.intake.patience_s = 0.1

    async def script(connect):
        reader, writer = await connect()
        writer.write(post(image[:10], length=len(image)))
        status, _, body = await answer(reader)
        assert (status, body["code"]) == (400, "body-timeout")
        assert held(app) == 0
        writer.write(image[10:] + post(image))
        assert (await answer(reader))[0] == 200

    talk(app, script)


def test_a_full_intake_is_a_429_and_what_is_not_taken_is_not_held(app, image):
    app.state.intake.max_held_bytes = len(image) + 50

    async def script(connect):
        _, one = await connect()
        one.write(post(image[:60], length=len(image)))
        await until(lambda: held(app) == 60)
        reader, writer = await connect()
        writer.write(post(image))
        status, headers, body = await answer(reader)
        assert (status, body["code"], headers["retry-after"]) == (429, "intake-full", "1")
        assert held(app) == 60

    talk(app, script)


def test_a_full_queue_is_a_429_with_a_time_to_come_back(settings_for, image, gate):
    app = create_app(settings_for(queue_images=2, workers=1))

    async def script(connect):
        gate.clear()
        connections = [await connect() for _ in range(4)]
        for _, writer in connections:
            writer.write(post(image))
            await asyncio.sleep(0.05)
        status, headers, body = await answer(connections[3][0])
        assert (status, body["code"]) == (429, "queue-full")
        assert int(headers["retry-after"]) >= 1
        gate.set()
        for reader, _ in connections[:3]:
            assert (await answer(reader))[0] == 200

    talk(app, script)


def test_a_deadline_is_a_504_while_the_batch_still_runs(app, image, gate):
    async def script(connect):
        gate.clear()
        reader, writer = await connect()
        started = time.monotonic()
        writer.write(post(image, head=b"X-Request-Timeout-Ms: 80\r\n"))
        status, _, body = await answer(reader)
        assert (status, body["code"]) == (504, "deadline-exceeded")
        assert time.monotonic() - started >= 0.08
        assert held(app) == 0
        gate.set()
        writer.write(post(image))
        assert (await answer(reader))[0] == 200

    talk(app, script)


def test_a_failure_that_nobody_foresaw_is_a_500_that_tells_nothing(app, image, monkeypatch, caplog):
    def fail(*_, **__):
        raise KeyError("a secret")

    monkeypatch.setattr(express_module, "predict_answer", fail)

    async def script(connect):
        reader, writer = await connect()
        writer.write(post(image, head=b"X-Request-Id: look-for-me\r\n"))
        status, _, body = await answer(reader)
        assert (status, body["code"]) == (500, "internal")
        assert "secret" not in json.dumps(body)

    talk(app, script)
    assert "a secret" in caplog.text
    assert any(getattr(one, "fields", {}).get("request_id") == "look-for-me" for one in caplog.records)
