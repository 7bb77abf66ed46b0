"""The store's tables, and how arrays lie in their columns: the one place that knows the stored bytes."""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta
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
    from collections.abc import Iterable

    from numpy.typing import NDArray

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
    Column("logits", LargeBinary, nullable=False),  # float16
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
_RANK: Final = struct.Struct("<idd")
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


def stored_logits(values: NDArray[np.float32]) -> bytes:
    """Return (L,) as float16, finite, for no replay ranks infinities.

    Logits beyond its range are first lowered by the largest, which changes no decision, so that what is then
    held at the end of the range is far behind. Their differences come back, themselves they do not.
    """
    if np.abs(values).max() > _FLOAT16_MAX:
        exact = values.astype(np.float64)  # float32 has no room for every difference of two of its numbers
        lowered: NDArray[np.float64] = np.maximum(exact - exact.max(), -_FLOAT16_MAX)
        return lowered.astype("<f2").tobytes()
    return values.astype("<f2").tobytes()


def read_logits(stored: Iterable[bytes], n_classes: int) -> NDArray[np.float16]:
    """Return the rows that `stored_logits` stored, shape (n, L)."""
    return np.frombuffer(b"".join(stored), dtype="<f2").reshape(-1, n_classes)


def stored_ranks(ranks: Iterable[Ranked]) -> bytes:
    """Return index, score and probability of each class, to the last bit as served."""
    return b"".join(_RANK.pack(rank.index, rank.score, rank.probability) for rank in ranks)


def read_ranks(stored: bytes) -> tuple[Ranked, ...]:
    """Return the classes that `stored_ranks` stored."""
    return tuple(Ranked(*fields) for fields in _RANK.iter_unpack(stored))
