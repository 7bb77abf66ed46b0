"""How wrong the service is, from the labels that came back: as it was served, or as it would have been.

A replay adds another adjustment to the logits that were kept and decides again. Versions of a model are
never mixed; one that is gone is answered from the store like any other.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final
from uuid import UUID

import numpy as np

from longtail.intervals import Interval, wilson
from longtail.metrics import ClassErrors, MeanError, TrafficError, class_errors, mean_error, traffic_error
from service.core.exceptions import Invalid, NotFound
from service.core.methods import checked_tau, knows_priors, ranking_row, tau_by_default
from service.core.priors import DEFAULT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime, timedelta

    from numpy.typing import NDArray

    from service.core.methods import Row
    from service.core.ports import Clock, Store
    from service.core.priors import Priors
    from service.core.records import (
        FeedbackItem,
        Method,
        ModelVersion,
        PriorVersion,
        Receipt,
        StoredLogits,
        StoredPrediction,
    )

GRID: Final = tuple(step / 10 for step in range(31))

_LEAST_PROBABILITY: Final = 1e-100


@dataclass(frozen=True)
class Window:
    """Half-open times of prediction; None is without end."""

    since: datetime | None = None
    until: datetime | None = None


def window(since: datetime | None, until: datetime | None, last: timedelta | None, now: datetime) -> Window:
    """Return the window that a request names. Raises Invalid if it goes backwards or is named twice."""
    if last is not None:
        if since is not None or until is not None:
            raise Invalid("invalid-window", "Give last, or since and until, not both.", parameter="last")
        return Window(now - last, None)
    if since is not None and until is not None and since > until:
        raise Invalid("invalid-window", "since: it must not be after until.", parameter="since")
    return Window(since, until)


@dataclass(frozen=True, eq=False)
class Replay:
    """What is decided again: by this method at this tau, for this prior if the method knows one."""

    method: Method
    tau: float
    prior: PriorVersion | None

    def row(self, model: ModelVersion) -> Row:
        """Return what scores this model's f."""
        target = None if self.prior is None else self.prior.probabilities
        return ranking_row(model, self.method, self.tau, target)


@dataclass(frozen=True, eq=False)
class Selection:
    """Which predictions are looked at, and whether as they were served (no replay)."""

    model: ModelVersion
    window: Window
    replay: Replay | None


@dataclass(frozen=True, eq=False)
class Report:
    """Errors by class, by group, on average over classes and over traffic, (L,) by index.

    `intervals` are the classes' own; `predicted` counts the decisions of all predictions, labelled or not.
    """

    selection: Selection
    predictions: int
    labels: int
    balanced: MeanError
    traffic: TrafficError
    groups: tuple[tuple[str, MeanError], ...]
    by_class: ClassErrors
    intervals: tuple[Interval, ...]
    predicted: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CurvePoint:
    """The errors that one tau would have given."""

    tau: float
    balanced: MeanError
    groups: tuple[tuple[str, MeanError], ...]


@dataclass(frozen=True, eq=False)
class Curve:
    """The errors over a grid of tau, by one method at one prior. `served_tau` is among its points."""

    model: ModelVersion
    method: Method
    prior: PriorVersion | None
    labels: int
    served_tau: float
    points: tuple[CurvePoint, ...]


