"""The models that are loaded, by name, and the bundles that were refused, by folder and reason."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from service.core.exceptions import NotFound, Unavailable
from service.core.ports import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bundle.manifest import Manifest
    from service.core.batcher import Batcher
    from service.core.decide import QueuedImage, ReadyImage
    from service.core.records import Decision, ModelVersion
    from service.core.watched import WatchedEngine

_FRESH_S: Final = 0.4  # with the canary's patience less than two seconds from a failure to its being known


class LoadedModel:
    """A bundle in service: what it says, what runs it, and the queue before it."""

    def __init__(
        self,
        version: ModelVersion,
        manifest: Manifest,
        engine: WatchedEngine,
        batcher: Batcher[QueuedImage, ReadyImage, Decision],
    ) -> None:
        """`engine` is the one that the batcher's batches run on."""
        self.version = version
        self.manifest = manifest
        self.engine = engine
        self.batcher = batcher
        self._canary: asyncio.Future[None] | None = None

    @property
    def name(self) -> str:
        """The name in requests and answers."""
        return self.version.name

    @property
    def ready(self) -> bool:
        """Whether the last that is known of the engine is good; `check` finds out what is true now."""
        return self.batcher.alive and not self.engine.stuck and self.engine.failure is None

    async def check(self) -> None:
        """Return if the engine works: a batch has just gone well, or a canary does now.

        A canary is a run of blank images beside the queue, as many as failed where a batch has failed. A full
        queue is no failure. An engine that hangs holds one canary, however often it is asked, on a thread of
        its own, so that it cannot hold up the end of the process. Raises Unavailable with the reason.
        """
        engine = self.engine
        if not self.batcher.alive:
            raise Unavailable("engine-failed", f"A worker of {self.name} has ended; restart the service.")
        if engine.stuck:
            raise self._silent()
        if engine.failure is None and engine.good_age_s < _FRESH_S:
            return
        if self._canary is None or self._canary.done():
            self._canary = asyncio.get_running_loop().create_future()
            images = 1 if engine.failure is None else engine.failure.images
            arguments = (self._canary, images)
            threading.Thread(target=self._run_blank, args=arguments, name="canary", daemon=True).start()
        try:
            await asyncio.wait_for(asyncio.shield(self._canary), engine.patience_s)
        except TimeoutError as failure:
            raise self._silent() from failure
        except EngineError as failure:
            raise Unavailable("engine-failed", f"The engine of {self.name} failed: {failure}.") from failure

    def _silent(self) -> Unavailable:
        return Unavailable("engine-silent", f"The engine of {self.name} does not answer.")

    def _run_blank(self, canary: asyncio.Future[None], images: int) -> None:
        failure: EngineError | None = None
        try:
            self.engine.run(
                self.manifest.input.noise(images),
                np.zeros((1, len(self.version.labels))),
                np.zeros(images, dtype=np.int64),
                1,
            )
        except EngineError as error:
            failure = error

        def settle() -> None:
            if canary.cancelled():
                return
            if failure is None:
                canary.set_result(None)
            else:
                canary.set_exception(failure)

        loop = canary.get_loop()
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle)


@dataclass(frozen=True)
class RefusedBundle:
    """A folder that is not served. `name` stands where the bundle is good but nothing here can run it."""

    folder: str
    code: str
    detail: str
    name: str | None = None


class Models:
    """The models by name; the default is the one asked for, else the first name in alphabetical order."""

    def __init__(
        self,
        loaded: Sequence[LoadedModel],
        refused: Sequence[RefusedBundle] = (),
        default: str | None = None,
    ) -> None:
        """`default` names a model; one that is not there leaves no default: another never stands in."""
        self._by_name = {model.name: model for model in sorted(loaded, key=lambda model: model.name)}
        self.refused = tuple(refused)
        self._wanted = default

    @property
    def default(self) -> LoadedModel | None:
        """The model that answers where a request names none; None if it does not load."""
        if self._wanted is not None:
            return self._by_name.get(self._wanted)
        return next(iter(self._by_name.values()), None)

    @property
    def missing(self) -> str | None:
        """One sentence on why there is no default model; None if there is."""
        if self.default is not None:
            return None
        if self._wanted is None:
            what, reasons = "No model loads", self.refused
        else:
            what = f"The model {self._wanted!r} does not load"
            reasons = tuple(entry for entry in self.refused if self._wanted in (entry.name, entry.folder))
        if not reasons:
            return f"{what}: there is no such bundle." if self._wanted else f"{what}: there is no bundle."
        return f"{what}: {reasons[0].folder}: {reasons[0].detail}."

    def get(self, name: str | None = None) -> LoadedModel:
        """Return the model of that name, None for the default.

        Raises NotFound for a name that is not there, Unavailable for one that cannot run here and where the
        default is missing.
        """
        if name is None:
            if self.default is None:
                raise Unavailable("no-model", self.missing or "No model loads.")
            return self.default
        if name in self._by_name:
            return self._by_name[name]
        for entry in self.refused:
            if entry.name == name:
                raise Unavailable(entry.code, f"The model {name!r} cannot run: {entry.detail}.")
        raise NotFound(
            "model-not-found", f"There is no model {name[:64]!r}; GET /models lists those there are."
        )

    def all(self) -> tuple[LoadedModel, ...]:
        """Every loaded model, by name."""
        return tuple(self._by_name.values())

    async def stop(self, grace_s: float = 30) -> None:
        """Answer what waits and end every model's threads."""
        await asyncio.gather(*(asyncio.to_thread(model.batcher.stop, grace_s) for model in self.all()))
