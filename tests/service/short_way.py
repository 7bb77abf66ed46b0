"""Talking to the short way on real sockets, byte by byte."""

import asyncio
import contextlib
import json

from tests.service import wire

HOST = b"Host: x\r\n"


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
