"""The short way for plain predictions, on real sockets: what it takes, what it leaves, and how it ends."""

import asyncio
import contextlib
import json
import time

import pytest

from service.api import express as express_module
from service.api.express import Express
from service.api.protocol import Protocol
from service.api.tokens import Tokens
from service.app import create_app
from service.settings import Settings
from tests.service import wire

HOST = b"Host: x\r\n"


@pytest.fixture
def app(settings_for):
    return create_app(settings_for())


@pytest.fixture
def taken(monkeypatch):
    """What the short way has taken: each request's id."""
    seen = []
    real = express_module.ExpressCycle.__init__

    def init(self, express, plain, **options):
        seen.append(plain.request_id)
        real(self, express, plain, **options)

    monkeypatch.setattr(express_module.ExpressCycle, "__init__", init)
    return seen


def post(image, *, target=b"/predict", head=b"", length=None):
    size = len(image) if length is None else length
    return b"POST " + target + b" HTTP/1.1\r\n" + HOST + head + b"Content-Length: %d\r\n\r\n" % size + image


def talk(app, script):
    """Run `script(connect)` against the real server; `connect` opens a connection."""
    with wire.listening(app) as url:
        return converse(int(url.rpartition(":")[2]), script)


def converse(port, script):
    """Run `script(connect)` against what listens there, and close what it has opened."""

    async def main():
        writers = []

        async def connect():
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
            return reader, writer

        try:
            return await asyncio.wait_for(script(connect), 30)
        finally:
            for writer in writers:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

    return asyncio.run(main())


