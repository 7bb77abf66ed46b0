"""`python -m service`: read the settings, open the parts, serve until told to stop; exit 2 says why not."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import os
import resource
import signal
import socket
import sys
from functools import partial
from typing import TYPE_CHECKING, Final

import uvicorn
import uvloop

from service.adapters.request_log import RequestLog
from service.adapters.telemetry import log_to_stderr
from service.api.protocol import Protocol
from service.app import create_app, express_of
from service.settings import Settings, StartError

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI

_BACKLOG: Final = 2048
# Above the 60 s that proxies keep idle connections, so that it is never this side that hangs up first.
_KEEP_ALIVE_S: Final = 75
# Descriptors that no connection gets: the state's, those of models and modules that are loaded late.
_OTHER_FILES: Final = 128
# How long the event loop waits at most for a thread that decodes: of Python's own 5 ms it would see many.
# With half a millisecond the cores idle twice as long at 64 connections, and a fiftieth less is answered.
_SWITCH_S: Final = 0.0001
# Objects made before the young ones are searched for cycles, of which requests leave hardly any. Python's own
# 700 are those of a few requests, and cost them 3 % of their time.
_COLLECT_AFTER: Final = (20_000, 10, 10)

_log = logging.getLogger("tare")


def main() -> int:
    """Serve; return the exit code."""
    log_to_stderr()
    signals = _Signals()
    try:
        settings = Settings.from_environment()
        with (
            listen(settings) as listener,
            RequestLog(sys.stderr) as request_log,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            app = create_app(settings, request_log)
            runner.run(_serve(app, listener, signals, settings.drain_s))
    except StartError as refusal:
        print(f"tare: {refusal}", file=sys.stderr)
        return 2
    return 0


def listen(settings: Settings) -> socket.socket:
    """Return a listening socket. Raises StartError where there is none to be had, or none without a token."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
    except (OSError, UnicodeError) as failure:
        raise StartError(f"TARE_HOST: {settings.host} is no address of this machine") from failure
    loopback = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
    if not loopback and settings.admin_token is None and not settings.allow_anonymous:
        raise StartError(
            f"TARE_ADMIN_TOKEN: others can reach {settings.host}, so set a token, or TARE_ALLOW_ANONYMOUS=1 "
            "where something else keeps them out"
        )
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)  # at once: two that have only bound would not notice each other
    except OSError as failure:
        listener.close()
        raise StartError(
            f"TARE_PORT: cannot listen on {settings.host} port {settings.port} ({failure.strerror}); "
            "choose another"
        ) from failure
    return listener


class _Signals:
    """Ends the process at once while it starts, and gently once there is a server.

    At once means without unwinding: an exception raised in a signal handler is lost where Python ignores
    exceptions (a finaliser, a weak reference's callback: the import system runs one for every module), or
    waits for ever on a thread that nobody has been told to stop. The state is one that survives kill -9.

    While uvicorn serves it takes the signals itself, and raises them again when it is done; but one that
    comes just before it does must not be lost.
    """

    def __init__(self) -> None:
        self.server: uvicorn.Server | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self.server is None:
            os._exit(128 + number)
        self.server.should_exit = True


def server_of(app: FastAPI, drain_s: float = 0.0) -> uvicorn.Server:
    """Return the HTTP server of an application whose lifespan has begun; `drain_s` is left at a stop."""
    settings: Settings = app.state.settings
    protocol = partial(
        Protocol,
        express=express_of(app),
        head_s=settings.head_s,
        unread_s=settings.unread_s,
        most_connections=_room_for(settings.max_connections),
    )
    config = uvicorn.Config(
        app,
        http=protocol,  # type: ignore[arg-type]  # called, not looked at
        ws="none",
        lifespan="off",  # entered here, so that a refusal to start reaches main as what it is
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=drain_s,  # type: ignore[arg-type]  # asyncio.wait_for takes fractions too
    )
    return uvicorn.Server(config)


def _room_for(connections: int) -> int:
    """Let this process open enough files for so many connections; return for how many there is room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    room = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < room:
        resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
    if room < wanted:
        _log.warning(
            "so few files may be open that fewer connections are taken", extra={"fields": {"files": hard}}
        )
    return max(1, room - _OTHER_FILES)


async def _serve(app: FastAPI, listener: socket.socket, signals: _Signals, drain_s: float) -> None:
    async with app.router.lifespan_context(app):
        signals.server = server_of(app, drain_s)
        gc.collect()
        gc.freeze()  # what is loaded stays: later collections need not look at it
        gc.set_threshold(*_COLLECT_AFTER)
        sys.setswitchinterval(_SWITCH_S)
        url = _url(listener)
        _log.info("listening", extra={"fields": {"url": url, "docs": f"{url}/docs"}})
        await signals.server.serve(sockets=[listener])


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    sys.exit(main())
