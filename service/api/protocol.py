"""The HTTP protocol of uvicorn, with limits on a request's head and a short way for plain predictions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.envelope import request_id
from service.api.express import ExpressCycle
from service.api.problems import MEDIA_TYPE, problem

if TYPE_CHECKING:
    from service.api.express import Express

HEAD_S: Final = 30.0
HEAD_BYTES: Final = 64 * 1024


class Protocol(HttpToolsProtocol):
    """Gives up on a head that is not whole after HEAD_S or HEAD_BYTES, with a problem as the answer.

    A connection that stays silent from the start counts as a head that never comes; between two requests
    uvicorn's own keep-alive limit holds. What `Express` takes never meets ASGI.
    """

    def __init__(self, *arguments: Any, express: Express | None = None, **options: Any) -> None:
        """Without `express` every request goes the usual way."""
        super().__init__(*arguments, **options)
        self._express = express
        self._plain: ExpressCycle | None = None  # the one under way
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._head_is_over()
        if self._plain is not None:
            self._plain.lost()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and look how much of it still belongs to a head."""
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self.send_400_response(f"The request's head has more than {HEAD_BYTES} bytes.")
            elif self._timer is None:
                self._await_head()
        elif self._plain is not None:
            self._plain.await_body(self.loop)

    def on_message_begin(self) -> None:
        """Take what comes for a head. What only ASGI needs is made once it is known to go there."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._in_head = True
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """Hand the request over."""
        self._head_is_over()
        if self._express is not None and self._is_next() and self._take_plain(self._express):
            return
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Hand over a piece of the body."""
        cycle: object = self.cycle
        if isinstance(cycle, ExpressCycle):
            cycle.feed(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Say that the body is whole."""
        cycle: object = self.cycle
        if isinstance(cycle, ExpressCycle):
            cycle.whole()
        else:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, as every refusal is answered, and hang up."""
        self._head_is_over()
        if self.transport.is_closing():
            return
        scope: dict[str, Any] = {"path": ""}
        answer = problem(scope, 400, "malformed-request", msg)
        head = (
            "HTTP/1.1 400 Bad Request\r\n"
            f"content-type: {MEDIA_TYPE}\r\ncontent-length: {len(answer.body)}\r\n"
            f"x-request-id: {request_id(None)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + bytes(answer.body))
        self.transport.close()

    def _is_next(self) -> bool:
        """Whether no request before this one is unanswered, and whoever sends them reads the answers."""
        before = self.cycle
        return (before is None or before.response_complete) and not self.flow.write_paused

    def _take_plain(self, express: Express) -> bool:
        """Take the request off the usual way if it is plain."""
        parser = self.parser
        if parser.get_method() != b"POST" or parser.get_http_version() != "1.1" or parser.should_upgrade():
            return False
        plain = express.plain(self.url, self.headers)
        if plain is None:
            return False
        self._plain = self.cycle = ExpressCycle(  # type: ignore[assignment]  # uvicorn's own is an ASGI cycle
            express,
            plain,
            keep_alive=parser.should_keep_alive(),
            write=self._write,
            ended=self._plain_is_over,
        )
        return True

    def _write(self, head: bytes, body: bytes, *, close: bool) -> None:
        """Send an answer in one piece: its head as far as it goes, the server's own headers, the body."""
        parts = [head]
        for name, value in self.server_state.default_headers:
            parts += (name, b": ", value, b"\r\n")
        parts += (b"\r\n", body)
        self.transport.write(b"".join(parts))
        if close:
            self.transport.close()

    def _plain_is_over(self) -> None:
        self._plain = None
        self.on_response_complete()

    def _await_head(self) -> None:
        self._timer = self.loop.call_later(HEAD_S, self._too_late)

    def _head_is_over(self) -> None:
        self._in_head = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        self.send_400_response(f"The request's head did not arrive within {HEAD_S:g} s.")
