"""Statements about models and their predictions: records in, records out, on a connection that is given."""

from __future__ import annotations

import json
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from sqlalchemy import ColumnElement, Select, bindparam, func, select, true, tuple_

from service.adapters.sql_tables import (
    label_history,
    labels,
    model_versions,
    predictions,
    read_counts,
    read_floats,
    read_logits,
    read_ranks,
    read_time,
    stored_counts,
    stored_floats,
    stored_logits,
    stored_ranks,
    stored_time,
)
from service.adapters.sqlite_database import execute, insert
from service.core.records import (
    Decision,
    Group,
    LabelledPredictions,
    ModelVersion,
    Prediction,
    StoredLabel,
    StoredPrediction,
    WeightNormalisation,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from numpy.typing import NDArray
    from sqlalchemy import Connection, Dialect, Row

    from service.core.records import StoredLogits

_BLOCK_ROWS: Final = 8192
_BLOCK_BYTES: Final = 8 << 20
ROWS_AT_ONCE: Final = 16  # up to so many are kept by one statement

PredictionRow = tuple[Any, ...]  # the columns of `predictions`, in their order
Place = tuple[int, bytes]  # where a block ended: time and id of its last prediction


def register(connection: Connection, model: ModelVersion, loaded: datetime) -> int:
    """Keep a model version, or note that it was loaded again; return its row's id."""
    statement = insert(model_versions).values(
        name=model.name,
        version=model.version,
        labels=json.dumps(model.labels, ensure_ascii=False),
        class_counts=stored_counts(model.class_counts),
        source_prior=stored_floats(model.source_prior),
        logit_offset=stored_floats(model.logit_offset),
        temperature=model.temperature,
        tau=model.tau,
        groups=json.dumps([[group.name, group.indices] for group in model.groups], ensure_ascii=False),
        weight_normalisation=_stored_normalisation(model.weight_normalisation),
        created=stored_time(loaded),
        loaded=stored_time(loaded),
    )
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["name", "version"], set_={"loaded": statement.excluded.loaded}
        )
    )
    return connection.execute(_row_id(model.name, model.version)).scalar_one()


def registered(connection: Connection) -> dict[tuple[str, str], int]:
    """Return the row's id of every model version, by name and version."""
    rows = connection.execute(select(model_versions.c.name, model_versions.c.version, model_versions.c.id))
    return {(row.name, row.version): row.id for row in rows}


def versions(connection: Connection, name: str) -> list[ModelVersion]:
    """Return every version of a model, the latest loaded last."""
    order = (model_versions.c.loaded, model_versions.c.id)
    rows = connection.execute(select(model_versions).where(model_versions.c.name == name).order_by(*order))
    return [
        ModelVersion(
            name=row.name,
            version=row.version,
            labels=tuple(json.loads(row.labels)),
            class_counts=read_counts(row.class_counts),
            source_prior=read_floats(row.source_prior),
            logit_offset=read_floats(row.logit_offset),
            temperature=row.temperature,
            tau=row.tau,
            groups=tuple(Group(group, tuple(indices)) for group, indices in json.loads(row.groups)),
            weight_normalisation=_read_normalisation(row.weight_normalisation),
        )
        for row in rows
    ]


def rows_of(made: Sequence[Prediction], model_ids: Mapping[tuple[str, str], int]) -> list[PredictionRow]:
    """Return predictions as `add` takes them. Raises KeyError for a model version that is not registered."""
    logits = stored_logits([one.decision.logits for one in made])
    return [
        (
            _key(one),
            stored_time(one.created),
            model_ids[one.model_name, one.model_version],
            one.method,
            one.tau,
            one.temperature,
            one.prior_name,
            one.prior_version,
            one.decision.top[0].index,
            stored_ranks(one.decision.top),
            stored_ranks((one.decision.unadjusted,)),
            stored,
        )
        for one, stored in zip(made, logits, strict=True)
    ]


def add(connection: Connection, rows: Sequence[PredictionRow]) -> None:
    """Keep predictions; one that is there already stays as it is.

    Up to ROWS_AT_ONCE it is one statement; more need a transaction round them.
    """
    for start in range(0, len(rows), ROWS_AT_ONCE):
        block = rows[start : start + ROWS_AT_ONCE]
        # Many rows in one statement, since after each the thread has to wait for the interpreter again.
        statement = _compiled_add(connection.dialect, len(block))
        execute(connection, statement, tuple(chain.from_iterable(block)))


@cache
def _compiled_add(dialect: Dialect, n_rows: int) -> str:
    """Return the statement that adds so many rows of `predictions`, for values in its columns' order."""
    names = [column.name for column in predictions.columns]
    values: list[dict[str, Any]] = [
        {name: bindparam(f"{name}_{row}") for name in names} for row in range(n_rows)
    ]
    statement = insert(predictions).values(values).on_conflict_do_nothing(index_elements=["id"])
    return str(statement.compile(dialect=dialect))


