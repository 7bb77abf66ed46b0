"""The way from an image to its answer: adjustment -> decode, batch, engine -> record -> answer."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from service.core.batcher import Ticket
from service.core.decide import QueuedImage
from service.core.exceptions import DeadlineExceeded, Invalid, Overloaded
from service.core.ids import IdMaker
from service.core.methods import checked_tau, knows_priors, ranking_row
from service.core.priors import DEFAULT, probabilities_of
from service.core.records import Adjustment, Prediction, Stages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from service.core.models import LoadedModel
    from service.core.ports import Clock, Observer, Store
    from service.core.priors import Priors, Values
    from service.core.records import Decision, Method, ModelVersion, PriorVersion

Shaped = TypeVar("Shaped")

_KEPT_ADJUSTMENTS: Final = 256


def _size(image: bytes | NDArray[Any]) -> int:
    return len(image) if isinstance(image, bytes) else image.nbytes


class Underway(Ticket[QueuedImage, "Decision"]):
    """A request between its admission and its answer; it is a batcher's ticket, and what a store keeps."""

    __slots__ = ("adjustment", "answer", "done", "loop", "model", "predictions", "shape", "timer", "told")

    def __init__(
        self,
        images: Sequence[QueuedImage],
        sizes: Sequence[int],
        to: Callable[[Sequence[Underway]], None],
        *,
        model: LoadedModel,
        adjustment: Adjustment,
        shape: Callable[[Sequence[Prediction]], Any],
        done: Callable[[Any, Stages], None],
    ) -> None:
        super().__init__(images, sizes, to)
        self.model = model
        self.adjustment = adjustment
        self.shape = shape
        self.done = done
        self.loop = asyncio.get_running_loop()
        self.timer: asyncio.TimerHandle | None = None
        self.told = False  # whether it has come to its end; the loop's thread alone sets it
        self.predictions: Sequence[Prediction] = ()
        self.answer: Any = None

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for it still."""
        return not self.told

    def end(self) -> None:
        """It has come to its end, whichever."""
        self.told = True
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def stages(self) -> Stages:
        """Return where the time of a finished request went, up to now."""
        now = time.perf_counter()
        return Stages(
            queue_s=self.taken - self.arrived,
            decode_s=self.prepared - self.taken,
            infer_s=self.ran - self.prepared,
            store_s=now - self.ran,
            total_s=now - self.arrived,
        )


class Predictor:
    """Decides, keeps what was decided, and only then answers."""

    def __init__(
        self,
        store: Store,
        priors: Priors,
        clock: Clock,
        observer: Observer,
        *,
        default_tau: float | None = None,
        record: bool = True,
        deadline_s: float = 30.0,
    ) -> None:
        """`default_tau` goes before the bundle's own; without `record` no prediction has an id.

        `deadline_s` is for requests that name none.
        """
        self._store = store
        self._priors = priors
        self._clock = clock
        self._observer = observer
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
        deadline_s: float | None = None,
    ) -> list[Prediction]:
        """Return a prediction for each image, in order, once all are kept: see `ask`.

        An image is a file's bytes, or an array that the network's input takes as it is.
        """
        predictions, _ = await self.ask(
            images, model=model, adjustment=adjustment, top_k=top_k, shape=list, deadline_s=deadline_s
        )
        return predictions

    async def ask(
        self,
        images: Sequence[bytes | NDArray[Any]],
        *,
        model: LoadedModel,
        adjustment: Adjustment,
        top_k: int,
        shape: Callable[[Sequence[Prediction]], Shaped],
        deadline_s: float | None = None,
    ) -> tuple[Shaped, Stages]:
        """Return what `shape` makes of the predictions, once all are kept, and where the time went.

        Raises what `begin` raises and what it would tell. A caller that is cancelled takes what still waits
        with it. No images are answered at once.
        """
        if not images:
            return shape(()), Stages(0.0, 0.0, 0.0, 0.0, 0.0)
        future: asyncio.Future[tuple[Shaped, Stages]] = asyncio.get_running_loop().create_future()

        def done(answer: Shaped | Exception, stages: Stages) -> None:
            if future.done():  # cancelled in this very turn of the loop
                return
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result((answer, stages))

        underway = self.begin(
            images,
            model=model,
            adjustment=adjustment,
            top_k=top_k,
            shape=shape,
            done=done,
            deadline_s=deadline_s,
        )
        try:
            return await future
        except asyncio.CancelledError:
            self.abandon(underway)
            raise

    def begin(
        self,
        images: Sequence[bytes | NDArray[Any]],
        *,
        model: LoadedModel,
        adjustment: Adjustment,
        top_k: int,
        shape: Callable[[Sequence[Prediction]], Shaped],
        done: Callable[[Shaped | Exception, Stages], None],
        deadline_s: float | None = None,
    ) -> Underway:
        """Admit a request, of one image at least, and return while it is under way.

        `done` hears once, on this thread's event loop: what `shape` made of the predictions (on a worker's
        thread), after all were kept; or why there is none, and nothing of it is recorded then: a Refusal that
        names the `position` of the first image that cannot be taken, DeadlineExceeded, or Unavailable where
        the engine or the store fails. `deadline_s` counts from now and covers everything; None is the
        service's own. Raises Overloaded when the queue is full or the store behind.
        """
        limit_s = self._deadline_s if deadline_s is None else deadline_s
        queued = [QueuedImage(data, i, adjustment, top_k) for i, data in enumerate(images)]
        sizes = [_size(data) for data in images]
        asked = Underway(
            queued, sizes, self._finished, model=model, adjustment=adjustment, shape=shape, done=done
        )
        try:
            if self._record:
                self._store.check_room(len(images), len(model.version.labels))
            model.batcher.admit(asked)
        except Overloaded as refusal:
            self._observer.shed(model.name, refusal.code)
            raise
        asked.timer = asked.loop.call_later(limit_s, self._expire, asked, limit_s)
        return asked

    def abandon(self, asked: Underway) -> None:
        """Nobody waits for this request any longer: take back what waits of it; `done` hears nothing."""
        if not asked.told:
            self._drop(asked, "client-left")

    def _expire(self, asked: Underway, limit_s: float) -> None:
        self._drop(asked, "deadline")
        late = DeadlineExceeded(
            "deadline-exceeded", f"There was no answer within {limit_s:g} s; try again later."
        )
        waited = time.perf_counter() - asked.arrived
        asked.done(late, Stages(0.0, 0.0, 0.0, 0.0, waited))

    def _drop(self, asked: Underway, reason: str) -> None:
        asked.end()
        asked.model.batcher.drop(asked)
        self._observer.dropped(asked.model.name, reason)

    def _finished(self, batch: Sequence[Underway]) -> None:
        """Shape and keep what a batch has finished; on the batch's thread, which nothing here may end."""
        good = []
        for asked in batch:
            if asked.failure is not None:
                asked.answer = asked.failure[1]
                continue
            try:
                decisions = cast("list[Decision]", asked.answers)
                asked.predictions = self._predictions(decisions, asked.model.version, asked.adjustment)
                asked.answer = asked.shape(asked.predictions)
            except Exception as failure:  # noqa: BLE001 - it is told to whoever asked
                asked.answer = failure
                continue
            good.append(asked)
        if good and self._record:
            self._store.keep(good, partial(self._were_kept, batch, good))
        else:
            self._tell_soon(batch)

    def _were_kept(
        self, batch: Sequence[Underway], kept: Sequence[Underway], failure: Exception | None
    ) -> None:
        """Hear from the store, on any thread, that these are kept, or why not."""
        if failure is not None:
            for asked in kept:
                asked.answer = failure
        self._tell_soon(batch)

    def _tell_soon(self, batch: Sequence[Underway]) -> None:
        loop = batch[0].loop
        if not loop.is_closed():  # a loop that is gone has taken its callers along
            loop.call_soon_threadsafe(self._tell, batch)

    def _tell(self, batch: Sequence[Underway]) -> None:
        """Give the answers, all of a batch in one turn of the loop."""
        for asked in batch:
            if asked.told:
                continue
            asked.end()
            stages = asked.stages()
            if not isinstance(asked.answer, Exception):
                self._observer.predicted(asked.model.name, asked.adjustment.method, len(asked.items), stages)
            asked.done(asked.answer, stages)

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
