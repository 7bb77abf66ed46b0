"""A store in a folder of the test, and the file behind it looked at past the store."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from service.adapters.sql_store import SqlStore
from service.core.ports import Clock
from tests.recorded import TurnedClock


def opened(folder: Path, clock: Clock | None = None, **bounds: float) -> SqlStore:
    return SqlStore(folder, **{"keep_days": 90, "max_bytes": 1 << 34, **bounds}, clock=clock or TurnedClock())


def plain(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(folder / "tare.db", isolation_level=None)


def pragma(folder: Path, name: str) -> object:
    connection = plain(folder)
    try:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]
    finally:
        connection.close()


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come to that in 30 s"
        time.sleep(0.02)
