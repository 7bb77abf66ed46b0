"""The parts that the core needs and does not know: engines and stores, by the least they must do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from datetime import datetime
    from uuid import UUID

    import numpy as np
    from numpy.typing import NDArray

    from service.core.records import (
        FeedbackItem,
        LabelledPredictions,
        ModelVersion,
        Prediction,
        PriorVersion,
        Receipt,
        Stages,
        StoredLogits,
        StoredPrediction,
    )


@dataclass(frozen=True, eq=False)
class EngineOutput:
    """What an engine answers for a batch of B images, K classes each, in the batch's order.

    `indices` int64 and `scores` float64 are (B, K), best first, ties to the lower index; `log_partition` is
    logsumexp(s / T), float64 (B,), and means nothing where a factor is not 1; `unadjusted_*` the same at
    tau = 0, one class each, (B,); `logits` is f, float32 (B, L). A row whose f is not finite means nothing;
    the others stand.
    """

    indices: NDArray[np.int64]
    scores: NDArray[np.float64]
    log_partition: NDArray[np.float64]
    unadjusted_index: NDArray[np.int64]
    unadjusted_score: NDArray[np.float64]
    unadjusted_log_partition: NDArray[np.float64]
    logits: NDArray[np.float32]


class Engine(Protocol):
    """Runs one bundle's network and ranks by per-row offsets. Usable once built; safe from many threads."""

    @property
    def provider(self) -> str:
        """What truly runs it: cpu, cuda or tensorrt."""

    def run(
        self,
        pixels: NDArray[Any],
        offsets: NDArray[np.float64],
        rows: NDArray[np.int64],
        top_k: int,
        *,
        factors: NDArray[np.float64] | None = None,
        alone: bool = False,
    ) -> EngineOutput:
        """Answer a batch: pixels uint8 (B, H, W, C), or rows of another kind.

        Row i is ranked by f * factors[rows[i]] + offsets[rows[i]], both (R, L); factors are above zero, None
        is for ones; neither changes afterwards, and the same arrays given again cost less. K is `top_k` cut
        to L. `alone` says that nothing else runs or waits, so that the cores are free. Blocks the calling
        thread. Raises EngineError where the engine itself fails.
        """


class EngineError(Exception):
    """The engine failed: no fault of the request."""


class DeviceLostError(EngineError):
    """The engine failed for good: nothing in this process will run on its device again."""


class Clock(Protocol):
    """Where the time comes from, so that a test can turn it."""

    def __call__(self) -> datetime:
        """The time now, in UTC."""


class Observer(Protocol):
    """Who counts what happened. Neither blocks nor raises."""

    def predicted(self, model: str, method: str, images: int, stages: Stages) -> None:
        """A request's images were decided and kept, and are answered now."""

    def shed(self, model: str, reason: str) -> None:
        """A request was refused because there is too much to do; `reason` is the refusal's code."""

    def dropped(self, model: str, reason: str) -> None:
        """A request under way was given up: `deadline` or `client-left`."""

    def learned(self, receipt: Receipt) -> None:
        """Feedback was taken."""

    def looked_ready(self, ready: bool) -> None:
        """Somebody looked whether the service is ready, and found this."""


class Recording(Protocol):
    """Predictions that are to be kept as long as somebody waits for them."""

    @property
    def predictions(self) -> Sequence[Prediction]:
        """What is to be kept."""

    @property
    def wanted(self) -> bool:
        """Whether it is still to be kept."""


class Store(Protocol):
    """The service's memory. Every coroutine that changes it returns after the commit, or raises.

    Raises service.core.exceptions.Unavailable where the disk does not take it.
    """

    async def register_model(self, model: ModelVersion, created: datetime) -> None:
        """Keep what replay needs of this model version; harmless when it is there."""

    async def model_versions(self, name: str) -> Sequence[ModelVersion]:
        """Every version of this model ever loaded, the latest loaded last."""

    def check_room(self, predictions: int, n_classes: int) -> None:
        """Raise Overloaded where so many more would be more than the store can have waiting."""

    def keep(self, recordings: Sequence[Recording], then: Callable[[Exception | None], None]) -> None:
        """Keep the predictions of those recordings that are wanted still when they are written.

        From any thread but the event loop's, for it may write itself; never refuses for want of room. `then`
        hears once, on whichever thread, that they survive a kill of the process from here on, or why they are
        not kept. It must not raise.
        """

    async def record(self, predictions: Sequence[Prediction]) -> None:
        """Keep predictions, as `keep` does, and return when they are."""

    async def prediction(self, prediction_id: UUID) -> StoredPrediction | None:
        """The prediction with its labels, or None."""

    async def current_priors(self) -> Sequence[PriorVersion]:
        """The current version of every name of every label set."""

    async def prior_version(self, label_set: str, name: str, version: int) -> PriorVersion | None:
        """One version of a name that is not deleted, or None."""

    async def prior_versions(self, label_set: str, name: str) -> Sequence[PriorVersion]:
        """All versions of a name that is not deleted, newest first; empty if there is none."""

    async def add_prior(self, prior: PriorVersion, replaces: int | None) -> PriorVersion:
        """Add a version if the current one is `replaces` (None: there is none); synced to disk.

        The store gives the version number (`prior.version` is ignored): one above every number that the name
        ever had. Raises Stale otherwise.
        """

    async def delete_prior(self, label_set: str, name: str, replaces: int) -> None:
        """Delete a name whose current version is `replaces`; synced to disk. Raises Stale otherwise."""

    async def learn(self, items: Sequence[FeedbackItem], received: datetime) -> Receipt:
        """Attach labels in order; synced to disk. The same label again changes nothing."""

    def labelled(
        self, model: ModelVersion, since: datetime | None, until: datetime | None, *, with_logits: bool
    ) -> AsyncIterator[LabelledPredictions]:
        """The labelled predictions of one model version, by half-open times of prediction.

        In blocks of bounded size, oldest first; logits are None unless they are asked for.
        """

    def recorded_logits(
        self, model: ModelVersion, since: datetime | None, until: datetime | None
    ) -> AsyncIterator[StoredLogits]:
        """The logits of every prediction of one model version, labelled or not, in such blocks of (n, L)."""

    async def traffic(
        self, model: ModelVersion, since: datetime | None, until: datetime | None
    ) -> NDArray[np.int64]:
        """How often one model version decided each class, labelled or not, (L,).

        By half-open times of prediction.
        """

    async def check_writable(self) -> None:
        """Write and commit something small; raises Unavailable with the reason."""
