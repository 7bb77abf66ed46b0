"""The HTTP protocol of uvicorn, with the limits on the head of a request that it lacks: time and size."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.problems import MEDIA_TYPE, problem

HEAD_S: Final = 30.0
HEAD_BYTES: Final = 64 * 1024


class Protocol(HttpToolsProtocol):
    """Gives up on a head that is not whole after HEAD_S or HEAD_BYTES, with a problem as the answer.

    A connection that stays silent from the start counts as a head that never comes; between two requests
    uvicorn's own keep-alive limit holds.
    """

    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._head_is_over()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and look how much of it still belongs to a head."""
        super().data_received(data)
        if self._timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self.send_400_response(f"The request's head has more than {HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        """Begin to wait for the head of this request."""
        super().on_message_begin()
        if self._timer is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """Hand the request over."""
        self._head_is_over()
        super().on_headers_complete()

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
            f"x-request-id: {uuid.uuid4().hex}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + bytes(answer.body))
        self.transport.close()

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._timer = self.loop.call_later(HEAD_S, self._too_late)

    def _head_is_over(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        self.send_400_response(f"The request's head did not arrive within {HEAD_S:g} s.")
