"""The HTTP protocol of uvicorn, with limits for slow clients and a short way for plain predictions."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.envelope import request_id
from service.api.express import ExpressCycle
from service.api.problems import MEDIA_TYPE, problem

if TYPE_CHECKING:
    from starlette.responses import Response
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from service.api.express import Express

HEAD_BYTES: Final = 64 * 1024
# Chunk sizes and trailers, beside the body itself: so many bytes, and so many for each byte of the body.
_FRAMING_BYTES: Final = HEAD_BYTES
_FRAMING_RATIO: Final = 8
# Requests behind the one in work; what comes behind them is left unparsed, and unread.
_MOST_PIPED: Final = 16
_SLICE_BYTES: Final = 16 * 1024
# What of an answer may wait for the kernel before the client counts as one that does not read: more than most
# answers have, for these are sent together with the others of their batch, at the end of the loop's turn.
_UNREAD_BYTES: Final = 16 * 1024
# When to look for a client that has shut its side of the connection: soon, soon again, then now and then.
_LOOKS_S: Final = (0.02, 0.05)
_LATER_LOOKS_S: Final = 1.0
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class Protocol(HttpToolsProtocol):
    """Gives up on clients that are slow, and holds little for those that are many.

    - A head that is not whole after `head_s` or HEAD_BYTES is answered with a problem. A connection that
      stays silent from the start counts as a head that never comes; between two requests uvicorn's own
      keep-alive limit holds.
    - A body's time is limited where it is read (`Intake.patience_s`). Once it is answered, the rest of a body
      has `head_s` to come.
    - An answer that the client has not taken in after `unread_s` is dropped with its connection; until then
      nothing else is made for it.
    - Of requests sent ahead only a few are parsed.
    - Connections beyond `most_connections` are answered with a problem and closed.
    - A client that has shut its side after a whole request is answered, not one that has hung up altogether.

    What `Express` takes never meets ASGI.
    """

    def __init__(
        self,
        *arguments: Any,
        express: Express | None = None,
        head_s: float = 30.0,
        unread_s: float = 60.0,
        most_connections: int = 12_000,
        **options: Any,
    ) -> None:
        """Without `express` every request goes the usual way."""
        super().__init__(*arguments, **options)
        self._express = express
        self._head_s = head_s
        self._unread_s = unread_s
        self._most_connections = most_connections
        self._plain: ExpressCycle | None = None  # the one under way
        self._running: RequestResponseCycle | None = None  # the last to have met ASGI
        self._timer: asyncio.TimerHandle | None = None  # of the head, or of a body's rest
        self._unread: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._in_head = True
        self._in_body = False
        self._head_bytes = 0
        self._framing_bytes = 0
        self._unparsed = b""
        self._half_closed = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self.flow = self._reading = _Flow(transport)
        transport.set_write_buffer_limits(high=_UNREAD_BYTES)
        if len(self.connections) > self._most_connections:
            detail = "The service has as many connections as it takes; try again."
            self._hang_up(problem({"path": ""}, 503, "too-many-connections", detail))
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._head_is_over()
        for timer in (self._unread, self._look):
            if timer is not None:
                timer.cancel()
        self._unparsed = b""
        if self._plain is not None:
            self._plain.lost()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn tells the last one alone, which may wait behind it
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, as long as not too many requests wait."""
        unparsed, self._unparsed = self._unparsed, b""
        self._parse(unparsed + data if unparsed else data)

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn's own has nothing to say
        """Hear that the client sends no more; return whether it is owed an answer still."""
        if self._in_body or not self._owes():
            return False
        if not self._half_closed:
            self._half_closed = True
            self._look_later(0)
        return True

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """The client has read all."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def timeout_keep_alive_handler(self) -> None:
        """Close, once the client has taken what was sent to it."""
        super().timeout_keep_alive_handler()
        self._await_reader()

    def on_response_complete(self) -> None:
        """Go on with what was sent ahead, or wait for the next request."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._await_reader()
            return
        if self._unparsed and len(self.pipeline) < _MOST_PIPED:
            unparsed, self._unparsed = self._unparsed, b""
            self._parse(unparsed)
        if not self.pipeline and not self._unparsed:
            self._reading.let_go()
        if self._in_body and self.cycle.response_complete:
            self._head_is_over()
            self._timer = self.loop.call_later(self._head_s, self.transport.abort)
        elif self._half_closed and not self._owes():
            self.transport.close()

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
        self._in_body = True
        self._framing_bytes = 0
        if self._express is not None and self._is_next() and self._take_plain(self._express):
            return
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Hand over a piece of the body."""
        self._framing_bytes -= (1 + _FRAMING_RATIO) * len(body)
        cycle: object = self.cycle
        if isinstance(cycle, ExpressCycle):
            cycle.feed(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Say that the body is whole."""
        self._in_body = False
        self._head_is_over()  # and the rest of a body that was answered before it was whole
        cycle: object = self.cycle
        if isinstance(cycle, ExpressCycle):
            cycle.whole()
        else:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, as every refusal is answered, and hang up."""
        self._hang_up(problem({"path": ""}, 400, "malformed-request", msg))

    def _hang_up(self, answer: Response) -> None:
        self._head_is_over()
        if self.transport.is_closing():
            return
        head = (
            f"HTTP/1.1 {answer.status_code} {HTTPStatus(answer.status_code).phrase}\r\n"
            f"content-type: {MEDIA_TYPE}\r\ncontent-length: {len(answer.body)}\r\n"
            f"x-request-id: {request_id(None)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + bytes(answer.body))
        self.transport.close()
        self._await_reader()

    def _await_reader(self) -> None:
        if self._unread is None and self.transport.get_write_buffer_size():
            self._unread = self.loop.call_later(self._unread_s, self.transport.abort)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _parse(self, data: bytes) -> None:
        """Parse as much as may be taken, and look how much of it belongs to a head or frames a body."""
        for start in range(0, len(data), _SLICE_BYTES):
            if len(self.pipeline) >= _MOST_PIPED:
                self._unparsed = data[start:]
                break
            piece = data[start : start + _SLICE_BYTES]
            self._framing_bytes += len(piece)
            super().data_received(piece)
            if self.transport.is_closing():
                return
            if self._in_head:
                self._head_bytes += len(piece)
                if self._head_bytes > HEAD_BYTES:
                    self.send_400_response(f"The request's head has more than {HEAD_BYTES} bytes.")
                    return
            elif self._in_body and self._framing_bytes > _FRAMING_BYTES:
                self.send_400_response("The request's body is framed by more bytes than it has.")
                return
        if self.pipeline or self._unparsed:
            self._reading.hold()
        if self._in_head:
            if self._timer is None:
                self._await_head()
        elif self._plain is not None:
            self._plain.await_body(self.loop)

    def _owes(self) -> bool:
        """Whether a request that has come is not answered yet."""
        cycle = self.cycle
        unanswered = cycle is not None and not cycle.response_complete
        return unanswered or bool(self.pipeline or self._unparsed)

    def _look_later(self, looks: int) -> None:
        delay_s = _LOOKS_S[looks] if looks < len(_LOOKS_S) else _LATER_LOOKS_S
        self._look = self.loop.call_later(delay_s, self._look_for_client, looks + 1)

    def _look_for_client(self, looks: int) -> None:
        """Send an interim answer: who has hung up altogether resets the connection, which the next one finds.

        There is no other way to tell, for both look alike until something is sent.
        """
        if self.transport.is_closing() or not self._owes():
            return
        cycle = self.cycle
        # Not between two answers, nor in the middle of one.
        begun = bool(self.pipeline) or getattr(cycle, "response_started", False) or self.flow.write_paused
        if not begun and self.parser.get_http_version() == "1.1":
            self.transport.write(_CONTINUE)
        self._look_later(looks)

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
        self._timer = self.loop.call_later(self._head_s, self._too_late)

    def _head_is_over(self) -> None:
        self._in_head = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        self.send_400_response(f"The request's head did not arrive within {self._head_s:g} s.")


class _Flow(FlowControl):
    """Reads nothing while it is held, whoever would read on."""

    _held = False

    def hold(self) -> None:
        """Read no more."""
        self._held = True
        self.pause_reading()

    def let_go(self) -> None:
        """Read again."""
        if self._held:
            self._held = False
            self.resume_reading()

    def resume_reading(self) -> None:
        """Read again, unless held."""
        if not self._held:
            super().resume_reading()
