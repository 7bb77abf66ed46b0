"""Limits for slow clients, and what half-closed connections are owed, on real sockets."""

import asyncio
import gc
import json

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from service.api import protocol


async def app(scope, receive, send):
    """Answer with the number of bytes in the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = str(size).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def talk(script, app=app, **limits):
    """Run `script(reader, writer)` against the protocol and return what it returns."""

    async def run():
        config = uvicorn.Config(app, http=protocol.Protocol, lifespan="off", log_config=None, ws="none")
        config.load()
        state = ServerState()
        server = await asyncio.get_running_loop().create_server(
            lambda: protocol.Protocol(config, state, {}, **limits), "127.0.0.1", 0
        )
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            try:
                return await asyncio.wait_for(script(reader, writer), 30)
            finally:
                writer.close()
                await asyncio.gather(*state.tasks)

    return asyncio.run(run())


async def answer(reader):
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    size = int(head.split("content-length: ")[1].split("\r\n")[0])
    return head, await reader.readexactly(size)


GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def test_requests_on_one_connection_are_answered_one_by_one_and_piped():
    async def script(reader, writer):
        for burst in (1, 3):
            writer.write(GET * burst)
            for _ in range(burst):
                assert (await answer(reader))[1] == b"0"

    talk(script)


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_does_not_come_is_given_up_with_a_problem(sent):
    async def script(reader, writer):
        writer.write(sent)
        head, body = await answer(reader)
        assert await reader.read() == b""
        return head, json.loads(body)

    head, body = talk(script, head_s=0.2)
    assert head.startswith("http/1.1 400 ")
    assert "x-request-id: " in head
    assert body["code"] == "malformed-request"
    assert "within" in body["detail"]


def test_a_second_request_has_to_come_whole_too():
    async def script(reader, writer):
        writer.write(GET)
        await answer(reader)
        writer.write(b"GET / HT")
        return (await answer(reader))[0]

    assert talk(script, head_s=0.2).startswith("http/1.1 400 ")


def test_a_body_may_take_longer_than_a_head():
    async def script(reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nab")
        await asyncio.sleep(0.3)
        writer.write(b"cd")
        return (await answer(reader))[1]

    assert talk(script, head_s=0.1) == b"4"


@pytest.mark.parametrize("line", [b"X-Long: " + b"x" * 1000 + b"\r\n", b"x" * 1000])
def test_a_head_without_end_is_cut_off(line):
    async def script(reader, writer):
        writer.write(b"GET / HTTP/1.1\r\n" + (b"X-Endless: " if b":" not in line else b""))
        for _ in range(500):
            writer.write(line)
        return await answer(reader)

    head, body = talk(script)
    assert head.startswith("http/1.1 400 ")
    assert "bytes" in json.loads(body)["detail"]


def test_a_large_body_right_behind_a_head_is_no_large_head():
    async def script(reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000)
        return (await answer(reader))[1]

    assert talk(script) == b"300000"


async def large(scope, receive, send):
    """Answer with more than any socket takes unread."""
    answered.append(scope["path"])
    body = b"x" * (16 << 20)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


answered = []


@pytest.fixture(autouse=True)
def nothing_answered():
    answered.clear()


def test_an_answer_that_nobody_reads_is_dropped_with_its_connection_and_no_other_is_made():
    async def script(reader, writer):
        writer.write(GET * 5)
        await asyncio.sleep(0.6)
        assert len(answered) <= 2  # the one that is not read, and one that waits for it
        with pytest.raises(asyncio.IncompleteReadError):
            await answer(reader)

    talk(script, large, unread_s=0.3)


def test_an_answer_may_be_read_in_its_own_time_up_to_the_limit():
    async def script(reader, writer):
        writer.write(GET)
        await asyncio.sleep(0.3)
        return len((await answer(reader))[1])

    assert talk(script, large, unread_s=20) == 16 << 20


async def patient(scope, receive, send):
    """Answer when told to, and note who has hung up."""
    answered.append(scope["path"])
    asking = asyncio.ensure_future(receive())
    await asyncio.wait((asking,))
    leaving = asyncio.ensure_future(receive())
    await asyncio.wait((leaving,), timeout=0.4)
    if leaving.done():
        answered.append("left")
        return
    leaving.cancel()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def test_a_client_that_shuts_its_side_after_its_requests_is_answered_and_then_left():
    async def script(reader, writer):
        writer.write(GET * 2)
        writer.write_eof()
        return await reader.read()

    assert talk(script, patient).count(b"HTTP/1.1 200 ") == 2


def test_a_client_that_hangs_up_altogether_is_found_out_before_its_answer():
    async def script(reader, writer):
        writer.write(GET)
        await asyncio.sleep(0.05)
        writer.close()
        await asyncio.sleep(0.3)
        assert answered == ["/", "left"]

    talk(script, patient)


def test_interim_answers_to_a_half_closed_client_stand_before_the_answer():
    async def script(reader, writer):
        writer.write(GET)
        writer.write_eof()
        return await reader.read()

    *interim, last, rest = talk(script, patient).split(b"\r\n\r\n")
    assert set(interim) == {b"HTTP/1.1 100 Continue"}
    assert last.startswith(b"HTTP/1.1 200 ")
    assert rest == b""


def test_a_client_of_http_1_0_gets_no_interim_answer():
    async def script(reader, writer):
        writer.write(GET.replace(b"1.1", b"1.0"))
        writer.write_eof()
        return await reader.read()

    assert talk(script, patient).startswith(b"HTTP/1.1 200 ")


def test_half_a_body_is_not_waited_for_when_the_client_has_shut_its_side():
    async def script(reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nab")
        writer.write_eof()
        return await reader.read()

    assert b" 200 " not in talk(script, abandoned)
    assert answered == ["http.disconnect"]


async def abandoned(scope, receive, send):
    """Read until there is nothing more to come."""
    while (message := await receive())["type"] == "http.request" and message["more_body"]:
        pass
    answered.append(message["type"])


@pytest.mark.slow
def test_of_many_requests_sent_ahead_a_few_are_held_and_all_are_answered():
    async def script(reader, writer):
        writer.write(GET * 5000)
        for _ in range(5000):
            assert (await answer(reader))[1] == b"0"
        assert max(held) < 1500

    held = []

    async def counting(scope, receive, send):
        if len(held) < 20:
            held.append(sum(issubclass(type(one), RequestResponseCycle) for one in gc.get_objects()))
        await app(scope, receive, send)

    talk(script, counting)


async def early(scope, receive, send):
    """Answer without waiting for the body."""
    await app({**scope}, no_body, send)


async def no_body():
    return {"type": "http.request", "body": b"", "more_body": False}


def test_the_rest_of_a_body_that_is_answered_already_is_not_waited_for_for_ever():
    async def script(reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nab")
        assert (await answer(reader))[1] == b"0"
        with pytest.raises(ConnectionError):
            for _ in range(100):
                writer.write(b"c")
                await writer.drain()
                await asyncio.sleep(0.02)

    talk(script, early, head_s=0.3)


def test_a_connection_goes_on_when_the_rest_of_such_a_body_has_come():
    async def script(reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nab")
        await answer(reader)
        writer.write(b"cd")
        await asyncio.sleep(0.5)
        writer.write(GET)
        return (await answer(reader))[1]

    assert talk(script, early, head_s=0.3) == b"0"


@pytest.mark.parametrize("endless", [b"0\r\n" + b"X-Trailer: x\r\n" * 9000, b"1;" + b"x" * 100_000])
def test_a_body_whose_framing_has_no_end_is_cut_off(endless):
    async def script(reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + endless)
        head, body = await answer(reader)
        assert head.startswith("http/1.1 400 ")
        assert "framed" in json.loads(body)["detail"]

    talk(script)


def test_a_body_in_small_chunks_is_a_body():
    async def script(reader, writer):
        head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head + b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n")
        return (await answer(reader))[1]

    assert talk(script) == b"50000"
