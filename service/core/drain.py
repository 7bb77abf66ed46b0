"""Says how long what waits will take, from how fast it has lately been leaving: the source of Retry-After."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

LONGEST_RETRY_S: Final = 60
_MARKS: Final = 64  # so many departures are remembered
_SETTLED_S: Final = 0.25  # before that a queue that has just filled says nothing of its own


class Drain:
    """Measures the rate at which a queue empties while something waits in it. Not safe for threads.

    Time in which nothing waited does not count; time in which something waited and nothing left does, so
    that a queue behind something stuck promises nothing soon.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, float]] = deque()
        self._amount = 0.0
        self._since = clock()
        self._last_rate = 0.0  # of the last time that something waited

    def begins(self) -> None:
        """Something waits from here on, and nothing did."""
        now = self._clock()
        if self._amount and now - self._since >= _SETTLED_S:
            self._last_rate = self._amount / (self._marks[-1][0] - self._since or 1e-3)
        self._marks.clear()
        self._amount = 0.0
        self._since = now

    def left(self, amount: float) -> None:
        """So much has just left."""
        self._marks.append((self._clock(), amount))
        self._amount += amount
        if len(self._marks) > _MARKS:
            self._since, gone = self._marks.popleft()
            self._amount -= gone

    def retry_after_s(self, waiting: float) -> int:
        """Return the whole seconds in which so much has left, at the rate measured, from 1 to a minute."""
        span = self._clock() - self._since
        rate = self._amount / span if span > 0 else 0.0
        if span < _SETTLED_S:
            rate = self._last_rate or rate
        if rate <= 0:  # nothing has left yet: as long again as it has taken so far
            return _whole(span)
        return _whole(waiting / rate)


def _whole(seconds: float) -> int:
    return min(LONGEST_RETRY_S, max(1, math.ceil(seconds)))
