"""POST /predict without a framework: the plain case, straight from the parser to the batcher and back.

A request that is plain in every way (one image as the body, its length declared, parameters and token in
order) is taken here, at a fraction of the cost; every other goes on to the route in `service.api.predict`,
which also words every refusal that a look at the head is enough for. What the two share, they share as code:
parameter types, tokens, the intake's limits, the answer's shape, problems, and the report of each exchange.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from pydantic import TypeAdapter, ValidationError

from service.api.answers import predict_answer, server_timing
from service.api.bodies import body_too_late, intake_is_full
from service.api.envelope import CLIENT_LEFT, Exchange, request_id
from service.api.parameters import DEADLINE_HEADER, Milliseconds, Name, Tau, TopK
from service.api.predict import Included
from service.api.problems import PROBLEM_CODE, internal, refused
from service.core.exceptions import Refusal
from service.core.records import Method

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.responses import Response

    from service.api.bodies import Intake
    from service.api.tokens import Tokens
    from service.core.models import LoadedModel
    from service.core.parts import Parts
    from service.core.predict import Underway
    from service.core.records import Adjustment, Stages

ROUTE: Final = "/predict"

_PATH: Final = ROUTE.encode()
_DEADLINE: Final = DEADLINE_HEADER.lower().encode()
_KEPT_QUERIES: Final = 256
# Names and types of the route's own query parameters.
_QUERY: Final[dict[str, TypeAdapter[Any]]] = {
    "tau": TypeAdapter(Tau),
    "top_k": TypeAdapter(TopK),
    "priors": TypeAdapter(Name),
    "model": TypeAdapter(Name),
    "method": TypeAdapter(Method),
    "include": TypeAdapter(Included),
}
_MILLISECONDS: Final = TypeAdapter(Milliseconds)

_log = logging.getLogger("tare.requests")

Headers = list[tuple[bytes, bytes]]


class Plain(NamedTuple):
    """What the head of a plain request asks for."""

    model: LoadedModel
    adjustment: Adjustment
    top_k: int
    logits: bool
    deadline_s: float | None
    request_id: str
    traceparent: str | None
    body_bytes: int
    arrived: float  # time.perf_counter


class Express:
    """Takes what is plain. One for each application, on its event loop's thread."""

    def __init__(
        self, parts: Parts, tokens: Tokens, intake: Intake, report: Callable[[Exchange], None]
    ) -> None:
        self.intake = intake
        self.report = report
        self.predictor = parts.predictor
        self._models = parts.models
        self._tokens = tokens
        self._queries: dict[bytes, dict[str, Any] | None] = {}

    def plain(self, url: bytes, headers: Headers) -> Plain | None:
        """Return what a POST with this head asks for, None where it is not for this way."""
        path, _, query = url.partition(b"?")
        if path != _PATH:
            return None
        length = token = identity = deadline = traceparent = None
        for name, value in headers:
            if name == b"content-length":
                length = value
            elif name == b"content-type":
                if b"multipart" in value.lower():
                    return None
            elif name == b"authorization":
                if token is not None:
                    return None
                token = value.decode("latin-1")
            elif name == b"x-request-id":
                identity = value.decode("latin-1") if identity is None else identity
            elif name == _DEADLINE:
                if deadline is not None:
                    return None
                deadline = value.decode("latin-1")
            elif name in {b"transfer-encoding", b"expect", b"upgrade"}:
                return None
            elif name == b"traceparent" and traceparent is None:
                traceparent = value.decode("latin-1")
        if length is None or not length.isdigit() or int(length) > self.intake.max_body_bytes:
            return None
        asked = self._asked(query)
        if asked is None or not self._tokens.let_predict(token):
            return None
        try:
            model = self._models.get(asked.get("model"))
            adjustment = self.predictor.adjustment_for(
                model,
                method=asked.get("method", "logit-adjustment"),
                tau=asked.get("tau"),
                priors_name=asked.get("priors"),
            )
            deadline_ms = None if deadline is None else _MILLISECONDS.validate_python(deadline)
        except (Refusal, ValidationError):
            return None
        return Plain(
            model=model,
            adjustment=adjustment,
            top_k=asked.get("top_k", 5),
            logits="include" in asked,
            deadline_s=None if deadline_ms is None else deadline_ms / 1000,
            request_id=request_id(identity),
            traceparent=traceparent,
            body_bytes=int(length),
            arrived=time.perf_counter(),
        )

    def _asked(self, query: bytes) -> dict[str, Any] | None:
        """Return the parameters of a query; None where one is not in order, or not written plainly."""
        if query not in self._queries:
            if len(self._queries) >= _KEPT_QUERIES:
                self._queries.clear()
            self._queries[query] = _parameters(query)
        return self._queries[query]


class Write(Protocol):
    """How an answer is sent."""

    def __call__(self, head: bytes, body: bytes, *, close: bool) -> None:
        """Send a head as far as it goes, whatever the server adds to it, and a body."""


