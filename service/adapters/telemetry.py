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
from typing import TYPE_CHECKING, Final

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
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from service.core.records import Stages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.metrics_core import Metric

    from service.adapters.request_log import Answered, RequestLog
    from service.adapters.tracing import Traces
    from service.core.batcher import BatchReport
    from service.core.records import PriorVersion, Receipt

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

_request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_COMMIT_SECONDS: Final = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_STAGE_SECONDS: Final = (
    *(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_SHED: Final = ("queue-full", "store-behind")
_DROPPED: Final = ("deadline", "client-left")
_IMAGES: Final = (1, 2, 4, 8, 16, 32, 64)


disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nothing here reads


class Telemetry:
    """The metrics of one application. Its methods are told what happened; they neither block nor raise."""

    def __init__(self, request_log: RequestLog | None = None, traces: Traces | None = None) -> None:
        """Without `request_log` no request has a line in the log, without `traces` none has a trace."""
        self._request_log = request_log
        self._traces = traces
        registry = CollectorRegistry()
        self.registry = registry
        ProcessCollector(registry=registry)
        self._requests = _QuickCounter("tare_requests", "Requests answered.", ["route", "method", "status"])
        registry.register(self._requests)
        self._request_seconds = _QuickHistogram(
            "tare_request_seconds",
            "Time from a request's first byte to its answer's last.",
            ["route"],
            _SECONDS,
        )
        registry.register(self._request_seconds)
        self._problems = Counter(
            "tare_problems", "Requests answered with a problem, by its code.", ["code"], registry=registry
        )
        self._predictions = _QuickCounter("tare_predictions", "Images decided.", ["model", "method"])
        registry.register(self._predictions)
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
        self._stage_seconds = _QuickHistogram(
            "tare_stage_seconds",
            "Time of a request for predictions in each stage, by the batch that completed it.",
            ["model", "stage"],
            _STAGE_SECONDS,
        )
        self._stage_keys: dict[str, list[tuple[str, str]]] = {}
        registry.register(self._stage_seconds)
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
        """Count a request and log it. On the event loop's thread alone."""
        self._requests.inc((exchange.route, exchange.method, exchange.status))
        self._request_seconds.observe((exchange.route,), exchange.seconds)
        if exchange.code is not None:
            self._problems.labels(exchange.code).inc()
        if self._request_log is not None:
            self._request_log.add(exchange)
        if self._traces is not None:
            self._traces.add(exchange)

    def predicted(self, model: str, method: str, images: int, stages: Stages) -> None:
        """A request's images were decided and recorded. On the event loop's thread alone."""
        self._predictions.inc((model, method), images)
        for key, seconds in zip(self._stage_keys[model], stages, strict=True):
            self._stage_seconds.observe(key, seconds)

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
        self._predictions.inc((model, "logit-adjustment"), 0)
        self._predictions.inc((model, "none"), 0)
        self._batch_images.labels(model)
        self._engine_seconds.labels(model)
        self._stage_keys[model] = [(model, field.removesuffix("_s")) for field in Stages._fields]
        for key in self._stage_keys[model]:
            self._stage_seconds.show(key)
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


class _QuickCounter(Collector):
    """A counter at a tenth of the library's cost, because one thread alone counts."""

    def __init__(self, name: str, what: str, labels: list[str]) -> None:
        self._name = name
        self._what = what
        self._labels = labels
        self._counts: dict[tuple[object, ...], int] = {}

    def inc(self, key: tuple[object, ...], by: int = 1) -> None:
        """Count under these labels."""
        self._counts[key] = self._counts.get(key, 0) + by

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._what, labels=self._labels)
        for key, value in list(self._counts.items()):
            family.add_metric([str(part) for part in key], value)
        yield family


class _QuickHistogram(Collector):
    """A histogram of the same kind."""

    def __init__(self, name: str, what: str, labels: list[str], bounds: tuple[float, ...]) -> None:
        self._name = name
        self._what = what
        self._labels = labels
        self._bounds = bounds
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}

    def show(self, key: tuple[str, ...]) -> None:
        """Show these labels from now on, also while nothing is observed."""
        self._sums[key] = 0.0
        self._counts[key] = [0] * (len(self._bounds) + 1)

    def observe(self, key: tuple[str, ...], value: float) -> None:
        """Count one value under these labels."""
        counts = self._counts.get(key)
        if counts is None:
            self.show(key)
            counts = self._counts[key]
        counts[bisect_left(self._bounds, value)] += 1
        self._sums[key] += value

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._what, labels=self._labels)
        bounds = [*(str(bound) for bound in self._bounds), "+Inf"]
        for key, counts in list(self._counts.items()):
            buckets = list(zip(bounds, accumulate(counts), strict=True))
            family.add_metric(list(key), buckets, sum_value=self._sums[key])
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
