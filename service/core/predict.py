"""The way from an image to its answer: adjustment -> decode, batch, engine -> record -> answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from service.core.decide import QueuedImage
from service.core.exceptions import DeadlineExceeded, Invalid
from service.core.ids import IdMaker
from service.core.methods import checked_tau, knows_priors, ranking_row
from service.core.priors import DEFAULT, probabilities_of
from service.core.records import Adjustment, Prediction

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from service.core.models import LoadedModel
    from service.core.ports import Clock, Store
    from service.core.priors import Priors, Values
    from service.core.records import Decision, Method, ModelVersion, PriorVersion

_KEPT_ADJUSTMENTS: Final = 256


def _size(image: bytes | NDArray[Any]) -> int:
    return len(image) if isinstance(image, bytes) else image.nbytes


class Predictor:
    """Decides, keeps what was decided, and only then answers."""

    def __init__(
        self,
        store: Store,
        priors: Priors,
        clock: Clock,
        *,
        default_tau: float | None = None,
        record: bool = True,
        deadline_s: float | None = None,
    ) -> None:
        """`default_tau` goes before the bundle's own; without `record` no prediction has an id."""
        self._store = store
        self._priors = priors
        self._clock = clock
        self._default_tau = default_tau
        self._record = record
        self._deadline_s = deadline_s
        self._new_id = IdMaker()
        self._kept: dict[tuple[object, ...], Adjustment] = {}

    async def predict(
        self,
        images: Sequence[bytes | NDArray[Any]],
        *,
        model: LoadedModel,
        adjustment: Adjustment,
        top_k: int,
    ) -> list[Prediction]:
        """Return a prediction for each image, in order, once all are kept.

        An image is a file's bytes, or an array that the network's input takes as it is.

        Raises a Refusal that names the `position` of the first image that cannot be taken, Overloaded when
        the queue is full, DeadlineExceeded, and Unavailable where the engine or the store fails; nothing is
        recorded then.
        """
        queued = [QueuedImage(data, i, adjustment, top_k) for i, data in enumerate(images)]
        limit = asyncio.timeout(self._deadline_s)
        try:
            async with limit:
                decisions = await model.batcher.submit(queued, [_size(data) for data in images])
                predictions = self._predictions(decisions, model.version, adjustment)
                if self._record:
                    await self._store.record(predictions)
        except TimeoutError as failure:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                "deadline-exceeded", f"There was no answer within {self._deadline_s:g} s; try again later."
            ) from failure
        return predictions

    @property
    def records(self) -> bool:
        """Whether predictions are recorded, and so have an id."""
        return self._record

    def adjustment_for(
        self,
        model: LoadedModel,
        method: Method = "logit-adjustment",
        tau: float | None = None,
        priors_name: str | None = None,
        target_prior: Values | NDArray[np.float64] | None = None,
    ) -> Adjustment:
        """Return how a request is to be scored; it holds one version of its prior from here on.

        `tau` None is the service's default, else the bundle's for this method, else 1. `target_prior`, by
        label or by index, goes in place of a named prior, not beside one. Raises NotFound for a name that is
        not there and Invalid for a method that the bundle does not have, or any other value that cannot be
        taken.
        """
        version = model.version
        if priors_name is not None and target_prior is not None:
            raise Invalid(
                "conflicting-parameters", "Give priors or target_prior, not both.", field="target_prior"
            )
        named = "priors" if target_prior is None else "target_prior"
        given = None if priors_name is None and target_prior is None else named
        strength = checked_tau(version, method, tau, by_default=self._default_tau, prior=given)
        if target_prior is not None:
            target = probabilities_of(target_prior, version.labels, "target_prior")
            factor, offset = ranking_row(version, method, strength, target)
            return Adjustment(method, strength, version.temperature, None, offset, factor)
        prior = self._priors.current(version.label_set, priors_name or DEFAULT)
        return self._kept_or_made(version, method, strength, prior)

    def _kept_or_made(
        self, version: ModelVersion, method: Method, tau: float, prior: PriorVersion
    ) -> Adjustment:
        """Return the adjustment by a stored prior: made once, so that requests alike share a row too."""
        key = (version.name, version.version, method, tau, prior.label_set, prior.name, prior.version)
        adjustment = self._kept.get(key)
        if adjustment is None:
            named = prior if knows_priors(method) else None
            target = None if named is None else named.probabilities
            factor, offset = ranking_row(version, method, tau, target)
            adjustment = Adjustment(method, tau, version.temperature, named, offset, factor)
            if len(self._kept) >= _KEPT_ADJUSTMENTS:
                self._kept.clear()
            self._kept[key] = adjustment
        return adjustment

    def _predictions(
        self, decisions: Sequence[Decision], version: ModelVersion, adjustment: Adjustment
    ) -> list[Prediction]:
        created, prior = self._clock(), adjustment.prior
        return [
            Prediction(
                id=self._new_id(created) if self._record else None,
                created=created,
                model_name=version.name,
                model_version=version.version,
                method=adjustment.method,
                tau=adjustment.tau,
                temperature=adjustment.temperature,
                prior_name=prior.name if prior else None,
                prior_version=prior.version if prior else None,
                decision=decision,
            )
            for decision in decisions
        ]
