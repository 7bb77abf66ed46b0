"""The one place that chooses the service's parts and wires them together."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn

from fastapi import Depends, FastAPI

from service.adapters import telemetry as telemetry_adapter
from service.adapters.bundles import load_all
from service.adapters.onnx_session import cores, installed_wheel
from service.adapters.sql_store import SqlStore
from service.adapters.telemetry import Telemetry
from service.api import (
    adjust,
    docs,
    document,
    feedback,
    health,
    models,
    monitor,
    predict,
    predictions,
    priors,
    problems,
    v2,
)
from service.api.bodies import Intake
from service.api.envelope import Envelope
from service.api.express import Express
from service.api.parameters import only_known_parameters
from service.api.tokens import Tokens, may_predict
from service.core.batcher import Capacity
from service.core.exceptions import Refusal, StateUnusable
from service.core.monitor import Monitor
from service.core.parts import Parts
from service.core.ports import EngineError
from service.core.predict import Predictor
from service.core.priors import Priors
from service.core.readiness import Readiness
from service.settings import StartError, collector_is_named

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator

    from pydantic import SecretStr

    from service.adapters.request_log import RequestLog
    from service.adapters.tracing import Traces
    from service.core.models import LoadedModel, Models
    from service.settings import Settings

_GUARDED: Final = (
    predict.router,
    adjust.router,
    models.router,
    priors.router,
    feedback.router,
    predictions.router,
    monitor.router,
    *v2.routers,
)
_OPEN: Final = (health.router, v2.health, docs.router)

# What the exit code says when the device is lost: an internal software error, by sysexits.h.
_DEVICE_LOST: Final = 70

# What batches under way may still take once the requests in flight have had their time.
_AFTER_DRAIN_S: Final = 2.0

# Bodies in flight: so many of the largest, and never less than this.
_HELD_BODIES: Final = 8
_HELD_BYTES: Final = 256 * 1024**2

_DESCRIPTION: Final = """\
Long-tailed image classifiers, served so that each request may choose how strongly, and for which mix of
labels, the training prior is subtracted: `s = f + b + tau * (log q - log p)`.

