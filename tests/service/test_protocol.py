"""Limits on a request's head, on real sockets."""

import asyncio
import json

import pytest
import uvicorn
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


def talk(script):
    """Run `script(reader, writer)` against the protocol and return what it returns."""

    async def run():
        config = uvicorn.Config(app, http=protocol.Protocol, lifespan="off", log_config=None, ws="none")
        config.load()
        state = ServerState()
        server = await asyncio.get_running_loop().create_server(
            lambda: protocol.Protocol(config, state, {}), "127.0.0.1", 0
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
def test_a_head_that_does_not_come_is_given_up_with_a_problem(monkeypatch, sent):
    monkeypatch.setattr(protocol, "HEAD_S", 0.2)

    async def script(reader, writer):
        writer.write(sent)
        head, body = await answer(reader)
        assert await reader.read() == b""
        return head, json.loads(body)

    head, body = talk(script)
    assert head.startswith("http/1.1 400 ")
    assert "x-request-id: " in head
    assert body["code"] == "malformed-request"
    assert "within" in body["detail"]


def test_a_second_request_has_to_come_whole_too(monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_S", 0.2)

    async def script(reader, writer):
        writer.write(GET)
        await answer(reader)
        writer.write(b"GET / HT")
        return (await answer(reader))[0]

    assert talk(script).startswith("http/1.1 400 ")


def test_a_body_may_take_longer_than_a_head(monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_S", 0.1)

    async def script(reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nab")
        await asyncio.sleep(0.3)
        writer.write(b"cd")
        return (await answer(reader))[1]

    assert talk(script) == b"4"


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
