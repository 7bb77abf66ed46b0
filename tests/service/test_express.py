"""The short way for plain predictions, on real sockets: what it takes, what it leaves, and how it ends."""

import asyncio

import pytest

from service.api import express as express_module
from service.api.express import Express
from service.api.protocol import Protocol
from service.api.tokens import Tokens
from service.app import create_app
from service.settings import Settings
from tests.service import wire
from tests.service.short_way import HOST, answer, converse, held, post, talk, until


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


def test_a_body_may_come_in_pieces(port, image, taken):
    async def script(connect):
        reader, writer = await connect()
        for piece in (post(image[:10], length=len(image)), image[10:20], image[20:]):
            writer.write(piece)
            await asyncio.sleep(0.02)
        assert (await answer(reader))[0] == 200

    converse(port, script)
    assert len(taken) == 1


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
