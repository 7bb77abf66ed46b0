"""The whole application behind its real HTTP server, on a free port, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
import uvloop
from fastapi import FastAPI

from service.__main__ import server_of


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Serve the application while the block runs; yield its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    began = threading.Event()
    serving = {}

    async def serve() -> None:
        async with app.router.lifespan_context(app):
            serving["server"] = server_of(app, drain_s=5.0)
            began.set()
            await serving["server"].serve(sockets=[listener])

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert began.wait(60)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        serving["server"].should_exit = True
        thread.join()


@contextmanager
def beside(server: uvicorn.Server) -> Iterator[int]:
    """Run another server of an application whose lifespan has begun elsewhere; yield its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.serve(sockets=[listener]))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def client_of(app: FastAPI) -> Iterator[httpx.Client]:
    """Yield a client of the application over HTTP."""
    with listening(app) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client