Every answer carries `X-Request-Id`. Whatever is refused is an RFC 9457 problem with a stable `code`.
"""

_log = logging.getLogger("tare.app")


def create_app(settings: Settings, request_log: RequestLog | None = None) -> FastAPI:
    """Return the application. Its lifespan opens the parts and closes them; StartError if it cannot.

    Every request has a line in `request_log`, where there is one.
    """
    traces = _traces()
    telemetry = Telemetry(request_log, traces)
    app = FastAPI(
        title="Tare",
        version=_version(),
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        # Its own would send what the short way never sees, and stack traces: ours are in adapters/tracing.py.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        lifespan=_lifespan,
    )
    app.state.settings = settings
    app.state.telemetry = telemetry
    app.state.traces = traces
    app.state.metrics = lambda: (telemetry.exposition(), telemetry_adapter.CONTENT_TYPE)
    app.state.tokens = Tokens(_revealed(settings.admin_token), _revealed(settings.predict_token))
    app.state.intake = Intake(
        max_body_bytes=settings.max_body_bytes,
        max_held_bytes=max(_HELD_BODIES * settings.max_body_bytes, _HELD_BYTES),
        patience_s=settings.body_s,
    )
    telemetry.watch_held_bytes(lambda: app.state.intake.held_bytes)
    problems.install(app)
    known = Depends(only_known_parameters)
    for router in _GUARDED:
        app.include_router(router, dependencies=[Depends(may_predict), known])
    for router in _OPEN:
        app.include_router(router, dependencies=[known])
    app.add_middleware(Envelope, in_request=telemetry_adapter.in_request, report=telemetry.answered)
    _describe_once(app)
    return app


def express_of(app: FastAPI) -> Express:
    """Return the short way for plain predictions of an application whose lifespan has begun."""
    state = app.state
    return Express(state.parts, state.tokens, state.intake, state.telemetry.answered)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    async with open_parts(settings, app.state.telemetry) as parts:
        app.state.parts = parts
        yield
    if app.state.traces is not None:
        await asyncio.to_thread(app.state.traces.close)


@asynccontextmanager
async def open_parts(settings: Settings, telemetry: Telemetry) -> AsyncIterator[Parts]:
    """Open the state, load the models, and close both at the end. Raises StartError."""
    async with contextlib.AsyncExitStack() as at_end:
        with _start_errors():
            wheel = installed_wheel()
            store = SqlStore(
                settings.state_dir,
                keep_days=settings.keep_days,
                max_bytes=settings.state_max_bytes,
                clock=_now,
                listen=telemetry.committed,
            )
            at_end.callback(store.close)
            capacity = Capacity(
                workers=settings.workers or cores(),
                queue_items=settings.queue_images,
                queue_bytes=settings.queue_bytes,
            )
            loaded = load_all(
                settings.models_dir,
                capacity=capacity,
                default=settings.model,
                provider=settings.provider,
                run_threads=settings.run_threads,
                lone_threads=settings.lone_threads,
                cache=settings.state_dir / "tensorrt",
                max_pixels=settings.max_pixels,
                listen=telemetry.batch_ran,
                lost=_end_the_process,
            )
            at_end.push_async_callback(loaded.stop, _AFTER_DRAIN_S)
            for model in loaded.all():
                await store.register_model(model.version, _now())
            target_priors = Priors(store, _now)
            await target_priors.load({one.version.label_set: one.version.labels for one in loaded.all()})
        readiness = Readiness(loaded, store, telemetry)
        await at_end.enter_async_context(_running(readiness.watch()))
        deadline_s = settings.deadline_ms / 1000
        _show(telemetry, loaded, target_priors)
        telemetry.limited_to(capacity.queue_items, capacity.queue_bytes, deadline_s)
        _log.info("parts open", extra={"fields": {"runtime": wheel, "missing": loaded.missing}})
        yield Parts(
            models=loaded,
            predictor=Predictor(
                store,
                target_priors,
                _now,
                telemetry,
                default_tau=settings.tau,
                record=settings.record,
                deadline_s=deadline_s,
            ),
            priors=target_priors,
            monitor=Monitor(store, target_priors, _now, default_tau=settings.tau),
            store=store,
            readiness=readiness,
            clock=_now,
            observer=telemetry,
        )


def _end_the_process(reason: str) -> None:
    """End at once, for whoever supervises to start another: nothing in this one will run on the device again.

    Without unwinding, since threads may hang in the driver; the state survives it as it survives kill -9.
    """
    _log.critical("the device is lost, the process ends: %s", reason)
    logging.shutdown()
    os._exit(_DEVICE_LOST)


def _show(telemetry: Telemetry, loaded: Models, target_priors: Priors) -> None:
    """Let the metrics show what is loaded, and read what changes at each scrape."""
    for model in loaded.all():
        version = model.version
        telemetry.model_loaded(model.name, version.version, model.engine.provider, model is loaded.default)
        telemetry.watch_queue(model.name, partial(_queued, model), partial(_queued_bytes, model))
    telemetry.bundles_refused(len(loaded.refused))
    label_sets = {model.version.label_set for model in loaded.all()}
    telemetry.watch_priors(lambda: [one for owner in label_sets for one in target_priors.all(owner)])


@asynccontextmanager
async def _running(work: Coroutine[Any, Any, NoReturn]) -> AsyncIterator[None]:
    """Run this beside the block, and end it with the block."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.contextmanager
def _start_errors() -> Iterator[None]:
    try:
        yield
    except (StateUnusable, EngineError, Refusal) as failure:
        raise StartError(str(failure)) from failure


def _queued(model: LoadedModel) -> int:
    return model.batcher.queued_items


def _queued_bytes(model: LoadedModel) -> int:
    return model.batcher.queued_bytes


def _now() -> datetime:
    return datetime.now(UTC)


def _version() -> str:
    try:
        return importlib.metadata.version("tare")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return "0+checkout"


def _traces() -> Traces | None:
    """Return what makes traces, where the environment names a collector and the extra is installed."""
    if not collector_is_named():
        return None
    try:
        from service.adapters.tracing import Traces  # noqa: PLC0415 - what is not asked for costs nothing
    except ModuleNotFoundError as failure:
        _log.warning("no traces: a collector is named, and the extra tracing is missing: %s", failure)
        return None
    return Traces(_version())


def _revealed(token: SecretStr | None) -> str | None:
    return None if token is None else token.get_secret_value()


def _describe_once(app: FastAPI) -> None:
    """Make the OpenAPI document on first use, with what FastAPI cannot see in the routes."""

    def openapi() -> dict[str, object]:
        if app.openapi_schema is None:
            app.openapi_schema = document.describe(app, [*_GUARDED, *_OPEN])
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