class Monitor:
    """Takes labels, and says what they say. Arithmetic runs on threads, one replay at a time."""

    def __init__(
        self, store: Store, priors: Priors, clock: Clock, *, default_tau: float | None = None
    ) -> None:
        """`default_tau` is the service's own: it goes before a bundle's, in replays as in predictions."""
        self._store = store
        self._priors = priors
        self._clock = clock
        self._default_tau = default_tau
        self._replaying = asyncio.Semaphore(1)

    async def learn(self, items: Sequence[FeedbackItem]) -> Receipt:
        """Attach labels that arrived later to their predictions."""
        return await self._store.learn(items, self._clock())

    async def prediction(self, prediction_id: str) -> tuple[StoredPrediction, ModelVersion]:
        """Return a prediction with its labels, and the model that made it. Raises NotFound."""
        try:
            stored = await self._store.prediction(UUID(prediction_id))
        except ValueError:  # no id at all
            stored = None
        if stored is None:
            raise NotFound("prediction-not-found", "There is no prediction of this id, or no longer.")
        made = stored.prediction
        return stored, await self._model(made.model_name, made.model_version)

    async def select(
        self,
        name: str,
        version: str | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        last: timedelta | None = None,
        tau: float | None = None,
        priors: str | None = None,
        method: Method | None = None,
    ) -> Selection:
        """Return what a request asks to look at: `version` None is the latest loaded.

        With `tau`, `priors` or `method` it is a replay; what is not named is what is served by default.
        Raises NotFound for a model, version or priors name that is not there, Invalid for the window, and for
        what the method does not take.
        """
        chosen = window(since, until, last, self._clock())
        model = await self._model(name, version)
        if tau is None and priors is None and method is None:
            return Selection(model, chosen, None)
        return Selection(model, chosen, self._replay(model, method or "logit-adjustment", tau, priors))

    def _replay(self, model: ModelVersion, method: Method, tau: float | None, priors: str | None) -> Replay:
        named = None if priors is None else "priors"
        strength = checked_tau(model, method, tau, by_default=self._default_tau, prior=named)
        prior = self._priors.current(model.label_set, priors or DEFAULT)
        return Replay(method, strength, prior if knows_priors(method) else None)

    async def report(self, selection: Selection) -> Report:
        """Measure the decisions of a selection against their labels."""
        if selection.replay is None:
            labelled = await self._served(selection)
            predicted = await self._store.traffic(
                selection.model, selection.window.since, selection.window.until
            )
        else:
            async with self._replaying:
                labelled = await self._replayed(selection.model, selection.window, [selection.replay])
                predicted = await self._predicted(selection.model, selection.window, selection.replay)
        return await asyncio.to_thread(_report, selection, labelled, predicted)

    async def tau_curve(self, selection: Selection) -> Curve:
        """Measure what each tau of a grid would have given, by the method and at the prior of the selection.

        Raises Invalid for the method none, which has one tau.
        """
        model = selection.model
        chosen = selection.replay or self._replay(model, "logit-adjustment", None, None)
        if chosen.method == "none":
            raise Invalid("invalid-parameter", "method: none has one tau and no curve.", parameter="method")
        served = tau_by_default(model, chosen.method, self._default_tau)
        taus = sorted({*GRID, served})
        async with self._replaying:
            labelled = await self._replayed(
                model, selection.window, [replace(chosen, tau=tau) for tau in taus]
            )
            points = await asyncio.to_thread(_curve, model, taus, labelled)
        return Curve(model, chosen.method, chosen.prior, len(labelled.labels), served, points)

    async def _model(self, name: str, version: str | None) -> ModelVersion:
        known = await self._store.model_versions(name)
        if not known:
            raise NotFound("model-not-found", f"No model {name!r} was ever loaded here.")
        if version is None:
            return known[-1]
        for one in known:
            if one.version == version:
                return one
        raise NotFound("version-not-found", f"The model {name!r} has no version {version!r} here.")

    async def _served(self, selection: Selection) -> _Labelled:
        gathered = _Gathering()
        async for block in self._store.labelled(
            selection.model, selection.window.since, selection.window.until, with_logits=False
        ):
            gathered.add(block.labels, block.sampling_probability, block.decided[None])
        return gathered.all()

    async def _replayed(self, model: ModelVersion, of: Window, replays: Sequence[Replay]) -> _Labelled:
        """Decide the labelled predictions again, by each replay; a block of logits is held at a time."""
        rows = [one.row(model) for one in replays]
        gathered = _Gathering()
        async for block in self._store.labelled(model, of.since, of.until, with_logits=True):
            if block.logits is not None:
                decided = await asyncio.to_thread(_decide, block.logits, rows)
                gathered.add(block.labels, block.sampling_probability, decided)
        return gathered.all()

    async def _predicted(self, model: ModelVersion, of: Window, replay: Replay) -> NDArray[np.int64]:
        """Count what the replay decides over all predictions, labelled or not."""
        counts = np.zeros(len(model.labels), dtype=np.int64)
        row = replay.row(model)
        async for logits in self._store.recorded_logits(model, of.since, of.until):
            (decided,) = await asyncio.to_thread(_decide, logits, [row])
            counts += np.bincount(decided, minlength=len(counts))
        return counts


