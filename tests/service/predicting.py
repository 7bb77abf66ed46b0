"""A predictor with the tiny bundle behind it, and the formula to hold its decisions to."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np

from longtail import adjustment as formula
from longtail.priors import uniform_prior
from service.adapters import bundles
from service.core.batcher import Capacity
from service.core.exceptions import NotFound, Overloaded
from service.core.predict import Predictor
from service.core.records import PriorVersion
from tests import tiny
from tests.tiny import png

CLASSES = 9
NOW = datetime(2026, 11, 24, 10, 0, 0, 500_250, tzinfo=UTC)
PIXELS = np.random.default_rng(7).integers(0, 256, (24, tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
IMAGES = [png(pixels) for pixels in PIXELS]


class FakePriors:
    """Named priors in memory, version 1 each."""

    def __init__(self, **named) -> None:
        self.named = named

    def current(self, label_set, name):
        if name not in self.named:
            raise NotFound("priors-not-found", f"There is no prior {name}.")
        return PriorVersion(label_set, name, 1, self.named[name], NOW, None, None)


class FakeStore:
    """Keeps what it is given, or fails."""

    def __init__(self) -> None:
        self.kept = []
        self.failure = None
        self.full = False

    def check_room(self, predictions, n_classes):
        if self.full:
            raise Overloaded("store-behind", "The store is behind.", retry_after_s=1)

    def keep(self, recordings, then):
        if self.failure is None:
            self.kept.extend(
                one for recording in recordings if recording.wanted for one in recording.predictions
            )
        then(self.failure)


class Heard:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.answered = []
        self.refused = []
        self.given_up = []

    def predicted(self, model, method, images, stages):
        self.answered.append((method, images, stages))

    def shed(self, model, reason):
        self.refused.append(reason)

    def dropped(self, model, reason):
        self.given_up.append(reason)


@asynccontextmanager
async def serving(
    folder, n_classes=CLASSES, capacity=None, priors=None, change=None, observer=None, **options
):
    """A predictor with the tiny bundle behind it: real decoder, queue and ONNX Runtime."""
    changes = {"logit_offset": np.linspace(-2, 1, n_classes).tolist(), **(change or {})}
    bundle = tiny.make(folder / "tiny", n_classes=n_classes, **changes)
    model = bundles.load(bundle, "cpu", capacity or Capacity(workers=2, largest_batch=16))
    store = FakeStore()
    named = {"default": uniform_prior(n_classes), **(priors or {})}
    try:
        yield Predictor(store, FakePriors(**named), lambda: NOW, observer or Heard(), **options), model, store
    finally:
        await asyncio.to_thread(model.batcher.stop)


def allowed(score):
    """The promise: 1e-4, one part in a million of a score beyond 100."""
    return max(1e-4, 1e-6 * abs(score))


def check(decision, offset, model, top_k):
    """Hold a decision to the formula in NumPy, in float64, from the logits it says it saw."""
    logits = decision.logits.astype(np.float64)
    for top, scores, k in (
        (decision.top, logits + offset, top_k),
        ((decision.unadjusted,), logits + model.version.logit_offset, 1),
    ):
        order, shares = formula.top_k(scores, k), formula.probabilities(scores, model.version.temperature)
        possible = [index for index in order if scores[index] > -np.inf]
        assert len(top) == len(possible)
        assert len({entry.index for entry in top}) == len(top)
        for entry, index in zip(top, possible, strict=True):
            assert abs(entry.score - scores[entry.index]) <= allowed(scores[entry.index])
            assert abs(entry.probability - shares[entry.index]) <= 1e-4
            # Another class may stand here only where the two are equal as far as the promise goes.
            assert abs(scores[entry.index] - scores[index]) <= 2 * allowed(scores[index])
        assert all(a.score >= b.score for a, b in pairwise(top))
