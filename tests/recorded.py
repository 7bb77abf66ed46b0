"""Records to fill a store with: a clock that tests turn, UUIDv7s of its time, model versions, predictions."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

import numpy as np

from service.core.records import (
    Decision,
    FeedbackItem,
    Group,
    ModelVersion,
    Prediction,
    PriorVersion,
    Ranked,
    label_set_id,
)

START = datetime(2026, 5, 1, 12, tzinfo=UTC)
LABELS = ("red", "green", "blue", "grey")


@dataclass
class TurnedClock:
    """Shows the time it was turned to."""

    now: datetime = START

    def __call__(self) -> datetime:
        return self.now

    def turn(self, **span: float) -> datetime:
        self.now += timedelta(**span)
        return self.now


def uuid7(created: datetime) -> UUID:
    """RFC 9562: 48 bits of milliseconds, version 7, the rest random."""
    ms = (created - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    low = secrets.randbits(74)
    return UUID(int=ms << 80 | 7 << 76 | (low >> 62) << 64 | 2 << 62 | low & (1 << 62) - 1)


def model(name: str = "tiny", version: str = "0" * 16, labels: tuple[str, ...] = LABELS) -> ModelVersion:
    n = len(labels)
    counts = np.maximum(1, np.geomspace(400, 5, n).astype(np.int64))
    names = {"many": counts >= 100, "medium": (counts < 100) & (counts > 20), "few": counts <= 20}
    return ModelVersion(
        name=name,
        version=version,
        labels=labels,
        class_counts=counts,
        source_prior=counts / counts.sum(),
        logit_offset=np.linspace(-0.1, 0.1, n),
        temperature=1.25,
        tau=1.5,
        groups=tuple(
            Group(group, tuple(np.flatnonzero(members).tolist()))
            for group, members in names.items()
            if members.any()
        ),
    )


def prediction(
    of: ModelVersion, created: datetime = START, decided: int = 0, logits: np.ndarray | None = None
) -> Prediction:
    """One prediction that decided on this class, with the others behind it in order of index."""
    n = len(of.labels)
    order = [decided, *(index for index in range(n) if index != decided)]
    return Prediction(
        id=uuid7(created),
        created=created,
        model_name=of.name,
        model_version=of.version,
        method="logit-adjustment",
        tau=1.5,
        temperature=of.temperature,
        prior_name="default",
        prior_version=1,
        decision=Decision(
            top=tuple(
                Ranked(index, 3.1 - place / 7, 0.5 / (place + 1)) for place, index in enumerate(order[:5])
            ),
            unadjusted=Ranked(n - 1, 0.1, 1 / 3),
            logits=np.arange(n, dtype=np.float32) if logits is None else logits.astype(np.float32),
        ),
    )


def item(of: Prediction | UUID, label: str | int, **more: object) -> FeedbackItem:
    """One label by name or by index."""
    named = {"label": label, "index": None} if isinstance(label, str) else {"label": None, "index": label}
    rest = {"sampling_probability": None, "labelled_at": None, **more}
    return FeedbackItem(prediction_id=of if isinstance(of, UUID) else of.id, **named, **rest)


def prior(name: str = "default", labels: tuple[str, ...] = LABELS, **more: object) -> PriorVersion:
    """A prior to be added; the store gives the number."""
    fields = {
        "label_set": label_set_id(labels),
        "name": name,
        "version": 0,
        "probabilities": np.full(len(labels), 1 / len(labels)),
        "created": START,
        "note": None,
        "author": None,
    }
    return PriorVersion(**{**fields, **more})
