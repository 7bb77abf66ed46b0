"""One writes at a time: what many callers ask for becomes one commit.

A sync to disk costs the same for one row as for hundreds, so the writer's thread takes whatever waits (up to
GROUP_ROWS), commits it as one transaction and then answers every caller. A caller is answered after the
commit and never before; one whose work fails does not take its neighbours along. A thread that may wait, and
finds that nobody writes, takes the turn itself, and what others like it have brought meanwhile along: waking
a thread costs more than a commit.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from sqlalchemy.exc import DatabaseError, DataError, IntegrityError, NotSupportedError, ProgrammingError

from service.core.drain import Drain
from service.core.exceptions import Overloaded, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection, Engine

_log = logging.getLogger("tare.store")

GROUP_ROWS: Final = 256
BACKLOG_BYTES: Final = 32 << 20
CHORES_EVERY_S: Final = 10.0

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class Database(Protocol):
    """What the writer needs to know of the database behind the connection."""

    def check(self) -> None:
        """Raise Unavailable if what is committed would be lost."""

    @property
    def writer(self) -> Engine:
        """Where its one connection comes from."""

    def transaction(self, connection: Connection) -> AbstractContextManager[None]:
        """Commit what the block does; undo it where it raises. Raises DatabaseError where that fails."""

    def set_durable(self, connection: Connection, durable: bool) -> None:
        """Sync every commit from here on, or not."""


@dataclass(eq=False)
class _Job:
    work: Callable[[Connection, Sequence[Any]], Sequence[Any]]
    argument: Any
    durable: bool
    rows: int
    size_bytes: int
    then: Callable[[Any, Exception | None], None]
    wanted: Callable[[], bool]
    here: bool
    one_statement: bool


_Settled = tuple[_Job, Any, Exception | None]


class Writer:
    """Runs work on the database's one writing connection, in order of arrival.

    `chores` is called between commits, now and then and until it returns False: whether there is more to do.
    """

    def __init__(
        self,
        database: Database,
        chores: Callable[[Connection], bool],
        listen: Callable[[float], None] | None = None,
    ) -> None:
        """`listen` hears the seconds of every commit, on the thread that made it."""
        self._database = database
        self._chores = chores
        self._listen = listen
        self._jobs: deque[_Job] = deque()
        self._backlog_bytes = 0
        self._drain = Drain()
        self._closing = False
        self._durable: bool | None = None
        self._changed = threading.Condition()
        self._turn = threading.Lock()  # whoever has it has the connection
        self._connection = database.writer.connect()
        self._thread = threading.Thread(target=self._serve, name="store-writer", daemon=True)
        self._thread.start()

    async def submit(
        self,
        work: Callable[[Connection, Sequence[Argument]], Sequence[Result]],
        argument: Argument,
        *,
        durable: bool,
        rows: int = 1,
        size_bytes: int = 0,
        always: bool = False,
    ) -> Result:
        """Run `work` with this argument and return its result, after the commit.

        `work` gets the arguments of neighbours with the same work and returns a result for each; it may be
        run again, so it must change nothing but the database. `durable`: synced to disk. `always`: taken
        even where the backlog is full. Raises Overloaded, Unavailable, or what `work` raises.
        """
        if not always:
            self.check_room(size_bytes)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def then(result: Result, failure: Exception | None) -> None:
            try:
                loop.call_soon_threadsafe(_settle, future, result, failure)
            except RuntimeError:  # that loop has ended, and its callers with it
                _log.debug("an answer came after its event loop had closed")

        self.post(
            work,
            argument,
            then,
            durable=durable,
            rows=rows,
            size_bytes=size_bytes,
            wanted=lambda: not future.cancelled(),
        )
        return await future

    def check_room(self, size_bytes: int) -> None:
        """Raise Overloaded where so many bytes more are more than may wait; an empty backlog takes any."""
        if self._backlog_bytes + size_bytes <= BACKLOG_BYTES or not self._jobs:  # a look needs no lock
            return
        with self._changed:
            seconds = self._drain.retry_after_s(self._backlog_bytes)
        raise Overloaded(
            "store-behind",
            "The store has more to write than it can keep in memory; try again.",
            retry_after_s=seconds,
        )

    def post(
        self,
        work: Callable[[Connection, Sequence[Argument]], Sequence[Result]],
        argument: Argument,
        then: Callable[[Result, Exception | None], None],
        *,
        durable: bool,
        rows: int = 1,
        size_bytes: int = 0,
        wanted: Callable[[], bool] = lambda: True,
        here: bool = False,
        one_statement: bool = False,
    ) -> None:
        """Run `work` as `submit` does, from any thread and whatever the backlog.

        Where `here` is set and nobody writes or waits to, this thread writes itself; one that must not wait
        for a disk does not set it. Work that is `one_statement` needs no transaction round it.

        `then` hears of its result or its failure, on the thread that wrote, and must not raise. A job that is
        not wanted when its turn comes is left out, and `then` does not hear of it.
        """
        job = _Job(work, argument, durable, rows, size_bytes, then, wanted, here, one_statement)
        with self._changed:
            closing = self._closing
            at_once = here and not closing and not self._jobs and self._turn.acquire(blocking=False)
            if not closing and not at_once:
                if not self._jobs:
                    self._drain.begins()
                self._jobs.append(job)
                self._backlog_bytes += size_bytes
                if not here:  # else whoever has the turn takes it along, or wakes the writer's thread
                    self._changed.notify()
        if closing:
            _answer(
                [(job, None, Unavailable("store-unavailable", "The service is stopping; ask another one."))]
            )
        if at_once:
            self._write_here(job)

    def _write_here(self, job: _Job) -> None:
        """Write this, and once what others have brought for such a thread; this one has the turn."""
        try:
            _answer(self._committed([job]))
            with self._changed:
                others = self._group(here=True)
            if others:
                _answer(self._committed(others))
        finally:
            with self._changed:
                self._turn.release()
                if self._jobs:
                    self._changed.notify()

    def close(self) -> None:
        """Write what waits, then end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        with self._turn:  # somebody else may be writing still
            self._connection.close()

    def _serve(self) -> None:
        chores_at = time.monotonic()
        while True:
            jobs = self._next_group(chores_at)
            if jobs:
                with self._turn:
                    settled = self._committed(jobs)
                _answer(settled)
            elif self._closing:
                return
            if time.monotonic() >= chores_at and not self._closing:
                with self._turn:
                    more = self._do_chores(self._connection)
                chores_at = time.monotonic() + (0.0 if more else CHORES_EVERY_S)

    def _next_group(self, until: float) -> list[_Job]:
        """Wait for work, at most until `until`; return up to GROUP_ROWS rows of it, one job at least."""
        with self._changed:
            while not self._jobs and not self._closing:
                left = until - time.monotonic()
                if left <= 0:
                    return []
                self._changed.wait(left)
            return self._group()

    def _group(self, *, here: bool = False) -> list[_Job]:
        """Take up to GROUP_ROWS rows of jobs, one at least; `here`: only such as were. Under the lock."""
        group: list[_Job] = []
        rows = 0
        while self._jobs and (not group or rows + self._jobs[0].rows <= GROUP_ROWS):
            if here and not self._jobs[0].here:
                break
            job = self._jobs.popleft()
            self._backlog_bytes -= job.size_bytes
            self._drain.left(job.size_bytes)
            if not job.wanted():
                continue
            group.append(job)
            rows += job.rows
        return group

    def _committed(self, jobs: Sequence[_Job]) -> list[_Settled]:
        """Run the jobs in one transaction; where one fails for reasons of its own, each in its own.

        Whoever calls it has the turn.
        """
        started = time.perf_counter()
        settled = self._run(self._connection, jobs)
        if self._listen is not None:
            self._listen(time.perf_counter() - started)
        return settled

    def _run(self, connection: Connection, jobs: Sequence[_Job]) -> list[_Settled]:
        try:
            self._database.check()
        except Unavailable as taken_away:
            return [(job, None, taken_away) for job in jobs]
        try:
            results: list[Any] = []
            self._make_durable(connection, any(job.durable for job in jobs))
            alone = len(jobs) == 1 and jobs[0].one_statement
            with nullcontext() if alone else self._database.transaction(connection):
                for work, same in groupby(jobs, key=attrgetter("work")):
                    results += work(connection, [job.argument for job in same])
            return [(job, result, None) for job, result in zip(jobs, results, strict=True)]
        except Exception as failure:  # noqa: BLE001 - it belongs to a caller, and must not end the thread
            if _is_the_disk(failure):
                reason = getattr(failure, "orig", failure)
                _log.error("the state cannot be written: %s", reason)
                refusal = Unavailable("store-unavailable", f"The state cannot be written: {reason}.")
                return [(job, None, refusal) for job in jobs]
            if len(jobs) == 1:
                return [(jobs[0], None, failure)]
        return [settled for job in jobs for settled in self._run(connection, [job])]

    def _make_durable(self, connection: Connection, durable: bool) -> None:
        if durable != self._durable:
            self._database.set_durable(connection, durable)
            self._durable = durable

    def _do_chores(self, connection: Connection) -> bool:
        try:
            return self._chores(connection)
        except Exception as failure:  # noqa: BLE001 - callers wait for this thread, whatever becomes of these
            connection.rollback()
            expected = _is_the_disk(failure)
            reason = getattr(failure, "orig", failure)
            _log.error(
                "the store's chores failed and will be tried again: %s",
                reason,
                exc_info=None if expected else failure,
            )
            return False


def _is_the_disk(failure: Exception) -> bool:
    """Whether the database cannot do it now, and not the work itself is at fault."""
    ours = IntegrityError | ProgrammingError | DataError | NotSupportedError
    return isinstance(failure, DatabaseError) and not isinstance(failure, ours)


def _answer(settled: Iterable[_Settled]) -> None:
    for job, result, failure in settled:
        job.then(result, failure)


def _settle(future: asyncio.Future[Result], result: Result, failure: Exception | None) -> None:
    if future.done():  # cancelled while it was being written
        return
    if failure is not None:
        future.set_exception(failure)
    else:
        future.set_result(result)
