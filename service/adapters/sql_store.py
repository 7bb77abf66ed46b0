"""The service's memory in an SQL database: which thread runs what, and what is synced before it is answered.

Writes go to the one writer thread and return after the commit; reads run on threads and connections of their
own, off the event loop. The statements stand in `sql_predictions`, `sql_priors` and `sql_feedback`.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from sqlalchemy.exc import DatabaseError

from service.adapters import sql_feedback, sql_predictions, sql_priors
from service.adapters.retention import Retention
from service.adapters.sql_tables import probes, stored_time
from service.adapters.sql_writer import Writer
from service.adapters.sqlite_database import READERS, SqliteDatabase, insert
from service.core.exceptions import Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from datetime import datetime
    from pathlib import Path
    from uuid import UUID

    import numpy as np
    from numpy.typing import NDArray
    from sqlalchemy import Connection

    from service.adapters.sql_predictions import PredictionRow
    from service.core.ports import Clock, Recording
    from service.core.records import (
        FeedbackItem,
        LabelledPredictions,
        ModelVersion,
        Prediction,
        PriorVersion,
        Receipt,
        StoredLogits,
        StoredPrediction,
    )

_PROBE_PATIENCE_S: Final = 2.0
_ROW_BYTES: Final = 256  # about, without logits

Result = TypeVar("Result")


def _size_of(n_classes: int) -> int:
    """About the bytes of one prediction that waits to be written."""
    return _ROW_BYTES + 2 * n_classes


@dataclass(frozen=True)
class _Wanted:
    """Predictions that are to be kept in any case."""

    predictions: Sequence[Prediction]
    wanted: bool = True


class SqlStore:
    """The store on SQLite. Usable once built, or it raises StateUnusable; whoever builds it closes it."""

    def __init__(
        self,
        folder: Path,
        *,
        keep_days: float,
        max_bytes: int,
        clock: Clock,
        listen: Callable[[float], None] | None = None,
    ) -> None:
        """`listen` hears the seconds of every commit, on the writer's thread."""
        self._database = SqliteDatabase(folder)
        self._clock = clock
        self._keep = timedelta(days=keep_days)
        with self._database.reader.connect() as connection:
            self._model_ids = sql_predictions.registered(connection)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
        chores = Retention(self._database, self._keep, max_bytes, clock)
        self._writer = Writer(self._database, chores, listen)

    def close(self) -> None:
        """Write what waits, end the threads, close the file and release its lock."""
        self._readers.shutdown()
        self._writer.close()
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def register_model(self, model: ModelVersion, created: datetime) -> None:
        """Keep what replay needs of this model version; where it is there, note that it was loaded again."""

        def register(connection: Connection, _: Sequence[None]) -> list[int]:
            return [sql_predictions.register(connection, model, created)]

        row_id = await self._writer.submit(register, None, durable=True)
        self._model_ids[model.name, model.version] = row_id

    async def model_versions(self, name: str) -> Sequence[ModelVersion]:
        """Return every version of this model ever loaded, the latest loaded last."""
        return await self._read(sql_predictions.versions, name)

    def check_room(self, predictions: int, n_classes: int) -> None:
        """Raise Overloaded where so many more would be more than the store can have waiting."""
        self._writer.check_room(predictions * _size_of(n_classes))

    def keep(self, recordings: Sequence[Recording], then: Callable[[Exception | None], None]) -> None:
        """Keep what is wanted still when it is written; `then` hears of it, on the thread that wrote."""
        made = [(recording, one) for recording in recordings for one in recording.predictions]
        try:
            rows = sql_predictions.rows_of([one for _, one in made], self._model_ids)
        except KeyError as failure:
            then(failure)
            return
        self._writer.post(
            self._record,
            [(recording, row) for (recording, _), row in zip(made, rows, strict=True)],
            lambda _, failure: then(failure),
            durable=False,
            rows=len(rows),
            size_bytes=sum(_size_of(len(one.decision.logits)) for _, one in made),
            here=True,
            one_statement=len(rows) <= sql_predictions.ROWS_AT_ONCE,
        )

    async def record(self, predictions: Sequence[Prediction]) -> None:
        """Keep predictions; they survive a kill of the process from here on. Repeating it is harmless."""
        size = sum(_size_of(len(one.decision.logits)) for one in predictions)
        wanted = _Wanted(predictions)
        rows = [(wanted, row) for row in sql_predictions.rows_of(predictions, self._model_ids)]
        await self._writer.submit(self._record, rows, durable=False, rows=len(rows), size_bytes=size)

    def _record(
        self, connection: Connection, groups: Sequence[Sequence[tuple[Recording, PredictionRow]]]
    ) -> list[None]:
        sql_predictions.add(
            connection, [row for group in groups for recording, row in group if recording.wanted]
        )
        return [None] * len(groups)

    async def prediction(self, prediction_id: UUID) -> StoredPrediction | None:
        """Return the prediction with its labels, or None."""
        return await self._read(sql_predictions.find, prediction_id)

    async def current_priors(self) -> Sequence[PriorVersion]:
        """Return the current version of every name of every label set."""
        return await self._read(sql_priors.current)

    async def prior_version(self, label_set: str, name: str, version: int) -> PriorVersion | None:
        """Return one version of a name that is not deleted, or None."""
        return await self._read(sql_priors.find, label_set, name, version)

    async def prior_versions(self, label_set: str, name: str) -> Sequence[PriorVersion]:
        """Return all versions of a name that is not deleted, newest first; none if there is none."""
        return await self._read(sql_priors.versions, label_set, name)

    async def add_prior(self, prior: PriorVersion, replaces: int | None) -> PriorVersion:
        """Add a version if the current one is `replaces` (None: there is none). Raises Stale otherwise."""

        def add(connection: Connection, _: Sequence[None]) -> list[PriorVersion]:
            return [sql_priors.add(connection, prior, replaces)]

        return await self._writer.submit(add, None, durable=True, size_bytes=prior.probabilities.nbytes)

    async def delete_prior(self, label_set: str, name: str, replaces: int) -> None:
        """Delete a name whose current version is `replaces`. Raises Stale otherwise."""

        def delete(connection: Connection, _: Sequence[None]) -> list[None]:
            sql_priors.delete(connection, label_set, name, replaces, self._clock())
            return [None]

        await self._writer.submit(delete, None, durable=True)

    async def learn(self, items: Sequence[FeedbackItem], received: datetime) -> Receipt:
        """Attach labels in order; the same label again changes nothing."""
        return await self._writer.submit(
            self._learn,
            (items, received),
            durable=True,
            rows=len(items),
            size_bytes=_ROW_BYTES * len(items),
        )

    def _learn(
        self, connection: Connection, requests: Sequence[tuple[Sequence[FeedbackItem], datetime]]
    ) -> list[Receipt]:
        return [sql_feedback.learn(connection, items, received, self._keep) for items, received in requests]

    async def labelled(
        self, model: ModelVersion, since: datetime | None, until: datetime | None, *, with_logits: bool
    ) -> AsyncIterator[LabelledPredictions]:
        """Yield the labelled predictions of a window in blocks, oldest first."""
        block = sql_predictions.labelled_block
        rows, place = await self._read(block, model, since, until, after=None, with_logits=with_logits)
        yield rows
        while place is not None:
            rows, place = await self._read(block, model, since, until, after=place, with_logits=with_logits)
            yield rows

    async def recorded_logits(
        self, model: ModelVersion, since: datetime | None, until: datetime | None
    ) -> AsyncIterator[StoredLogits]:
        """Yield the logits of every prediction of a window in blocks, oldest first."""
        rows, place = await self._read(sql_predictions.logits_block, model, since, until, after=None)
        yield rows
        while place is not None:
            rows, place = await self._read(sql_predictions.logits_block, model, since, until, after=place)
            yield rows

    async def traffic(
        self, model: ModelVersion, since: datetime | None, until: datetime | None
    ) -> NDArray[np.int64]:
        """Count the decisions of a window, labelled or not, for each class, (L,)."""
        return await self._read(sql_predictions.traffic, model, since, until)

    async def check_writable(self) -> None:
        """Write and commit one row, however long the queue. Raises Unavailable with the reason."""

        def write(connection: Connection, _: Sequence[None]) -> list[None]:
            written = stored_time(self._clock())
            statement = insert(probes).values(id=1, written=written)
            update = statement.on_conflict_do_update(index_elements=["id"], set_={"written": written})
            connection.execute(update)
            return [None]

        try:
            async with asyncio.timeout(_PROBE_PATIENCE_S):
                await self._writer.submit(write, None, durable=False, always=True)
        except TimeoutError:
            raise Unavailable(
                "store-unavailable", f"The store did not write within {_PROBE_PATIENCE_S:g} s."
            ) from None

    async def _read(self, query: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Run a query on a reading thread. Raises Unavailable where the database cannot be read."""

        def run() -> Result:
            with self._database.reader.connect() as connection:
                return query(connection, *arguments, **options)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, run)
        except DatabaseError as failure:
            raise Unavailable("store-unavailable", f"The state cannot be read: {failure.orig}.") from failure