def find(connection: Connection, prediction_id: UUID) -> StoredPrediction | None:
    """Return a prediction with its labels, or None."""
    rows = connection.execute(
        select(
            predictions,
            model_versions.c.name,
            model_versions.c.version,
            func.length(model_versions.c.class_counts).label("counts_bytes"),
            label_history.c.label,
            label_history.c.received,
            label_history.c.labelled_at,
        )
        .join(model_versions, model_versions.c.id == predictions.c.model_version_id)
        .outerjoin(label_history, label_history.c.prediction_id == predictions.c.id)
        .where(predictions.c.id == prediction_id.bytes)
        .order_by(label_history.c.id)
    ).all()
    if not rows:
        return None
    first = rows[0]
    (unadjusted,) = read_ranks(first.unadjusted)
    logits = read_logits([first.logits], first.counts_bytes // 8)[0]
    return StoredPrediction(
        prediction=Prediction(
            id=prediction_id,
            created=read_time(first.created),
            model_name=first.name,
            model_version=first.version,
            method=first.method,
            tau=first.tau,
            temperature=first.temperature,
            prior_name=first.prior_name,
            prior_version=first.prior_version,
            decision=Decision(read_ranks(first.top), unadjusted, logits.astype(np.float32)),
        ),
        labels=tuple(
            StoredLabel(row.label, read_time(row.received), _time_or_none(row.labelled_at))
            for row in rows
            if row.label is not None
        ),
    )


def traffic(
    connection: Connection, model: ModelVersion, since: datetime | None, until: datetime | None
) -> NDArray[np.int64]:
    """Count how often each class was decided in a window, (L,)."""
    statement = (
        select(predictions.c.decided, func.count())
        .where(*_window(predictions.c.model_version_id, predictions.c.created, model, since, until))
        .group_by(predictions.c.decided)
    )
    decided = np.zeros(len(model.labels), dtype=np.int64)
    for index, count in connection.execute(statement):
        decided[index] = count
    return decided


def labelled_block(
    connection: Connection,
    model: ModelVersion,
    since: datetime | None,
    until: datetime | None,
    *,
    after: Place | None,
    with_logits: bool,
) -> tuple[LabelledPredictions, Place | None]:
    """Return the labelled predictions of a window from `after` on, and where to go on (None: nowhere)."""
    columns = [labels.c.predicted_at, labels.c.prediction_id, labels.c.label, labels.c.sampling_probability]
    columns += [predictions.c.decided] + ([predictions.c.logits] if with_logits else [])
    place = (labels.c.predicted_at, labels.c.prediction_id)
    statement = (
        select(*columns)
        .join(predictions, predictions.c.id == labels.c.prediction_id)
        .where(*_window(labels.c.model_version_id, labels.c.predicted_at, model, since, until))
    )
    rows, end = _block(connection, statement, place, after, len(model.labels) if with_logits else 0)
    probabilities = [row.sampling_probability for row in rows]
    return LabelledPredictions(
        decided=np.array([row.decided for row in rows], dtype=np.int64),
        labels=np.array([row.label for row in rows], dtype=np.int64),
        sampling_probability=np.array([1.0 if one is None else one for one in probabilities]),
        logits=read_logits((row.logits for row in rows), len(model.labels)) if with_logits else None,
    ), end


def logits_block(
    connection: Connection,
    model: ModelVersion,
    since: datetime | None,
    until: datetime | None,
    *,
    after: Place | None,
) -> tuple[StoredLogits, Place | None]:
    """Return the logits of a window's predictions from `after` on, and where to go on (None: nowhere)."""
    place = (predictions.c.created, predictions.c.id)
    statement = select(*place, predictions.c.logits).where(
        *_window(predictions.c.model_version_id, predictions.c.created, model, since, until)
    )
    rows, end = _block(connection, statement, place, after, len(model.labels))
    return read_logits((row.logits for row in rows), len(model.labels)), end


def _block(
    connection: Connection,
    statement: Select[Any],
    place: tuple[ColumnElement[int], ColumnElement[bytes]],
    after: Place | None,
    n_logits: int,
) -> tuple[Sequence[Row[Any]], Place | None]:
    """Run one block of a statement whose rows begin with their place, in the order of place."""
    limit = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // (2 * n_logits))) if n_logits else _BLOCK_ROWS
    beyond = true() if after is None else tuple_(*place) > tuple_(*after)
    rows = connection.execute(statement.where(beyond).order_by(*place).limit(limit)).all()
    return rows, (rows[-1][0], rows[-1][1]) if len(rows) == limit else None


def _window(
    model_version_id: ColumnElement[int],
    created: ColumnElement[int],
    model: ModelVersion,
    since: datetime | None,
    until: datetime | None,
) -> list[ColumnElement[bool]]:
    """Half-open: since <= created < until, of one model version."""
    conditions = [model_version_id == _row_id(model.name, model.version).scalar_subquery()]
    if since is not None:
        conditions.append(created >= stored_time(since))
    if until is not None:
        conditions.append(created < stored_time(until))
    return conditions


def _stored_normalisation(normalised: WeightNormalisation | None) -> str | None:
    if normalised is None:
        return None
    return json.dumps(
        {
            "norms": normalised.norms.tolist(),
            "biases": normalised.biases.tolist(),
            "bias": normalised.bias,
            "tau": normalised.tau,
        }
    )


def _read_normalisation(stored: str | None) -> WeightNormalisation | None:
    if stored is None:
        return None
    said = json.loads(stored)
    return WeightNormalisation(np.array(said["norms"]), np.array(said["biases"]), said["bias"], said["tau"])


def _key(made: Prediction) -> bytes:
    if made.id is None:
        raise ValueError("A prediction without an id was not meant to be kept.")
    return made.id.bytes


def _row_id(name: str, version: str) -> Select[int]:
    return select(model_versions.c.id).where(
        model_versions.c.name == name, model_versions.c.version == version
    )


def _time_or_none(stored: int | None) -> datetime | None:
    return None if stored is None else read_time(stored)
