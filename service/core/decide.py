"""From images or logits to decisions: what one model does with a batch, and the same formula in NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from longtail import adjustment as formula
from service.core.exceptions import Invalid, Refusal, Unavailable
from service.core.ports import EngineError
from service.core.records import Decision, Ranked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from service.core.ports import Engine
    from service.core.records import Adjustment, ModelVersion


@dataclass(frozen=True, eq=False)
class QueuedImage:
    """An image as it waits: its bytes as they came, and what its request asks of it.

    `position` is its place in the request, from 0. Requests in one batch keep their own adjustment.
    """

    data: bytes
    position: int
    adjustment: Adjustment
    top_k: int


@dataclass(frozen=True, eq=False)
class ReadyImage:
    """A decoded image: pixels uint8 (H, W, C)."""

    pixels: NDArray[np.uint8]
    adjustment: Adjustment
    top_k: int


class Decider:
    """One model's way from bytes to decisions, in the two steps that a batcher calls on its threads."""

    def __init__(
        self, decode: Callable[[bytes], NDArray[np.uint8]], engine: Engine, temperature: float
    ) -> None:
        """`decode` gives pixels of the network's size, and raises a Refusal for bytes that are no image."""
        self._decode = decode
        self._engine = engine
        self._temperature = temperature

    def prepare(self, image: QueuedImage) -> ReadyImage:
        """Decode; a Refusal then names the image's position."""
        try:
            pixels = self._decode(image.data)
        except Refusal as refusal:
            refusal.fields["position"] = image.position
            raise
        return ReadyImage(pixels, image.adjustment, image.top_k)

    def run(self, batch: Sequence[ReadyImage], alone: bool = False) -> list[Decision | Exception]:
        """Return a decision for each image; Unavailable for one whose logits are not finite.

        `alone` says that nothing else runs or waits. Raises Unavailable where the engine fails: that costs
        the batch.
        """
        adjustments = {id(image.adjustment): image.adjustment for image in batch}
        row_of = {key: row for row, key in enumerate(adjustments)}
        try:
            out = self._engine.run(
                np.stack([image.pixels for image in batch]),
                np.stack([adjustment.offset for adjustment in adjustments.values()]),
                np.array([row_of[id(image.adjustment)] for image in batch], dtype=np.int64),
                max(image.top_k for image in batch),
                alone,
            )
        except EngineError as failure:
            raise Unavailable("engine-failed", f"The engine failed: {failure}.") from failure
        finite = np.all(np.isfinite(out.logits), axis=1)
        with np.errstate(invalid="ignore"):  # in rows that are not finite, which become no decision
            shares = np.exp(out.scores / self._temperature - out.log_partition[:, None])
            plain = np.exp(out.unadjusted_score / self._temperature - out.unadjusted_log_partition)
        unadjusted = _ranked(out.unadjusted_index, out.unadjusted_score, plain)
        return [
            Decision(
                _cut(_ranked(out.indices[i], out.scores[i], shares[i]), image.top_k),
                unadjusted[i],
                out.logits[i],
            )
            if finite[i]
            else Unavailable("logits-not-finite", "The network's answer for this image is not finite.")
            for i, image in enumerate(batch)
        ]


def offset_row(model: ModelVersion, target_prior: ArrayLike, tau: float) -> NDArray[np.float64]:
    """Return what is added to f: b + tau * (log q - log p), float64 (L,)."""
    return model.logit_offset + formula.adjustment(model.source_prior, target_prior, tau)


def decide(logits: ArrayLike, adjustment: Adjustment, model: ModelVersion, top_k: int) -> list[Decision]:
    """Return a decision for each row of logits f, (n, L), by the formula itself, without an engine.

    Raises Invalid unless the rows have one finite float32 for each class.
    """
    n_classes = len(model.labels)
    try:
        values = np.asarray(logits, dtype=np.float64)
    except (ValueError, TypeError, OverflowError) as failure:
        raise Invalid(
            "invalid-logits", "logits must be a list of equally long lists of numbers."
        ) from failure
    if values.ndim != 2 or values.shape[1] != n_classes:
        raise Invalid(
            "invalid-logits", f"Each row of logits needs one number for each of the {n_classes} classes."
        )
    bad = np.flatnonzero(~(np.abs(values) <= np.finfo(np.float32).max).all(axis=1))
    if bad.size:
        position = int(bad[0])
        raise Invalid(
            "invalid-logits",
            f"Row {position} of logits has a number that is not finite, or that no float32 holds.",
            position=position,
        )
    if not len(values):
        return []
    scores = values + adjustment.offset
    plain = values + model.logit_offset
    indices, shares = formula.top_k(scores, top_k), formula.probabilities(scores, adjustment.temperature)
    first = formula.top_k(plain, 1)[:, 0]
    plain_shares = formula.probabilities(plain, model.temperature)
    rows = np.arange(len(values))
    unadjusted = _ranked(first, plain[rows, first], plain_shares[rows, first])
    return [
        Decision(
            _cut(_ranked(indices[i], scores[i, indices[i]], shares[i, indices[i]]), top_k),
            unadjusted[i],
            values[i].astype(np.float32),
        )
        for i in rows
    ]


def _ranked(
    indices: NDArray[np.integer], scores: NDArray[np.floating], shares: NDArray[np.floating]
) -> list[Ranked]:
    """Return classes as they are answered; rounding may not take a probability past one."""
    return [
        Ranked(index, score, min(share, 1.0))
        for index, score, share in zip(indices.tolist(), scores.tolist(), shares.tolist(), strict=True)
    ]


def _cut(ranked: list[Ranked], top_k: int) -> tuple[Ranked, ...]:
    """Leave out what lies beyond top_k and what the target prior rules out (the score is -inf)."""
    return tuple(entry for entry in ranked[:top_k] if entry.score > -np.inf)
