"""Whether the service could answer now: found by doing it, not by asking whether parts exist."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import numpy as np

from service.core.exceptions import Unavailable
from service.core.ports import EngineError

if TYPE_CHECKING:
    from service.core.models import LoadedModel, Models
    from service.core.ports import Store

PATIENCE_S: Final = 5.0


class Readiness:
    """Runs the default model on a blank image, beside its queue, and writes to the store.

    A full queue is ready, for a refusal is an answer; so the canary does not stand in the queue. Probes that
    come together share one look, so that many of them cost no more than one.
    """

    def __init__(self, models: Models, store: Store, *, patience_s: float = PATIENCE_S) -> None:
        self._models = models
        self._store = store
        self._patience_s = patience_s
        self._look: asyncio.Task[LoadedModel] | None = None

    async def check(self) -> LoadedModel:
        """Return the default model if the service could answer now. Raises Unavailable with the reason."""
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(self._looked())
        try:
            # Shielded: a look that hangs goes on and is waited for again, rather than started again.
            return await asyncio.wait_for(asyncio.shield(self._look), self._patience_s)
        except TimeoutError:
            raise Unavailable(
                "not-answering",
                f"The default model or the store did not answer within {self._patience_s:g} s.",
            ) from None

    async def _looked(self) -> LoadedModel:
        loaded = self._models.get(None)
        if not loaded.batcher.alive:
            raise Unavailable(
                "engine-failed", "A thread of the default model has ended; restart the service."
            )
        await asyncio.to_thread(_canary, loaded)
        await self._store.check_writable()
        return loaded


def _canary(loaded: LoadedModel) -> None:
    n_classes = len(loaded.version.labels)
    shape = (1, loaded.input.height, loaded.input.width, loaded.input.channels)
    try:
        output = loaded.engine.run(
            np.zeros(shape, dtype=np.uint8), np.zeros((1, n_classes)), np.zeros(1, dtype=np.int64), 1
        )
    except EngineError as failure:
        raise Unavailable("engine-failed", f"The default model fails: {failure}.") from failure
    if not np.isfinite(output.logits).all():
        raise Unavailable("engine-failed", "The default model gives logits that are not finite.")
