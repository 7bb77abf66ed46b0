"""OpenTelemetry traces: a span for each request, and in it one for each stage.

Made of what the metrics are told after the answer, not measured a second time. Imported only where a
collector is named: importing OpenTelemetry, which comes with the extra `tracing`, takes time and memory.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.adapters.request_log import PROBES

if TYPE_CHECKING:
    from service.adapters.request_log import Answered

_CLOSING_S: Final = 2.0  # for the last spans; a collector that does not answer must not hold up a stop
_STAGES: Final = ("queue", "decode", "infer", "store")
_PARENTS: Final = TraceContextTextMapPropagator()


class Traces:
    """Makes spans of exchanges that are over.

    A thread of OpenTelemetry's own sends them, and drops what is too much.
    """

    def __init__(self, version: str) -> None:
        """Where to and how much the standard OTEL_ variables say; without them the service is called tare."""
        named = OTELResourceDetector().detect().attributes
        resource = Resource.create(
            {"service.name": named.get("service.name", "tare"), "service.version": version}
        )
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter()
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("tare")

    def add(self, exchange: Answered) -> None:
        """Make the spans of one exchange, which ends now. Probes and scrapes have none."""
        if exchange.route in PROBES:
            return
        end = time.time_ns()
        carried = {} if exchange.traceparent is None else {"traceparent": exchange.traceparent}
        span = self._tracer.start_span(
            f"{exchange.method} {exchange.route}",
            _PARENTS.extract(carried),
            SpanKind.SERVER,
            {
                "http.request.method": exchange.method,
                "http.route": exchange.route,
                "http.response.status_code": exchange.status,
                "tare.request_id": exchange.request_id,
            },
            start_time=end - _ns(exchange.seconds),
        )
        if exchange.code is not None:
            span.set_attribute("error.type", exchange.code)
        if exchange.status >= 500:
            span.set_status(StatusCode.ERROR)
        if exchange.stages is not None and span.is_recording():
            inside = set_span_in_context(span)
            start = end - _ns(exchange.stages.total_s)
            for name, seconds in zip(_STAGES, exchange.stages, strict=False):  # the last is their total
                stage = self._tracer.start_span(name, inside, start_time=start)
                start += _ns(seconds)
                stage.end(start)
        span.end(end)

    def close(self) -> None:
        """Send what is left, if that can be done soon, and end the thread that sends."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces-close", daemon=True)
        closing.start()
        closing.join(_CLOSING_S)
        if closing.is_alive():
            # It wakes the thread from its waiting to try again; its author left it without types.
            self._exporter.shutdown()  # type: ignore[no-untyped-call]
            closing.join(_CLOSING_S)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
