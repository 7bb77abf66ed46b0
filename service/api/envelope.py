"""What goes round every request: an id, a line in the log, a count, and never a bare failure."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from itertools import count
from typing import TYPE_CHECKING, Final, NamedTuple

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from service.api.problems import PROBLEM_CODE, internal, stopping

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from service.core.records import Stages

_ACCEPTED_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+/=@-]{0,127}")
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
STAGES: Final = "tare.stages"  # the key in a request's scope under which its stages stand, once it is decided
CLIENT_LEFT: Final = 499  # never sent: the log's word for a client that hung up first

_PREFIX: Final = secrets.token_hex(12)  # this process's own; a number makes it a request's
_NUMBERS: Final = count()

_log = logging.getLogger("tare.requests")


class Exchange(NamedTuple):
    """One request and what became of it.

    `code` is the problem's, None for a success; `stages` say where the time of one that was decided went;
    `traceparent` is the client's own, as it came (W3C Trace Context).
    """

    request_id: str
    method: str
    route: str
    status: int
    seconds: float
    code: str | None
    stages: Stages | None = None
    traceparent: str | None = None


class Envelope:
    """The outermost middleware.

    Gives every answer an `X-Request-Id` (the client's own where it is sane) and a `Server-Timing`, answers
    HEAD as GET without the body, turns what nobody foresaw into a 500 that tells nothing and what the server
    cancels because it stops into a 503, and reports each exchange. `in_request` opens the context that marks
    log lines with the id.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        in_request: Callable[[str], AbstractContextManager[object]],
        report: Callable[[Exchange], None],
    ) -> None:
        self._app = app
        self._in_request = in_request
        self._report = report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's event."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = request_id(Headers(scope=scope).get("x-request-id"))
        with self._in_request(identity):
            await self._exchange(identity, scope, receive, send)

    async def _exchange(self, identity: str, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        head = scope["method"] == "HEAD"
        inner: Scope = {**scope, "method": "GET"} if head else scope
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identity.encode())]
                if not any(name.lower() == b"server-timing" for name, _ in message["headers"]):
                    total = f"total;dur={(time.perf_counter() - started) * 1000:.2f}"
                    message["headers"].append((b"server-timing", total.encode()))
            elif head and message["type"] == "http.response.body":
                if message.get("more_body", False):
                    return
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        try:
            await self._app(inner, receive, answer)
        except ClientDisconnect:
            status = status or CLIENT_LEFT
        except asyncio.CancelledError:  # the server's way to say that the time to answer is over
            if status:
                raise
            await stopping(inner)(inner, receive, answer)
        except Exception:  # the last stop: whatever it was, the client gets an answer and the log the reason
            _log.exception("a request failed")
            if status:
                raise  # half an answer is out; the server cuts the connection
            problem = internal(inner)
            await problem(inner, receive, answer)
        finally:
            self._report(
                Exchange(
                    request_id=identity,
                    method=scope["method"] if scope["method"] in _METHODS else "other",
                    route=getattr(inner.get("route"), "path", "unmatched"),
                    status=status,
                    seconds=time.perf_counter() - started,
                    code=inner.get(PROBLEM_CODE),
                    stages=inner.get(STAGES),
                    traceparent=Headers(scope=scope).get("traceparent"),
                )
            )


def request_id(given: str | None) -> str:
    """Return the client's own id where it is sane, else a new one."""
    if given is not None and _ACCEPTED_ID.fullmatch(given):
        return given
    return f"{_PREFIX}{next(_NUMBERS):08x}"
