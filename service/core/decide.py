"""From images or logits to decisions: what one model does with a batch, and the same formula in NumPy."""

from __future__ import annotations

from itertools import repeat
from operator import is_
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from longtail import adjustment as formula
from service.core.exceptions import Invalid, Refusal, Unavailable
from service.core.ports import EngineError
from service.core.records import Decision, Ranked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from service.core.ports import Engine
    from service.core.records import Adjustment, ModelVersion

# Factors and shifts further apart than this would vanish or overflow in the engine's float32.
_FLOAT32_SPAN: Final = 1e30


class QueuedImage(NamedTuple):
    """An image as it waits: its bytes as they came, and what its request asks of it.

    An array is taken for what decoding would give, of the shape and type that the engine takes.
    `position` is its place in the request, from 0. Requests in one batch keep their own adjustment.
    """

    data: bytes | NDArray[Any]
    position: int
    adjustment: Adjustment
    top_k: int


class ReadyImage(NamedTuple):
    """A decoded image: pixels uint8 (H, W, C), or a row of what else the engine takes."""

    pixels: NDArray[Any]
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
        self._last: tuple[list[Adjustment], _Table] = [], (None, np.empty((0, 0)))

    def prepare(self, image: QueuedImage) -> ReadyImage:
        """Decode; a Refusal then names the image's position."""
        if not isinstance(image.data, bytes):
            return ReadyImage(image.data, image.adjustment, image.top_k)
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
        distinct = list({id(image.adjustment): image.adjustment for image in batch}.values())
        row_of = {id(adjustment): row for row, adjustment in enumerate(distinct)}
        factors, offsets = self._table(distinct)
        try:
            out = self._engine.run(
                _stacked([image.pixels for image in batch]),
                offsets,
                np.array([row_of[id(image.adjustment)] for image in batch], dtype=np.int64),
                max(image.top_k for image in batch),
                factors=factors,
                alone=alone,
            )
        except EngineError as failure:
            raise Unavailable("engine-failed", f"The engine failed: {failure}.") from failure
        finite: list[bool] = np.all(np.isfinite(out.logits), axis=1).tolist()
        with np.errstate(invalid="ignore", over="ignore"):  # in rows that become no decision, or no share
            shares = np.exp(out.scores / self._temperature - out.log_partition[:, None])
            plain = np.exp(out.unadjusted_score / self._temperature - out.unadjusted_log_partition)
        unadjusted = _ranked(out.unadjusted_index, out.unadjusted_score, plain)
        # Lists once for the batch: a row of an array costs more to come by than all that is done with it.
        indices, scores, probabilities = out.indices.tolist(), out.scores.tolist(), _at_most_one(shares)

        def top(i: int, image: ReadyImage) -> Iterable[Ranked]:
            k = image.top_k
            if image.adjustment.factor is None:
                return map(Ranked, indices[i][:k], scores[i][:k], probabilities[i][:k])
            if _fits_float32(image.adjustment):
                return _ranked(out.indices[i], out.scores[i])
            return _best(out.logits[i : i + 1].astype(np.float64), image.adjustment, k)[0]

        return [
            Decision(_cut(top(i, image), image.top_k), unadjusted[i], out.logits[i])
            if finite[i]
            else Unavailable("logits-not-finite", "The network's answer for this image is not finite.")
            for i, image in enumerate(batch)
        ]

    def _table(self, distinct: list[Adjustment]) -> _Table:
        """Return the rows of these adjustments: the very arrays of the last batch where it had the same."""
        adjustments, table = self._last
        if len(adjustments) != len(distinct) or not all(map(is_, adjustments, distinct)):
            table = _table(distinct)
            self._last = distinct, table
        return table


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
    plain = values + model.logit_offset
    best = _best(values, adjustment, top_k)
    first = formula.top_k(plain, 1)[:, 0]
    plain_shares = formula.probabilities(plain, model.temperature)
    rows = np.arange(len(values))
    unadjusted = _ranked(first, plain[rows, first], plain_shares[rows, first])
    return [
        Decision(_cut(top, top_k), unadjusted[i], values[i].astype(np.float32)) for i, top in enumerate(best)
    ]


_Table = tuple["NDArray[np.float64] | None", "NDArray[np.float64]"]


def _table(adjustments: Sequence[Adjustment]) -> _Table:
    """Return the engine's rows: factors, None where nothing multiplies, and offsets.

    A row that its float32 would not hold is one and zero: it is ranked here, from f.
    """
    if all(adjustment.factor is None for adjustment in adjustments):
        return None, np.stack([adjustment.offset for adjustment in adjustments])
    factors = np.ones((len(adjustments), len(adjustments[0].offset)))
    offsets = np.zeros_like(factors)
    for row, adjustment in enumerate(adjustments):
        if _fits_float32(adjustment):
            offsets[row] = adjustment.offset
            factors[row] = 1 if adjustment.factor is None else adjustment.factor
    return factors, offsets


def _fits_float32(adjustment: Adjustment) -> bool:
    """Whether a row keeps its meaning once its largest factor is scaled to one, as the engine does."""
    if adjustment.factor is None:
        return True
    largest = adjustment.factor.max()
    shift = np.abs(adjustment.offset).max() / largest
    return bool(adjustment.factor.min() / largest > 1 / _FLOAT32_SPAN and shift < _FLOAT32_SPAN)


def _best(values: NDArray[np.float64], adjustment: Adjustment, top_k: int) -> list[list[Ranked]]:
    """Return the top_k classes of each row of logits f (n, L), best first, in float64."""
    if adjustment.factor is None:
        scores = values + adjustment.offset
        shares = formula.probabilities(scores, adjustment.temperature)
    else:
        scores, shares = values * adjustment.factor + adjustment.offset, None
    return [
        _ranked(best, scores[row, best], None if shares is None else shares[row, best])
        for row, best in enumerate(formula.top_k(scores, top_k))
    ]


def _stacked(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return what np.stack does, which lets go of the interpreter for every single array."""
    first = arrays[0]
    joined = b"".join([array.data if array.flags.c_contiguous else array.tobytes() for array in arrays])
    return np.frombuffer(joined, dtype=first.dtype).reshape(len(arrays), *first.shape)


def _ranked(
    indices: NDArray[np.integer],
    scores: NDArray[np.floating],
    shares: NDArray[np.floating] | None = None,
) -> list[Ranked]:
    """Return classes as they are answered."""
    probabilities = repeat(None) if shares is None else _at_most_one(shares)
    return list(map(Ranked, indices.tolist(), scores.tolist(), probabilities))


def _at_most_one(shares: NDArray[np.floating]) -> list[Any]:
    """Return probabilities as nested lists; rounding may not take one past 1."""
    probabilities: list[Any] = np.minimum(shares, 1.0).tolist()
    return probabilities


def _cut(ranked: Iterable[Ranked], top_k: int) -> tuple[Ranked, ...]:
    """Leave out what lies beyond top_k and what the target prior rules out (the score is -inf)."""
    top = tuple(ranked)[:top_k]
    if top[-1].score > -np.inf:  # best first
        return top
    return tuple(entry for entry in top if entry.score > -np.inf)
