"""A line in the log for every request, at a fraction of the logging library's price: written in bursts."""

from __future__ import annotations

import threading
import time
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Protocol, Self

import orjson

if TYPE_CHECKING:
    from typing import TextIO

    from service.core.records import Stages

EVERY_S: Final = 0.2
_MOST_LINES: Final = 50_000
PROBES: Final = frozenset({"/healthz", "/readyz", "/metrics"})


class Answered(Protocol):
    """A request and what became of it.

    `code` is its problem's, None for a success; `stages` are there where it was decided; `traceparent` is the
    client's own, as it came.
    """

    # The names say it (D102): a docstring each would repeat them.
    @property
    def request_id(self) -> str: ...  # noqa: D102
    @property
    def method(self) -> str: ...  # noqa: D102
    @property
    def route(self) -> str: ...  # noqa: D102
    @property
    def status(self) -> int: ...  # noqa: D102
    @property
    def seconds(self) -> float: ...  # noqa: D102
    @property
    def code(self) -> str | None: ...  # noqa: D102
    @property
    def stages(self) -> Stages | None: ...  # noqa: D102
    @property
    def traceparent(self) -> str | None: ...  # noqa: D102


class RequestLog:
    """Gathers lines and writes them from a thread of its own, so that a slow reader of the log delays nobody.

    A kill takes the lines of the last moment along; a reader too slow for all of them, or a full disk, costs
    lines, which are counted, and no memory. Probes and scrapes have no line.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._answered: deque[tuple[float, Answered]] = deque()
        self._lost = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="request-log", daemon=True)
        self._thread.start()

    def add(self, exchange: Answered) -> None:
        """Have a line written soon. From one thread alone."""
        if exchange.route in PROBES:
            return
        if len(self._answered) < _MOST_LINES:
            self._answered.append((time.time(), exchange))
        else:
            self._lost += 1

    def close(self) -> None:
        """Write what there is, and end the thread."""
        self._closing.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while not self._closing.wait(EVERY_S):
            self._write()
        self._write()

    def _write(self) -> None:
        if not self._answered:
            return
        lines = [_line(*self._answered.popleft()) for _ in range(len(self._answered))]
        count = len(lines)
        lost, self._lost = self._lost, 0
        if lost:
            lines.append(_lost_line(lost))
        try:
            self._stream.write(b"".join(lines).decode())
            self._stream.flush()
        except OSError:  # a full disk most likely: there is no log to say so until it has room again
            self._lost += lost + count


def _line(when: float, exchange: Answered) -> bytes:
    line = {
        "time": datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds"),
        "level": "info",
        "logger": "tare.requests",
        "message": "answered",
        "request_id": exchange.request_id,
        "method": exchange.method,
        "route": exchange.route,
        "status": exchange.status,
        "ms": round(exchange.seconds * 1000, 2),
    }
    if exchange.code is not None:
        line["code"] = exchange.code
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _lost_line(lost: int) -> bytes:
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "level": "warning",
        "logger": "tare.requests",
        "message": "lines lost: the log could not be written, or not fast enough",
        "lines": lost,
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
