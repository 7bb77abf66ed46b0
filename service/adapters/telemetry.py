"""What an operator sees from outside: metrics in a registry of the application's own, logs as JSON lines."""

from __future__ import annotations

import contextvars
import logging
import math
import sys
from bisect import bisect_left
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Protocol

import orjson
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.metrics_core import Metric

    from service.core.batcher import BatchReport
    from service.core.records import PriorVersion, Receipt, Stages

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

_request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)
_log = logging.getLogger("tare.requests")

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_COMMIT_SECONDS: Final = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_STAGE_SECONDS: Final = (
    *(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_STAGES: Final = ("queue", "decode", "infer", "store", "total")  # the fields of Stages, in their order
_SHED: Final = ("queue-full", "store-behind")
_DROPPED: Final = ("deadline", "client-left")
_PROBES: Final = frozenset({"/healthz", "/readyz", "/metrics"})
_IMAGES: Final = (1, 2, 4, 8, 16, 32, 64)


disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nothing here reads


class Answered(Protocol):
    """A request and what became of it; `code` is its problem's, None for a success."""

    @property
    def method(self) -> str: ...  # noqa: D102
    @property
    def route(self) -> str: ...  # noqa: D102
    @property
    def status(self) -> int: ...  # noqa: D102
    @property
    def seconds(self) -> float: ...  # noqa: D102
    @property
    def code(self) -> str | None: ...  # noqa: D102


class Telemetry:
    """The metrics of one application. Its methods are told what happened; they neither block nor raise."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "tare_requests", "Requests answered.", ["route", "method", "status"], registry=registry
        )
        self._request_seconds = Histogram(
            "tare_request_seconds",
            "Time from a request's first byte to its answer's last.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._problems = Counter(
            "tare_problems", "Requests answered with a problem, by its code.", ["code"], registry=registry
        )
        self._predictions = Counter(
            "tare_predictions", "Images decided.", ["model", "method"], registry=registry
        )
        self._batch_images = Histogram(
            "tare_batch_images", "Images in one engine run.", ["model"], buckets=_IMAGES, registry=registry
        )
        self._engine_seconds = Histogram(
            "tare_engine_seconds",
            "Time of one engine run.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._queue = Gauge(
            "tare_queue_images", "Images that wait for the engine.", ["model"], registry=registry
        )
        self._queue_bytes = Gauge(
            "tare_queue_bytes", "Bytes of images that wait for the engine.", ["model"], registry=registry
        )
        self._queue_limit = Gauge(
            "tare_queue_limit_images", "Images that may wait for one model at most.", registry=registry
        )
        self._queue_bytes_limit = Gauge(
            "tare_queue_limit_bytes",
            "Bytes of images that may wait for one model at most.",
            registry=registry,
        )
        self._deadline = Gauge(
            "tare_deadline_seconds", "Time allowed for a request that names none.", registry=registry
        )
        self._shed = Counter(
            "tare_shed_requests",
            "Requests refused because there was too much to do, by the code of the refusal.",
            ["model", "reason"],
            registry=registry,
        )
        self._dropped = Counter(
            "tare_dropped_requests",
            "Requests given up on their way: past their deadline, or their client left.",
            ["model", "reason"],
            registry=registry,
        )
        self._stages = _StageSeconds()
        registry.register(self._stages)
        self._held = Gauge("tare_held_body_bytes", "Bytes of request bodies in memory.", registry=registry)
        self._feedback = Counter(
            "tare_feedback", "Feedback items, by what became of them.", ["outcome"], registry=registry
        )
        self._models = Gauge(
            "tare_model_info",
            "A loaded model; the default one has default=true.",
            ["model", "version", "provider", "default"],
            registry=registry,
        )
        self._refused_bundles = Gauge(
            "tare_bundles_refused", "Bundles that did not load; GET /models says why.", registry=registry
        )
        self._ready = Gauge(
            "tare_ready",
            "1 where the last look (every five seconds, each /readyz) found it ready; NaN before the first.",
            registry=registry,
        )
        self._ready.set(math.nan)
        self._commit_seconds = Histogram(
            "tare_store_commit_seconds",
            "Time of one commit to the store.",
            buckets=_COMMIT_SECONDS,
            registry=registry,
        )
        for outcome in ("accepted", "corrected", "unchanged", "rejected"):
            self._feedback.labels(outcome)

    def answered(self, exchange: Answered) -> None:
        """Count a request and log it; probes and scrapes only where the log is at its finest."""
        self._requests.labels(exchange.route, exchange.method, str(exchange.status)).inc()
        self._request_seconds.labels(exchange.route).observe(exchange.seconds)
        if exchange.code is not None:
            self._problems.labels(exchange.code).inc()
        level = logging.DEBUG if exchange.route in _PROBES else logging.INFO
        if _log.isEnabledFor(level):
            fields: dict[str, object] = {
                "method": exchange.method,
                "route": exchange.route,
                "status": exchange.status,
                "ms": round(exchange.seconds * 1000, 2),
            }
            if exchange.code is not None:
                fields["code"] = exchange.code
            _log.log(level, "answered", extra={"fields": fields})

    def predicted(self, model: str, method: str, images: int, stages: Stages) -> None:
        """A request's images were decided and recorded. On the event loop's thread alone."""
        self._predictions.labels(model, method).inc(images)
        self._stages.observe(model, stages)

    def shed(self, model: str, reason: str) -> None:
        """A request was refused because there is too much to do."""
        self._shed.labels(model, reason).inc()

    def dropped(self, model: str, reason: str) -> None:
        """A request was given up on its way."""
        self._dropped.labels(model, reason).inc()

    def batch_ran(self, model: str, batch: BatchReport) -> None:
        """A batch is through; what nobody waited for, or could not be run, is no part of it."""
        images = batch.items - batch.failed - batch.dropped
        if images:
            self._batch_images.labels(model).observe(images)
            self._engine_seconds.labels(model).observe(batch.run_s)

    def learned(self, receipt: Receipt) -> None:
        """Feedback was taken."""
        self._feedback.labels("accepted").inc(receipt.accepted)
        self._feedback.labels("corrected").inc(receipt.corrected)
        self._feedback.labels("unchanged").inc(receipt.unchanged)
        self._feedback.labels("rejected").inc(len(receipt.rejected))

    def committed(self, seconds: float) -> None:
        """The store committed."""
        self._commit_seconds.observe(seconds)

    def looked_ready(self, ready: bool) -> None:
        """Somebody looked whether the service is ready, and found this."""
        self._ready.set(ready)

    def model_loaded(self, model: str, version: str, provider: str, default: bool) -> None:
        """A bundle was loaded."""
        self._models.labels(model, version, provider, str(default).lower()).set(1)
        self._predictions.labels(model, "logit-adjustment")
        self._predictions.labels(model, "none")
        self._batch_images.labels(model)
        self._engine_seconds.labels(model)
        self._stages.add(model)
        for reason in _SHED:
            self._shed.labels(model, reason)
        for reason in _DROPPED:
            self._dropped.labels(model, reason)

    def bundles_refused(self, count: int) -> None:
        """So many folders under the models directory did not load."""
        self._refused_bundles.set(count)

    def limited_to(self, queue_images: int, queue_bytes: int, deadline_s: float) -> None:
        """Every model's queue holds at most so much, and a request that names no deadline has this one."""
        self._queue_limit.set(queue_images)
        self._queue_bytes_limit.set(queue_bytes)
        self._deadline.set(deadline_s)

    def watch_queue(self, model: str, images: Callable[[], int], size_bytes: Callable[[], int]) -> None:
        """Read what waits in this queue at every scrape."""
        self._queue.labels(model).set_function(images)
        self._queue_bytes.labels(model).set_function(size_bytes)

    def watch_priors(self, current: Callable[[], Iterable[PriorVersion]]) -> None:
        """Read the current priors at every scrape."""
        self.registry.register(_PriorsInForce(current))

    def watch_held_bytes(self, held: Callable[[], int]) -> None:
        """Read the bytes of bodies in memory at every scrape."""
        self._held.set_function(held)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format. Takes milliseconds: call it in a thread."""
        return generate_latest(self.registry)


class _PriorsInForce(Collector):
    """Asked at every scrape, since names come and go."""

    def __init__(self, current: Callable[[], Iterable[PriorVersion]]) -> None:
        self._current = current

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "tare_priors_version", "Current version of each priors name.", labels=["label_set", "priors"]
        )
        for prior in self._current():
            family.add_metric([prior.label_set, prior.name], prior.version)
        yield family


class _StageSeconds(Collector):
    """Histograms of every stage of a request, at a tenth of the library's cost: one thread alone observes."""

    def __init__(self) -> None:
        self._counts: dict[str, list[list[int]]] = {}
        self._sums: dict[str, list[float]] = {}

    def add(self, model: str) -> None:
        """Show a model from the start, with nothing in it."""
        self._counts[model] = [[0] * (len(_STAGE_SECONDS) + 1) for _ in _STAGES]
        self._sums[model] = [0.0] * len(_STAGES)

    def observe(self, model: str, stages: Stages) -> None:
        """Count one request."""
        counts, sums = self._counts[model], self._sums[model]
        for place, seconds in enumerate(stages):
            counts[place][bisect_left(_STAGE_SECONDS, seconds)] += 1
            sums[place] += seconds

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(
            "tare_stage_seconds",
            "Time of a /predict request in each stage, by the batch that completed it; total is their sum.",
            labels=["model", "stage"],
        )
        bounds = [*(str(bound) for bound in _STAGE_SECONDS), "+Inf"]
        for model, counts in self._counts.items():
            for stage, inside, total in zip(_STAGES, counts, self._sums[model], strict=True):
                family.add_metric(
                    [model, stage], list(zip(bounds, accumulate(inside), strict=True)), sum_value=total
                )
        yield family


class JsonLines(logging.Formatter):
    """One JSON object a line, with the id of the request that it belongs to."""

    def format(self, record: logging.LogRecord) -> str:
        """Write the record; what stands in `extra={"fields": {...}}` becomes fields."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        current = _request_id.get()
        if current is not None:
            line["request_id"] = current
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


@contextmanager
def in_request(identity: str) -> Iterator[None]:
    """Mark every log line of the block with the request's id."""
    token = _request_id.set(identity)
    try:
        yield
    finally:
        _request_id.reset(token)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send every logger's records to stderr as JSON lines, replacing what was set up before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    logging.captureWarnings(True)