@dataclass(frozen=True, eq=False)
class _Labelled:
    """Labelled predictions: columns of n rows; `decided` has a row of n for each way to decide."""

    labels: NDArray[np.int64]
    weights: NDArray[np.float64]
    decided: NDArray[np.integer]


class _Gathering:
    """Puts blocks together."""

    def __init__(self) -> None:
        self._labels: list[NDArray[np.int64]] = []
        self._weights: list[NDArray[np.float64]] = []
        self._decided: list[NDArray[np.integer]] = []

    def add(
        self,
        labels: NDArray[np.int64],
        sampling_probability: NDArray[np.float64],
        decided: NDArray[np.integer],
    ) -> None:
        self._labels.append(labels)
        # The bound is far below any real probability: it keeps squares of weights finite.
        self._weights.append(1 / np.maximum(sampling_probability, _LEAST_PROBABILITY))
        self._decided.append(decided)

    def all(self) -> _Labelled:
        return _Labelled(
            np.concatenate(self._labels),
            np.concatenate(self._weights),
            np.concatenate(self._decided, axis=1),
        )


def _decide(logits: StoredLogits, rows: Sequence[Row]) -> NDArray[np.integer]:
    """Return the first index of the largest score, by each row, for logits (n, L): (rows, n)."""
    exact = logits.astype(np.float64)
    small = exact.shape[1] <= np.iinfo(np.int16).max  # a curve holds 31 of these for every label
    decided = np.empty((len(rows), len(logits)), dtype=np.int16 if small else np.int32)
    for winners, (factor, offset) in zip(decided, rows, strict=True):
        scaled = exact if factor is None else exact * factor
        winners[:] = (scaled + offset).argmax(axis=1)
    return decided


def _report(selection: Selection, labelled: _Labelled, predicted: NDArray[np.int64]) -> Report:
    n_classes = len(selection.model.labels)
    (decided,) = labelled.decided
    by_class = class_errors(labelled.labels, decided, n_classes, labelled.weights)
    return Report(
        selection=selection,
        predictions=int(predicted.sum()),
        labels=len(labelled.labels),
        balanced=mean_error(by_class),
        traffic=traffic_error(labelled.labels, decided, n_classes, labelled.weights),
        groups=_by_group(by_class, selection.model),
        by_class=by_class,
        intervals=tuple(
            wilson(error, n)
            for error, n in zip(by_class.errors.tolist(), by_class.effective.tolist(), strict=True)
        ),
        predicted=predicted,
    )


def _curve(model: ModelVersion, taus: Sequence[float], labelled: _Labelled) -> tuple[CurvePoint, ...]:
    points = []
    for tau, decided in zip(taus, labelled.decided, strict=True):
        by_class = class_errors(labelled.labels, decided, len(model.labels), labelled.weights)
        points.append(CurvePoint(tau, mean_error(by_class), _by_group(by_class, model)))
    return tuple(points)


def _by_group(by_class: ClassErrors, model: ModelVersion) -> tuple[tuple[str, MeanError], ...]:
    """Measure each group that has a class."""
    return tuple((group.name, mean_error(by_class, group.indices)) for group in model.groups if group.indices)