async def answer(reader):
    """Read one answer: status, headers, body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    body = await reader.readexactly(int(headers["content-length"]))
    return int(head[0].split(" ")[1]), headers, json.loads(body)


async def until(true):
    while not true():
        await asyncio.sleep(0.002)


def held(app):
    return app.state.intake.held_bytes


def test_a_plain_request_is_answered_as_the_route_answers(app, image, taken):
    async def script(connect):
        reader, writer = await connect()
        writer.write(post(image, target=b"/predict?top_k=2&tau=1.5", head=b"X-Request-Id: mine\r\n"))
        plain = await answer(reader)
        writer.write(post(image, target=b"/predict?top_k=2&tau=1%2E5", head=b"X-Request-Id: other\r\n"))
        usual = await answer(reader)
        return plain, usual

    (status, headers, body), usual = talk(app, script)
    assert taken == ["mine"]
    assert (status, usual[0]) == (200, 200)
    for one in (body, usual[2]):
        one["predictions"][0].pop("prediction_id")
    assert body == usual[2]
    assert headers["x-request-id"] == "mine"
    assert {"date", "server-timing"} <= headers.keys() == usual[1].keys()
    stages = dict(part.split(";dur=") for part in headers["server-timing"].split(", "))
    assert list(stages) == ["queue", "decode", "infer", "store", "total"]
    *parts, total = map(float, stages.values())
    assert sum(parts) == pytest.approx(total, abs=0.05)


PLAIN = [
    (b"/predict", b""),
    (b"/predict?", b""),
    (b"/predict?tau=0&top_k=3&priors=default&model=tiny&method=logit-adjustment&include=logits", b""),
    (b"/predict?method=none", b"Content-Type: text/plain\r\n"),
    (b"/predict", b"X-Request-Timeout-Ms: 60000\r\n"),
    (b"/predict", b"Authorization: Basic whatever\r\n"),
    (b"/predict", b"Connection: close\r\n"),
]
NOT_PLAIN = [
    (b"/predict?tau=1%2E0", b"", 200),
    (b"/predict?tau=+1", b"", 422),
    (b"/predict?tau=-1", b"", 422),
    (b"/predict?tau=nan", b"", 422),
    (b"/predict?tau=", b"", 422),
    (b"/predict?tau", b"", 422),
    (b"/predict?tau=1&tau=1", b"", 422),
    (b"/predict?top_k=0", b"", 422),
    (b"/predict?nothing=1", b"", 422),
    (b"/predict?&", b"", 200),
    (b"/predict?model=nobody", b"", 404),
    (b"/predict?priors=nobody", b"", 404),
    (b"/predict?method=none&tau=1", b"", 422),
    (b"/predict?method=weight-normalisation", b"", 422),
    (b"/predict?include=pixels", b"", 422),
    (b"/predict/", b"", 404),
    (b"/predict", b"X-Request-Timeout-Ms: 0\r\n", 422),
    (b"/predict", b"X-Request-Timeout-Ms: soon\r\n", 422),
    (b"/predict", b"X-Request-Timeout-Ms: 600001\r\n", 422),
    (b"/predict", b"Content-Type: multipart/form-data; boundary=x\r\n", 400),
]


@pytest.fixture(scope="module")
def shared_app(tmp_path_factory, tiny_models):
    state = tmp_path_factory.mktemp("shared") / "state"
    return create_app(Settings(models_dir=tiny_models, state_dir=state, lone_threads=1))


@pytest.fixture(scope="module")
def port(shared_app):
    with wire.listening(shared_app) as url:
        yield int(url.rpartition(":")[2])


def asked(port, request):
    async def script(connect):
        reader, writer = await connect()
        writer.write(request)
        return await answer(reader)

    return converse(port, script)


@pytest.mark.parametrize(("target", "head"), PLAIN)
def test_what_is_plain_is_taken(port, image, taken, target, head):
    assert asked(port, post(image, target=target, head=head))[0] == 200
    assert len(taken) == 1


@pytest.mark.parametrize(("target", "head", "status"), NOT_PLAIN)
def test_what_is_not_plain_goes_to_the_route_which_says_why(port, image, taken, target, head, status):
    assert asked(port, post(image, target=target, head=head))[0] == status
    assert taken == []


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET /predict HTTP/1.1\r\n",
        b"POST http://x/predict HTTP/1.1\r\n",
        b"POST /predict#part HTTP/1.1\r\n",
        b"POST /predict HTTP/1.0\r\nConnection: keep-alive\r\n",
    ],
)
def test_other_forms_of_a_request_go_the_usual_way(port, image, taken, request_line):
    whole = request_line + HOST + b"Content-Length: %d\r\n\r\n" % len(image) + image
    assert asked(port, whole)[0] in {200, 404, 405}
    assert taken == []


def test_a_body_without_a_length_goes_the_usual_way(port, image, taken):
    chunk = b"%x\r\n" % len(image) + image + b"\r\n0\r\n\r\n"
    head = b"POST /predict HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    assert asked(port, head + chunk)[0] == 200
    assert taken == []


def test_a_client_that_asks_before_it_sends_is_told_to_go_on(port, image, taken):
    async def script(connect):
        reader, writer = await connect()
        writer.write(post(b"", head=b"Expect: 100-continue\r\n", length=len(image)))
        assert b"100 Continue" in await reader.readuntil(b"\r\n\r\n")
        writer.write(image)
        assert (await answer(reader))[0] == 200

    converse(port, script)
    assert taken == []


def test_a_refusal_is_a_problem_and_the_connection_goes_on(port, image, taken):
    async def script(connect):
        reader, writer = await connect()
        writer.write(post(b"<html>", head=b"X-Request-Id: mine\r\n"))
        status, headers, body = await answer(reader)
        assert (status, body["code"], body["position"]) == (415, "unknown-image-format", 0)
        assert headers["content-type"] == "application/problem+json"
        assert headers["x-request-id"] == "mine"
        assert headers["server-timing"].startswith("total;dur=")
        writer.write(post(image))
        assert (await answer(reader))[0] == 200

    converse(port, script)
    assert len(taken) == 2


def test_piped_requests_are_answered_in_their_order_whichever_way_they_go(port, image):
    async def script(connect):
        reader, writer = await connect()
        ids = [b"a", b"b", b"c", b"d"]
        targets = [b"/predict", b"/predict", b"/predict?tau=1%2E0", b"/predict"]
        parts = [
            post(image, target=target, head=b"X-Request-Id: %s\r\n" % identity)
            for target, identity in zip(targets, ids, strict=True)
        ]
        writer.write(b"".join(parts))
        found = [await answer(reader) for _ in ids]
        assert [(status, headers["x-request-id"]) for status, headers, _ in found] == [
            (200, identity.decode()) for identity in ids
        ]

    converse(port, script)


@pytest.mark.parametrize("version", [b"close", b"keep-alive"])
def test_the_connection_is_closed_where_the_client_says_so(port, image, version):
    async def script(connect):
        reader, writer = await connect()
        writer.write(post(image, head=b"Connection: %s\r\n" % version))
        _, headers, _ = await answer(reader)
        assert headers.get("connection") == ("close" if version == b"close" else None)
        if version == b"close":
            assert await reader.read() == b""

    converse(port, script)


def test_a_client_that_hangs_up_leaves_the_queue_and_the_memory(app, image, gate, taken):
    async def script(connect):
        gate.clear()
        # More than the workers take at once, so that some wait.
        leaving = [await connect() for _ in range(40)]
        for _, writer in leaving:
            writer.write(post(image))
        await until(lambda: held(app) == 40 * len(image))
        waiting = app.state.parts.models.get().batcher
        await until(lambda: waiting.queued_items >= 1)
        for _, writer in leaving:
            writer.close()
        await until(lambda: held(app) == 0)
        assert (waiting.queued_items, waiting.queued_bytes) == (0, 0)
        gate.set()
        reader, writer = await connect()
        writer.write(post(image))
        assert (await answer(reader))[0] == 200

    talk(app, script)
    shown = app.state.telemetry.exposition().decode()
    assert 'tare_dropped_requests_total{model="tiny",reason="client-left"} 40.0' in shown
    assert 'status="499"} 40.0' in shown


def test_a_client_that_hangs_up_half_way_through_its_body_leaves_nothing(app, image):
    async def script(connect):
        _, writer = await connect()
        writer.write(post(image[:50], length=len(image)))
        await until(lambda: held(app) == 50)
        writer.close()
        await until(lambda: held(app) == 0)

    talk(app, script)


def test_a_body_may_come_in_pieces(port, image, taken):
    async def script(connect):
        reader, writer = await connect()
        for piece in (post(image[:10], length=len(image)), image[10:20], image[20:]):
            writer.write(piece)
            await asyncio.sleep(0.02)
        assert (await answer(reader))[0] == 200

    converse(port, script)
    assert len(taken) == 1


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


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"", 401),
        (b"Authorization: Bearer wrong\r\n", 401),
        (b"Authorization: Bearer pre\r\nAuthorization: Bearer wrong\r\n", 200),
        (b"Authorization: bearer pre\r\n", 200),
        (b"Authorization: Bearer adm\r\n", 200),
        (b"Authorization: Basic pre\r\n", 401),
    ],
)
def test_the_token_that_the_route_needs_is_needed_here(settings_for, image, header, status):
    app = create_app(settings_for(admin_token="adm", predict_token="pre"))

    async def script(connect):
        reader, writer = await connect()
        writer.write(post(image, head=header))
        assert (await answer(reader))[0] == status

    talk(app, script)


def test_the_queries_that_are_remembered_are_bounded(app):
    async def script(connect):
        state = app.state
        short = Express(state.parts, Tokens(None, None), state.intake, lambda _: None)
        for number in range(1000):
            assert short._asked(b"top_k=%d" % (number + 1)) == {"top_k": number + 1}
        assert len(short._queries) <= 256

    talk(app, script)


def test_while_a_client_does_not_read_its_answers_its_requests_wait_in_the_usual_way(
    port, image, taken, monkeypatch
):
    opened = []
    real = Protocol.connection_made

    def made(self, transport):
        opened.append(self)
        real(self, transport)

    monkeypatch.setattr(Protocol, "connection_made", made)

    async def script(connect):
        reader, writer = await connect()
        writer.write(post(image))
        await answer(reader)
        (protocol,) = opened
        protocol.loop.call_soon_threadsafe(protocol.pause_writing)  # as uvloop says when its buffer is full
        await asyncio.sleep(0.05)
        writer.write(post(image))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2)
        protocol.loop.call_soon_threadsafe(protocol.resume_writing)
        assert (await answer(reader))[0] == 200

    converse(port, script)
    assert len(taken) == 1
