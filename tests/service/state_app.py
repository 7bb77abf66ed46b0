"""The smallest application around the routes that live from the store: real parts, no engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from service.api import feedback, monitor, predictions, priors, problems
from service.api.bodies import Intake
from service.api.parameters import only_known_parameters
from service.api.tokens import Tokens, may_predict
from service.core.models import LoadedModel, Models
from service.core.monitor import Monitor
from service.core.parts import Parts
from service.core.priors import Priors
from service.core.records import ModelVersion
from tests.contracts.calls import run
from tests.recorded import TurnedClock
from tests.service.stores import opened


class Counted:
    """An observer that remembers what it was told."""

    def __init__(self) -> None:
        self.receipts: list[Any] = []

    def predicted(self, model: str, method: str, images: int, stages: Any) -> None:
        raise AssertionError("nothing here predicts")

    def learned(self, receipt: Any) -> None:
        self.receipts.append(receipt)


@contextmanager
def serving(
    folder: Path, *models: ModelVersion, clock: TurnedClock, tokens: Tokens | None = None
) -> Iterator[TestClient]:
    """Answer requests on a store in `folder`; the client's `parts` are the parts behind it."""
    with opened(folder, clock) as store:
        held = Priors(store, clock)
        for one in models:
            run(store.register_model(one, clock()))
        run(held.load({one.label_set: one.labels for one in models}))
        app = FastAPI()
        app.state.tokens = tokens or Tokens(None, None)
        app.state.intake = Intake(max_body_bytes=1 << 25, max_held_bytes=1 << 28)
        unused: Any = None
        app.state.parts = Parts(
            models=Models([LoadedModel(one, unused, unused, unused) for one in models]),
            predictor=unused,
            priors=held,
            monitor=Monitor(store, held, clock),
            store=store,
            readiness=unused,
            clock=clock,
            observer=Counted(),
        )
        problems.install(app)
        for router in (priors.router, feedback.router, predictions.router, monitor.router):
            app.include_router(router, dependencies=[Depends(may_predict), Depends(only_known_parameters)])
        with TestClient(app, raise_server_exceptions=True) as client:
            client.parts = app.state.parts
            yield client
