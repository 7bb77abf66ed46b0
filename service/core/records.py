"""What the parts of the service hand to each other and to the store: frozen, named in the domain's words."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    import numpy as np
    from numpy.typing import NDArray

    from longtail.normalisation import BiasRule

    StoredLogits = NDArray[np.float16] | NDArray[np.float32]

Method = Literal["logit-adjustment", "weight-normalisation", "none"]


@dataclass(frozen=True)
class Group:
    """A named set of classes, by index."""

    name: str
    indices: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class WeightNormalisation:
    """What ranking by f / norms^tau needs; see `bundle.manifest.WeightNormalisation`. Arrays are (L,)."""

    norms: NDArray[np.float64]
    biases: NDArray[np.float64]
    bias: BiasRule
    tau: float | None


@dataclass(frozen=True, eq=False)
class ModelVersion:
    """All that replay needs of a model once its bundle is gone. Arrays have shape (L,), by index."""

    name: str
    version: str
    labels: tuple[str, ...]
    class_counts: NDArray[np.int64]
    source_prior: NDArray[np.float64]
    logit_offset: NDArray[np.float64]
    temperature: float
    tau: float | None
    groups: tuple[Group, ...]
    weight_normalisation: WeightNormalisation | None = None

    @cached_property
    def label_set(self) -> str:
        """The id of the ordered list of labels; models that share it share their priors."""
        return label_set_id(self.labels)

    @property
    def methods(self) -> tuple[Method, ...]:
        """How its logits can be ranked."""
        if self.weight_normalisation is None:
            return ("logit-adjustment", "none")
        return ("logit-adjustment", "weight-normalisation", "none")


def label_set_id(labels: Sequence[str]) -> str:
    """Return 16 hex digits that stand for the ordered list of labels."""
    return hashlib.sha256(json.dumps(list(labels), ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class PriorVersion:
    """A target prior: one immutable version of a name that belongs to a label set."""

    label_set: str
    name: str
    version: int
    probabilities: NDArray[np.float64]
    created: datetime
    note: str | None
    author: str | None


@dataclass(frozen=True, eq=False)
class Adjustment:
    """How scores are made for one request: s = f * factor + offset, one row of the engine's table.

    By logit adjustment `factor` is None, for 1, and `offset` is b + tau * (log q - log p), float64 (L,), -inf
    where q is zero. By weight normalisation they are those of `longtail.normalisation`. `prior` is None where
    no stored prior is used (by `method=none` and weight normalisation, or a target prior given in the request
    itself).
    """

    method: Method
    tau: float
    temperature: float
    prior: PriorVersion | None
    offset: NDArray[np.float64]
    factor: NDArray[np.float64] | None = None


# Those that are made for every image are tuples, which take half the time to make.


class Ranked(NamedTuple):
    """One class as it is answered; without a probability where the scores stand for none."""

    index: int  # type: ignore[assignment]  # in the place of a method that tuples have
    score: float
    probability: float | None


class Decision(NamedTuple):
    """What the engine and the formula made of one image.

    `top` is in order, cut to the request's top_k and to classes above -inf; `top[0]` is the decision.
    `unadjusted` is the same image at tau = 0. `logits` is f, float32 (L,).
    """

    top: tuple[Ranked, ...]
    unadjusted: Ranked
    logits: NDArray[np.float32]


class Prediction(NamedTuple):
    """A decision as it is recorded and answered.

    `id` is a UUIDv7 that holds `created` to the millisecond; None where recording is off.
    """

    id: UUID | None
    created: datetime
    model_name: str
    model_version: str
    method: Method
    tau: float
    temperature: float
    prior_name: str | None
    prior_version: int | None
    decision: Decision


class Stages(NamedTuple):
    """Where a request's time went, in seconds, by the batch that completed it: the parts make up the total.

    `queue_s` until that batch began, `decode_s` decoding all of its images, `infer_s` running the network on
    them, `store_s` shaping the answers and waiting for the commit. Of a request that did not finish only the
    total is known; the parts are 0.
    """

    queue_s: float
    decode_s: float
    infer_s: float
    store_s: float
    total_s: float


@dataclass(frozen=True)
class StoredLabel:
    """A label that arrived for a prediction; the newest stands last."""

    index: int
    received: datetime
    labelled_at: datetime | None


@dataclass(frozen=True, eq=False)
class StoredPrediction:
    """A prediction read back: as it was answered, but that its logits went through float16 where they fit."""

    prediction: Prediction
    labels: tuple[StoredLabel, ...]


@dataclass(frozen=True)
class FeedbackItem:
    """A label for a prediction: exactly one of `label` and `index`, of the prediction's own model."""

    prediction_id: UUID
    label: str | None
    index: int | None
    sampling_probability: float | None
    labelled_at: datetime | None


@dataclass(frozen=True)
class Rejection:
    """A feedback item that was not taken, by its place in the request (from 0)."""

    position: int
    prediction_id: UUID
    code: str


@dataclass(frozen=True)
class Receipt:
    """What became of the items of one feedback request; the counts and `rejected` together are the items."""

    accepted: int
    corrected: int
    unchanged: int
    rejected: tuple[Rejection, ...]


@dataclass(frozen=True, eq=False)
class LabelledPredictions:
    """Labelled predictions of one model version, as columns of n rows.

    `logits` is float16 (n, L), or float32 where a row of them needs it, or None where they were not asked
    for; `decided` and `labels` int64 (n,), `sampling_probability` float64 (n,), 1 where none was given.
    """

    decided: NDArray[np.int64]
    labels: NDArray[np.int64]
    sampling_probability: NDArray[np.float64]
    logits: StoredLogits | None
