"""Statements that attach labels to predictions, by the rules of `service.core.feedback`."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

from sqlalchemy import select

from service.adapters.sql_tables import (
    label_history,
    labels,
    model_versions,
    predictions,
    read_time,
    stored_time,
)
from service.adapters.sqlite_database import insert
from service.core.feedback import CurrentLabel, applied, index_of, is_expired
from service.core.records import Receipt, Rejection

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    from sqlalchemy import Connection

    from service.core.records import FeedbackItem

_IDS_AT_ONCE: Final = 500


class _Found(NamedTuple):
    """A prediction that is there: whose it is, and its stored time."""

    model_version_id: int
    created: int


def learn(
    connection: Connection, items: Sequence[FeedbackItem], received: datetime, keep: timedelta
) -> Receipt:
    """Attach the labels in order; an item sees what those before it did."""
    expired = {item.prediction_id for item in items if is_expired(item.prediction_id, keep, received)}
    ids = list({item.prediction_id.bytes for item in items} - {one.bytes for one in expired})
    found = _found(connection, ids)
    current = _current(connection, ids)
    index_by_label = _index_by_label(connection, {row.model_version_id for row in found.values()})

    counts: Counter[str] = Counter()
    rejected: list[Rejection] = []
    changed: dict[bytes, CurrentLabel] = {}
    history: list[dict[str, object]] = []
    for position, item in enumerate(items):
        key = item.prediction_id.bytes
        index = index_of(item, index_by_label[found[key].model_version_id]) if key in found else None
        if index is None:
            code = _why_not(item.prediction_id, expired, found)
            rejected.append(Rejection(position, item.prediction_id, code))
            continue
        before = current.get(key)
        outcome, current[key] = applied(before, index, item)
        counts[outcome] += 1
        if current[key] != before:
            changed[key] = current[key]
        if outcome != "unchanged":
            history.append(
                {
                    "prediction_id": key,
                    "label": index,
                    "received": stored_time(received),
                    "labelled_at": _stored_or_none(item.labelled_at),
                }
            )
    _write(connection, changed, found, history)
    return Receipt(counts["accepted"], counts["corrected"], counts["unchanged"], tuple(rejected))


def _why_not(prediction_id: UUID, expired: set[UUID], found: Mapping[bytes, object]) -> str:
    if prediction_id in expired:
        return "prediction-expired"
    return "unknown-label" if prediction_id.bytes in found else "prediction-not-found"


def _found(connection: Connection, ids: Sequence[bytes]) -> dict[bytes, _Found]:
    columns = (predictions.c.id, predictions.c.model_version_id, predictions.c.created)
    return {
        row.id: _Found(row.model_version_id, row.created)
        for some in _parts(ids)
        for row in connection.execute(select(*columns).where(predictions.c.id.in_(some)))
    }


def _current(connection: Connection, ids: Sequence[bytes]) -> dict[bytes, CurrentLabel]:
    return {
        row.prediction_id: CurrentLabel(
            row.label,
            row.sampling_probability,
            None if row.labelled_at is None else read_time(row.labelled_at),
        )
        for some in _parts(ids)
        for row in connection.execute(select(labels).where(labels.c.prediction_id.in_(some)))
    }


def _index_by_label(connection: Connection, ids: Iterable[int]) -> dict[int, dict[str, int]]:
    """Return the labels of these model versions, each with its index."""
    statement = select(model_versions.c.id, model_versions.c.labels).where(model_versions.c.id.in_(ids))
    return {
        row.id: {label: index for index, label in enumerate(json.loads(row.labels))}
        for row in connection.execute(statement)
    }


def _write(
    connection: Connection,
    changed: Mapping[bytes, CurrentLabel],
    found: Mapping[bytes, _Found],
    history: Sequence[Mapping[str, object]],
) -> None:
    rows = [
        {
            "prediction_id": key,
            "model_version_id": found[key].model_version_id,
            "predicted_at": found[key].created,
            "label": label.index,
            "sampling_probability": label.sampling_probability,
            "labelled_at": _stored_or_none(label.labelled_at),
        }
        for key, label in changed.items()
    ]
    if rows:
        statement = insert(labels)
        new = {"label": statement.excluded.label, "labelled_at": statement.excluded.labelled_at}
        connection.execute(statement.on_conflict_do_update(index_elements=["prediction_id"], set_=new), rows)
    if history:
        connection.execute(label_history.insert(), history)


def _parts(ids: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """A statement takes a bounded number of values."""
    for start in range(0, len(ids), _IDS_AT_ONCE):
        yield ids[start : start + _IDS_AT_ONCE]


def _stored_or_none(moment: datetime | None) -> int | None:
    return None if moment is None else stored_time(moment)
