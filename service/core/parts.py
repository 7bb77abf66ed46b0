"""What the routes may use, built once in `service.app` and handed to every request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.core.models import Models
    from service.core.monitor import Monitor
    from service.core.ports import Clock, Observer, Store
    from service.core.predict import Predictor
    from service.core.priors import Priors
    from service.core.readiness import Readiness


@dataclass(frozen=True)
class Parts:
    """The service's parts. Each is usable once built, and closed by the application's lifespan."""

    models: Models
    predictor: Predictor
    priors: Priors
    monitor: Monitor
    store: Store
    readiness: Readiness
    clock: Clock
    observer: Observer
