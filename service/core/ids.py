"""Prediction ids that hold their own time: UUID version 7 (RFC 9562, 5.7), which Python 3.11 lacks."""

from __future__ import annotations

import secrets
import threading
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
_RANDOM_BITS: Final = 74  # rand_a and rand_b together
_VERSION: Final = 7
_VARIANT: Final = 0b10
_POOL_BYTES: Final = 1024


class IdMaker:
    """Makes ids that rise within a millisecond, so that a request's predictions sort in its order.

    The random bits serve as the counter (RFC 9562, section 6.2, method 2): the next id of a millisecond adds
    a random step. A clock set back gives ids of the time it then says: an id never holds a wrong time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last_ms = -1
        self._random = 0
        self._pool = b""

    def __call__(self, moment: datetime) -> UUID:
        """Return a new id that holds `moment`, which is aware, cut to the millisecond."""
        ms = (moment - _EPOCH) // _MILLISECOND
        with self._lock:
            if ms == self._last_ms:
                self._random += 1 + self._bits(32)
            else:  # half of the range is left free, so that adding never runs out of it
                self._random = self._bits(_RANDOM_BITS - 1)
                self._last_ms = ms
            high, low = self._random >> 62, self._random & ((1 << 62) - 1)
        return UUID(int=ms << 80 | _VERSION << 76 | high << 64 | _VARIANT << 62 | low)

    def _bits(self, n: int) -> int:
        """Return n random bits, out of a pool.

        Each call of the system lets another thread have the interpreter, and a thread that makes an id has
        better things to do than to wait for it again.
        """
        size = -(-n // 8)
        if len(self._pool) < size:
            self._pool = secrets.token_bytes(_POOL_BYTES)
        taken, self._pool = self._pool[:size], self._pool[size:]
        return int.from_bytes(taken) >> (8 * size - n)


def time_of(prediction_id: UUID) -> datetime | None:
    """Return the time an id holds, in UTC, to the millisecond; None for an id of another version."""
    if prediction_id.version != _VERSION:
        return None
    try:
        return _EPOCH + (prediction_id.int >> 80) * _MILLISECOND
    except OverflowError:  # 48 bits of milliseconds reach the year 10889, a datetime 9999
        return None