class ExpressCycle:
    """One plain request and its answer, on one connection.

    To uvicorn it is what its own `RequestResponseCycle` is: it has the attributes that the protocol reads
    and sets. `ended` is called after the answer, also where none could be sent.
    """

    disconnected = False

    def __init__(
        self,
        express: Express,
        plain: Plain,
        *,
        keep_alive: bool,
        write: Write,
        ended: Callable[[], None],
    ) -> None:
        self.response_complete = False
        self.keep_alive = keep_alive
        self.message_event = _NOBODY_WAITS
        self._express = express
        self._plain = plain
        self._write = write
        self._ended = ended
        self._chunks: list[bytes] = []
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None
        self._underway: Underway | None = None

    def feed(self, chunk: bytes) -> None:
        """Take a piece of the body."""
        if self.response_complete:
            return
        intake = self._express.intake
        self._chunks.append(chunk)
        self._size += len(chunk)
        intake.held_bytes += len(chunk)
        if intake.held_bytes > intake.max_held_bytes:
            self._refuse(intake_is_full())

    def await_body(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for the rest of the body, but not for ever."""
        if self._timer is None and self._underway is None and not self.response_complete:
            patience_s = self._express.intake.patience_s
            self._timer = loop.call_later(patience_s, self._refuse, body_too_late(patience_s))

    def whole(self) -> None:
        """Take the body as complete, and begin."""
        if self.response_complete:
            return
        self._wait_no_longer()
        plain, chunks = self._plain, self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        try:
            self._underway = self._express.predictor.begin(
                [body],
                model=plain.model,
                adjustment=plain.adjustment,
                top_k=plain.top_k,
                shape=partial(predict_answer, plain.model.version, plain.adjustment, logits=plain.logits),
                done=self._done,
                deadline_s=plain.deadline_s,
            )
        except Refusal as refusal:
            self._refuse(refusal)

    def lost(self) -> None:
        """The client has hung up."""
        if self.response_complete:
            return
        self._wait_no_longer()
        if self._underway is not None:
            self._express.predictor.abandon(self._underway)
        self._end(CLIENT_LEFT, None)

    def _done(self, answer: bytes | Exception, stages: Stages) -> None:
        if isinstance(answer, Refusal):
            self._refuse(answer)
        elif isinstance(answer, Exception):
            _log.error(
                "a request failed",
                exc_info=answer,
                extra={"fields": {"request_id": self._plain.request_id}},
            )
            scope = {"path": ROUTE}
            self._problem(internal(scope), scope)
        else:
            timing = f"server-timing: {server_timing(stages)}\r\n"
            self._send(f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{timing}", answer)
            self._end(200, None, stages)

    def _refuse(self, refusal: Refusal) -> None:
        self._wait_no_longer()
        scope = {"path": ROUTE}
        self._problem(refused(scope, refusal), scope)

    def _problem(self, answer: Response, scope: dict[str, Any]) -> None:
        total_ms = (time.perf_counter() - self._plain.arrived) * 1000
        phrase = HTTPStatus(answer.status_code).phrase
        lines = [f"HTTP/1.1 {answer.status_code} {phrase}\r\nserver-timing: total;dur={total_ms:.2f}\r\n"]
        lines += [
            f"{name.decode()}: {value.decode()}\r\n"
            for name, value in answer.raw_headers
            if name != b"content-length"
        ]
        self._send("".join(lines), bytes(answer.body))
        self._end(answer.status_code, scope[PROBLEM_CODE])

    def _send(self, head: str, body: bytes) -> None:
        """Send an answer in one piece; its body's length, the request's id and how to go on are added."""
        close = "" if self.keep_alive else "connection: close\r\n"
        rest = f"content-length: {len(body)}\r\nx-request-id: {self._plain.request_id}\r\n{close}"
        self._write((head + rest).encode("latin-1"), body, close=not self.keep_alive)

    def _end(self, status: int, code: str | None, stages: Stages | None = None) -> None:
        self.response_complete = True
        self._express.intake.held_bytes -= self._size
        self._chunks = []
        self._underway = None  # which holds `_done`: let go of, neither is left for the garbage collector
        plain = self._plain
        self._express.report(
            Exchange(
                plain.request_id,
                "POST",
                ROUTE,
                status,
                time.perf_counter() - plain.arrived,
                code,
                stages,
                plain.traceparent,
            )
        )
        self._ended()

    def _wait_no_longer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Nobody:
    """Stands where uvicorn keeps the event of a coroutine that waits for the body: here none does."""

    def set(self) -> None:
        """Wake nobody."""


_NOBODY_WAITS: Final = _Nobody()


def _parameters(query: bytes) -> dict[str, Any] | None:
    if not query:
        return {}
    found: dict[str, Any] = {}
    try:
        text = query.decode("ascii")
        if not text.isprintable() or set("%+#;") & set(text):
            return None
        for pair in text.split("&"):
            name, _, value = pair.partition("=")
            if name in found or name not in _QUERY:
                return None
            found[name] = _QUERY[name].validate_python(value)
    except (UnicodeDecodeError, ValidationError):
        return None
    return found
