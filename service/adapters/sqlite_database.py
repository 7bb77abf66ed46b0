"""Everything of the store that only SQLite knows: the lock, the connections, durability, and the file's size.

What uses it (`sql_writer`, `sql_store`, `retention`) speaks SQL that PostgreSQL speaks too, so another
database takes this file's place and nothing else.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import sqlite3
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy
from sqlalchemy import Connection, Engine, event
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DatabaseError, DBAPIError
from sqlalchemy.pool import QueuePool, StaticPool

from service.adapters.migrations import upgrade
from service.core.exceptions import StateLocked, StateUnusable, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["READERS", "SqliteDatabase", "execute", "insert"]

_log = logging.getLogger("tare.store")

READERS: Final = 4
_BUSY_TIMEOUT_S: Final = 5.0
_WAL_KEPT_BYTES: Final = 64 << 20  # what a checkpoint leaves of the log, once a burst had blown it up
_VACUUM_PAGES: Final = 1024
_LOOK_EVERY_S: Final = 0.1
# A plain BEGIN that reads before it writes fails at once where somebody else writes.
_BEGIN: Final = "BEGIN IMMEDIATE"


class SqliteDatabase:
    """The state's file, locked and at the newest version. Usable once built, or it raises StateUnusable.

    `writer` has one connection, for one thread; `reader` has READERS, which cannot write.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "tare.db"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = _locked(folder / "tare.lock")
        except OSError as failure:
            raise StateUnusable(
                f"The state's folder {folder} cannot be used: {failure.strerror}."
            ) from failure
        self.writer = _engine(self.file, StaticPool, _prepare_writer)
        self.reader = _engine(self.file, QueuePool, _prepare_reader, pool_size=READERS, max_overflow=0)
        event.listen(self.writer, "begin", _begin_immediate)
        try:
            with self.writer.begin() as connection:
                upgrade(connection)
        except StateUnusable:
            self.close()
            raise
        except (DatabaseError, sqlite3.Error) as failure:
            self.close()
            reason = getattr(failure, "orig", failure)
            raise StateUnusable(f"The state in {self.file} cannot be opened: {reason}.") from failure
        self._inode = self.file.stat().st_ino
        self._look_again_at = -math.inf
        _log.info("state open", extra={"fields": {"file": str(self.file), "sqlite": sqlite3.sqlite_version}})

    def check(self) -> None:
        """Raise Unavailable if the file is no longer where it was: what goes into it would be lost.

        Looks ten times a second at most: with the file more is lost than what comes in a tenth of one.
        """
        now = time.monotonic()
        if now < self._look_again_at:
            return
        try:
            same = self.file.stat().st_ino == self._inode
        except OSError:
            same = False
        if not same:
            raise Unavailable(
                "store-unavailable", "The state's file was moved or deleted; restart the service."
            )
        self._look_again_at = now + _LOOK_EVERY_S

    def close(self) -> None:
        """Close every connection and release the lock. The writer's last: it is the one that checkpoints."""
        self.reader.dispose()
        self.writer.dispose()
        os.close(self._lock)

    @staticmethod
    @contextmanager
    def transaction(connection: Connection) -> Iterator[None]:
        """Commit what the block does; undo it where it raises. Raises DatabaseError where that fails.

        SQLAlchemy's own transaction and statement cost twice what SQLite takes to keep a prediction, so this
        goes past it, as `execute` does; work that uses SQLAlchemy finds the transaction begun.
        """
        try:
            execute(connection, _BEGIN)
            yield
            execute(connection, "COMMIT")
        finally:
            _raw(connection).rollback()  # nothing once it is committed
            connection.rollback()  # where SQLAlchemy took part, it forgets this transaction

    @staticmethod
    def set_durable(connection: Connection, durable: bool) -> None:
        """Sync every commit from here on, or leave it to the checkpoint. Between transactions only."""
        _raw(connection).execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")

    @staticmethod
    def used_bytes(connection: Connection) -> int:
        """The file's size, less its free pages."""
        raw = _raw(connection)
        pages, free, size = (
            raw.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    @staticmethod
    def give_back(connection: Connection) -> bool:
        """Return some free pages to the disk; whether there are more. Between transactions only."""
        raw = _raw(connection)
        raw.execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})").fetchall()
        return bool(raw.execute("PRAGMA freelist_count").fetchone()[0])


def _locked(path: Path) -> int:
    """Return the descriptor that holds the lock: it is released when the process ends, however it ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as failure:
        holder = os.read(descriptor, 20).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise StateLocked(
            f"The state in {path.parent} is in use by another service (process {holder or 'unknown'}): "
            "stop it, or name another TARE_STATE_DIR."
        ) from failure
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _engine(file: Path, pool: type[Any], prepare: Any, **pool_arguments: Any) -> Engine:
    engine = sqlalchemy.create_engine(
        sqlalchemy.URL.create("sqlite", database=str(file)),
        poolclass=pool,
        connect_args={"check_same_thread": False, "timeout": _BUSY_TIMEOUT_S},
        **pool_arguments,
    )
    event.listen(engine, "connect", prepare)
    return engine


def _prepare_writer(raw: sqlite3.Connection, _record: object) -> None:
    raw.isolation_level = None  # transactions begin where we say (_begin_immediate)
    raw.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before anything is written, or it has no effect
    raw.execute("PRAGMA journal_mode = WAL")
    raw.execute("PRAGMA synchronous = NORMAL")
    raw.execute("PRAGMA foreign_keys = ON")
    raw.execute(f"PRAGMA journal_size_limit = {_WAL_KEPT_BYTES}")


def _prepare_reader(raw: sqlite3.Connection, _record: object) -> None:
    raw.execute("PRAGMA query_only = ON")
    raw.execute("PRAGMA wal_autocheckpoint = 0")  # by the writer alone: older SQLite lose data in a race


def execute(connection: Connection, statement: str, parameters: Sequence[Any] = ()) -> None:
    """Run a statement in SQLite's own words past SQLAlchemy; alone it is a transaction of its own.

    Raises DatabaseError.
    """
    try:
        _raw(connection).execute(statement, parameters)
    except sqlite3.Error as failure:
        raise DBAPIError.instance(
            statement, None, failure, sqlite3.Error, dialect=connection.dialect
        ) from failure


def _begin_immediate(connection: Connection) -> None:
    if not _raw(connection).in_transaction:  # which `transaction` has begun
        connection.exec_driver_sql(_BEGIN)


def _raw(connection: Connection) -> sqlite3.Connection:
    """The driver's own connection: SQLAlchemy would begin a transaction for a PRAGMA."""
    raw: sqlite3.Connection = connection.connection.dbapi_connection  # type: ignore[assignment]
    return raw
