"""Keeps the state within its bounds: predictions past their time go, and the oldest where space is short."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from sqlalchemy import delete, exists, select

from service.adapters.sql_tables import label_history, labels, predictions, stored_time

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from sqlalchemy import Connection

    from service.core.ports import Clock

_BATCH: Final = 200  # small: callers wait while it is deleted
_SCAN: Final = 2000


class Database(Protocol):
    """What retention needs to know of the database behind the connection."""

    def used_bytes(self, connection: Connection) -> int:
        """How much the data take."""

    def give_back(self, connection: Connection) -> bool:
        """Return some freed space to the disk; whether there is more."""


class Retention:
    """Deletes a small batch of predictions at each call.

    First those older than `keep`; then, while the data take more than `max_bytes`, unlabelled ones and last
    labelled ones, oldest first. Ids are in order of time (UUIDv7): the oldest are found without a scan.
    """

    def __init__(self, database: Database, keep: timedelta, max_bytes: int, clock: Clock) -> None:
        self._database = database
        self._keep = keep
        self._max_bytes = max_bytes
        self._clock = clock
        self._unlabelled_after = b""  # before it, only labelled ones are left: not to be scanned again

    def __call__(self, connection: Connection) -> bool:
        """Delete one batch and give its space back; whether there is more to do."""
        with connection.begin():
            found = self._delete_expired(connection) or self._delete_surplus(connection)
        return self._database.give_back(connection) or found

    def _delete_expired(self, connection: Connection) -> bool:
        first_kept_ms = stored_time(self._clock() - self._keep) // 1000
        if first_kept_ms <= 0:
            return False
        bound = first_kept_ms.to_bytes(6, "big") + bytes(10)  # the least UUIDv7 of that time
        oldest = select(predictions.c.id).where(predictions.c.id < bound)
        return _delete(connection, connection.scalars(oldest.order_by(predictions.c.id).limit(_BATCH)).all())

    def _delete_surplus(self, connection: Connection) -> bool:
        if self._database.used_bytes(connection) <= self._max_bytes:
            return False
        labelled = exists().where(labels.c.prediction_id == predictions.c.id)
        seen = connection.execute(
            select(predictions.c.id, labelled.label("labelled"))
            .where(predictions.c.id > self._unlabelled_after)
            .order_by(predictions.c.id)
            .limit(_SCAN)
        ).all()
        if not seen:  # nothing but labelled ones
            oldest = select(predictions.c.id).order_by(predictions.c.id).limit(_BATCH)
            return _delete(connection, connection.scalars(oldest).all())
        doomed = [row.id for row in seen if not row.labelled][:_BATCH]
        self._unlabelled_after = doomed[-1] if doomed else seen[-1].id
        _delete(connection, doomed)
        return True


def _delete(connection: Connection, ids: Sequence[bytes]) -> bool:
    """Delete these predictions and all that hangs on them; whether there were any."""
    if ids:
        connection.execute(delete(label_history).where(label_history.c.prediction_id.in_(ids)))
        connection.execute(delete(labels).where(labels.c.prediction_id.in_(ids)))
        connection.execute(delete(predictions).where(predictions.c.id.in_(ids)))
    return bool(ids)
