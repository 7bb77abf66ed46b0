"""Whether the service could answer now: found by doing it, not by asking whether parts exist."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final, NoReturn

from service.core.exceptions import Unavailable

if TYPE_CHECKING:
    from service.core.models import LoadedModel, Models
    from service.core.ports import Observer, Store

EVERY_S: Final = 5.0

_log = logging.getLogger(__name__)


class Readiness:
    """Asks the default model for a sign of life, a good batch or a canary, and writes to the store."""

    def __init__(self, models: Models, store: Store, observer: Observer) -> None:
        self._models = models
        self._store = store
        self._observer = observer
        self._ready = True

    async def check(self) -> LoadedModel:
        """Return the default model if the service could answer now. Raises Unavailable with the reason.

        A full queue is ready, for a refusal to take more is an answer.
        """
        try:
            loaded = self._models.get(None)
            for outcome in await asyncio.gather(
                loaded.check(), self._store.check_writable(), return_exceptions=True
            ):
                if outcome is not None:
                    raise outcome
        except Unavailable as reason:
            self._found(False, reason.detail)
            raise
        self._found(True, "ready")
        return loaded

    async def check_all(self) -> None:
        """Return if every model could answer now, also those that the default's callers never ask for.

        A good bundle that nothing here can run counts: whoever names it gets a 503. One that is refused for
        what it is counts as no model. Raises Unavailable with the first reason.
        """
        others = [model for model in self._models.all() if model is not self._models.default]
        await asyncio.gather(self.check(), *(model.check() for model in others))
        for entry in self._models.refused:
            if entry.name is not None:
                self._models.get(entry.name)

    async def watch(self, every_s: float = EVERY_S) -> NoReturn:
        """Look now and then until cancelled, so that the metrics tell the truth where nobody probes."""
        while True:
            try:
                await self.check()
            except Unavailable as reason:
                _log.debug("not ready: %s", reason.detail)
            await asyncio.sleep(every_s)

    def _found(self, ready: bool, reason: str) -> None:
        self._observer.looked_ready(ready)
        if ready != self._ready:
            _log.log(logging.INFO if ready else logging.ERROR, "ready" if ready else f"not ready: {reason}")
            self._ready = ready
