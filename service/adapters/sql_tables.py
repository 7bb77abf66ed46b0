"""The store's tables, and how arrays lie in their columns: the one place that knows the stored bytes."""

from __future__ import annotations

import math
import struct
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Final

import numpy as np
from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

from service.core.records import Ranked

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from service.core.records import StoredLogits

metadata = MetaData()

# Times are microseconds since 1970 in UTC: exact, ordered, and the same in every database.

model_versions = Table(
    "model_versions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("labels", Text, nullable=False),  # JSON, by index
    Column("class_counts", LargeBinary, nullable=False),  # int64
    Column("source_prior", LargeBinary, nullable=False),  # float64
    Column("logit_offset", LargeBinary, nullable=False),  # float64
    Column("temperature", Float, nullable=False),
    Column("tau", Float),
    Column("groups", Text, nullable=False),  # JSON: [[name, [index, ...]], ...]
    Column("weight_normalisation", Text),  # JSON: an object, where the bundle has it
    Column("created", BigInteger, nullable=False),
    Column("loaded", BigInteger, nullable=False),  # last time
    UniqueConstraint("name", "version", name="uq_model_versions_name_version"),
)

priors = Table(
    "priors",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("label_set", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("probabilities", LargeBinary, nullable=False),  # float64, by index
    Column("created", BigInteger, nullable=False),
    Column("note", Text),
    Column("author", Text),
    # A deleted version stays: its number is never given again, and predictions still name it.
    Column("deleted", BigInteger),
    UniqueConstraint("label_set", "name", "version", name="uq_priors_label_set_name_version"),
)

predictions = Table(
    "predictions",
    metadata,
    Column("id", LargeBinary(16), primary_key=True),  # a UUIDv7: in order of time
    Column("created", BigInteger, nullable=False),
    Column("model_version_id", Integer, ForeignKey("model_versions.id"), nullable=False),
    Column("method", Text, nullable=False),
    Column("tau", Float, nullable=False),
    Column("temperature", Float, nullable=False),
    Column("prior_name", Text),
    Column("prior_version", Integer),
    Column("decided", Integer, nullable=False),  # top's first index
    Column("top", LargeBinary, nullable=False),  # stored_ranks, as served
    Column("unadjusted", LargeBinary, nullable=False),  # stored_ranks of one
    Column("logits", LargeBinary, nullable=False),  # stored_logits
    # Windows of one model version, and the counts of what was decided in them, from the index alone.
    Index("ix_predictions_window", "model_version_id", "created", "id", "decided"),
)

labels = Table(
    "labels",
    metadata,
    Column("prediction_id", LargeBinary(16), ForeignKey("predictions.id"), primary_key=True),
    Column("model_version_id", Integer, ForeignKey("model_versions.id"), nullable=False),
    Column("predicted_at", BigInteger, nullable=False),  # predictions.created, for windows
    Column("label", Integer, nullable=False),  # by index
    Column("sampling_probability", Float),  # of the first label
    Column("labelled_at", BigInteger),
    Index("ix_labels_window", "model_version_id", "predicted_at", "prediction_id"),
)

label_history = Table(
    "label_history",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("prediction_id", LargeBinary(16), ForeignKey("predictions.id"), nullable=False),
    Column("label", Integer, nullable=False),
    Column("received", BigInteger, nullable=False),
    Column("labelled_at", BigInteger),
    Index("ix_label_history_prediction", "prediction_id"),
)

probes = Table(
    "probes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("written", BigInteger, nullable=False),
)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_RANK: Final = "idd"
_FLOAT16_MAX: Final = 65504.0


def stored_time(moment: datetime) -> int:
    """Return microseconds since 1970."""
    return (moment - _EPOCH) // _MICROSECOND


def read_time(stored: int) -> datetime:
    """Return the time that `stored_time` stored, in UTC."""
    return _EPOCH + stored * _MICROSECOND


def stored_floats(values: NDArray[np.float64]) -> bytes:
    """Return float64 little-endian, whatever the machine."""
    return values.astype("<f8").tobytes()


def read_floats(stored: bytes) -> NDArray[np.float64]:
    """Return the (L,) array that `stored_floats` stored, read-only."""
    return np.frombuffer(stored, dtype="<f8")


def stored_counts(values: NDArray[np.int64]) -> bytes:
    """Return int64 little-endian."""
    return values.astype("<i8").tobytes()


def read_counts(stored: bytes) -> NDArray[np.int64]:
    """Return the (L,) array that `stored_counts` stored, read-only."""
    return np.frombuffer(stored, dtype="<i8")


def stored_logits(rows: Sequence[NDArray[np.float32]]) -> list[bytes]:
    """Return each (L,) as float16, or whole as float32 where that has no place for one of them.

    Rows of the same length are turned in one go.
    """
    if not rows:
        return []
    if len({len(row) for row in rows}) > 1:
        return [stored for row in rows for stored in stored_logits([row])]
    values = np.stack(rows)
    held = (np.abs(values).max(axis=1) <= _FLOAT16_MAX).tolist()
    with np.errstate(over="ignore"):  # in rows that are stored whole
        halves = values.astype("<f2")
    return [
        (half if fits else row.astype("<f4")).tobytes()
        for half, row, fits in zip(halves, values, held, strict=True)
    ]


def read_logits(stored: Iterable[bytes], n_classes: int) -> StoredLogits:
    """Return the rows that `stored_logits` stored, (n, L): float16 unless one of them is float32.

    Rows of version 0001 beyond float16's range come back lowered by their largest, as they were stored.
    """
    rows = list(stored)
    short = 2 * n_classes
    if all(len(row) == short for row in rows):
        return np.frombuffer(b"".join(rows), dtype="<f2").reshape(-1, n_classes)
    return np.stack(
        [np.frombuffer(row, dtype="<f2" if len(row) == short else "<f4").astype("<f4") for row in rows]
    )


def stored_ranks(ranks: Sequence[Ranked]) -> bytes:
    """Return index, score and probability (NaN for none) of each class, to the last bit as served.

    Either all of them have a probability or none.
    """
    if ranks[0].probability is None:
        ranks = [rank._replace(probability=math.nan) for rank in ranks]
    return _packing(len(ranks)).pack(*chain.from_iterable(ranks))


@cache
def _packing(n_ranks: int) -> struct.Struct:
    return struct.Struct("<" + _RANK * n_ranks)


def read_ranks(stored: bytes) -> tuple[Ranked, ...]:
    """Return the classes that `stored_ranks` stored."""
    return tuple(
        Ranked(index, score, None if math.isnan(probability) else probability)
        for index, score, probability in _packing(1).iter_unpack(stored)
    )
