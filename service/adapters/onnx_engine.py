"""An engine of ONNX Runtime: which sessions a graph runs in, and what their numbers mean.

It has run every batch size before it is taken, for only then is it known that the network runs here.
"""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

import numpy as np

from service.adapters import onnx_session
from service.adapters.onnx_session import (
    FAILURES,
    BoundRuns,
    PlainRuns,
    Provider,
    ProviderError,
    cores,
    is_poisoned,
    open_session,
    reason_of,
)
from service.adapters.serving_graph import with_constant_top_k
from service.core.ports import DeviceLostError, EngineError, EngineOutput

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from service.adapters.serving_graph import ServingGraph

Choice = Literal["auto", "cpu", "cuda", "tensorrt"]

_WORTHWHILE: Final = 0.95  # of the time of one thread: below that a second session pays for its memory
_MEASURING_S: Final = 0.1
_CONSTANT_TOP_K: Final = 10  # on a GPU; who wants more classes has them ranked from f

_log = logging.getLogger("tare.engine")


class Runs(Protocol):
    """Runs the serving graph: its outputs in their order. Raises FAILURES."""

    def __call__(
        self,
        pixels: NDArray[Any],
        factors: NDArray[np.float32],
        offsets: NDArray[np.float32],
        rows: NDArray[np.int64],
        top_k: int,
        /,
    ) -> list[NDArray[Any]]:
        """Run a batch: pixels (B, ...), factors and offsets (R, L), rows (B,), each image's place in them."""


class OnnxEngine:
    """Safe from many threads. On a CPU each `run` computes on its calling thread; a GPU does one at a time.

    On a CPU a second session may stand beside the first, whose runs spread over more threads: for runs that
    are alone.
    """

    def __init__(
        self,
        graph: ServingGraph,
        provider: Provider,
        *,
        largest_batch: int,
        threads: int = 1,
        lone_threads: int | None = 1,
        cache: Path | None = None,
    ):
        """Load and warm up. `threads` is what one `run` spreads over; callers in parallel use cores better.

        `lone_threads` is what one spreads over that is alone, on a CPU; None is all cores if that is measured
        to be faster. `cache` is a folder for what TensorRT builds.

        Raises ProviderError where the provider cannot be had, EngineError where the graph does not run.
        """
        self._graph = graph
        self._provider = provider
        self._largest_batch = largest_batch
        self._sizes = _batch_sizes(provider, largest_batch)
        self._last: _Table | None = None
        self.largest_run_s = 0.0
        if not onnx_session.is_built_in(provider):
            raise ProviderError(f"this onnxruntime is built without {provider}; install the extra gpu")
        missing = [] if provider == "cpu" else onnx_session.missing_libraries()
        try:
            if provider == "cpu":
                self._runs: Runs = PlainRuns(open_session(graph, "cpu", threads), graph)
                self._warm(self._runs)
                self._lone = self._runs if lone_threads == 1 else self._faster_alone(threads, lone_threads)
            else:
                self._graph = with_constant_top_k(graph, min(_CONSTANT_TOP_K, graph.n_classes))
                self._runs = self._lone = self._bound(threads, cache)
        except ProviderError as failure:
            raise ProviderError("; ".join([str(failure), *missing])) from failure
        except FAILURES as failure:
            kind = EngineError if provider == "cpu" else ProviderError
            reason = "; ".join(missing) or reason_of(failure)  # a missing library shows as something else
            raise kind(f"the network does not run on {provider}: {reason}") from failure

    @property
    def provider(self) -> Provider:
        """What truly runs the network."""
        return self._provider

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
        """Answer a batch: see service.core.ports.Engine. Raises DeviceLostError where the GPU is gone."""
        try:
            runs = self._lone if alone else self._runs
            return self._run(runs, pixels, offsets, rows, top_k, factors=factors)
        except FAILURES as failure:
            lost = self._provider != "cpu" and is_poisoned(failure)
            kind = DeviceLostError if lost else EngineError
            raise kind(f"the network failed: {reason_of(failure)}") from failure

    def _run(
        self,
        runs: Runs,
        pixels: NDArray[Any],
        offsets: NDArray[np.float64],
        rows: NDArray[np.int64],
        top_k: int,
        *,
        factors: NDArray[np.float64] | None = None,
    ) -> EngineOutput:
        graph, images, k = self._graph, len(pixels), min(top_k, self._graph.n_classes)
        table = self._last
        if table is None or table.offsets is not offsets or table.factors is not factors:
            table = self._last = _table(offsets, factors)
        indices, scores, log_sum, plain_index, plain_score, plain_log_sum, logits = runs(
            pixels, table.scaled, table.centred, rows, k
        )
        if logits.shape != (images, graph.n_classes):
            raise EngineError(f"the network gives logits of shape {logits.shape} for {images} images")
        whole = scores + table.shifts[rows][:, None]
        if table.scales is not None:
            whole *= table.scales[rows]
        log_partition = whole[:, 0] / graph.temperature + log_sum
        if k > scores.shape[1]:
            indices, whole = _best(logits, offsets[rows], None if factors is None else factors[rows], k)
        plain = plain_score[:, 0] + np.float64(graph.unadjusted_shift)
        return EngineOutput(
            indices=indices[:, :k],
            scores=whole[:, :k],
            log_partition=log_partition,
            unadjusted_index=plain_index[:, 0],
            unadjusted_score=plain,
            unadjusted_log_partition=plain / graph.temperature + plain_log_sum,
            logits=logits,
        )

    def _bound(self, threads: int, cache: Path | None) -> Runs:
        """Return runs on a GPU, each batch size recorded as a CUDA graph if the network lets it be."""
        try:
            return self._bound_runs(threads, cache, capture=True)
        except FAILURES as failure:
            if is_poisoned(failure):
                raise
            _log.info("the network cannot be recorded as a CUDA graph: %s", reason_of(failure))
        return self._bound_runs(threads, cache, capture=False)

    def _bound_runs(self, threads: int, cache: Path | None, *, capture: bool) -> Runs:
        session = open_session(
            self._graph, self._provider, threads, capture=capture, sizes=self._sizes, cache=cache
        )
        runs = BoundRuns(session, self._graph, self._sizes, capture=capture)
        self._warm(runs)  # may be spent on choosing algorithms and recording
        self._warm(runs)
        return runs

    def _warm(self, runs: Runs) -> None:
        """Run every size, and note how long the largest batch takes."""
        for size in self._sizes:
            started = time.perf_counter()
            self._warm_up(runs, size)
            self.largest_run_s = (time.perf_counter() - started) * self._largest_batch / size

    def _faster_alone(self, threads: int, lone_threads: int | None) -> Runs:
        """Return runs on more threads for those that are alone; the usual ones where that is no faster."""
        spread = cores() if lone_threads is None else lone_threads
        if spread == threads:
            return self._runs
        lone = PlainRuns(open_session(self._graph, "cpu", spread, spin=True), self._graph)
        self._warm_up(lone, 1)
        if lone_threads is not None:
            return lone
        one, many = self._shortest_runs(self._runs, lone)
        _log.info("one image takes %.2f ms, %.2f ms spread over %d threads", one * 1e3, many * 1e3, spread)
        return lone if many < _WORTHWHILE * one else self._runs

    def _shortest_runs(self, *all_runs: Runs) -> list[float]:
        """Return the shortest run of one image by each, taken in turns, in seconds."""
        shortest = [math.inf] * len(all_runs)
        stop = time.perf_counter() + _MEASURING_S
        while time.perf_counter() < stop or math.inf in shortest:
            for place, runs in enumerate(all_runs):
                started = time.perf_counter()
                self._warm_up(runs, 1)
                shortest[place] = min(shortest[place], time.perf_counter() - started)
        return shortest

    def _warm_up(self, runs: Runs, size: int) -> None:
        noise, offsets = self._graph.input.noise(size), np.zeros((1, self._graph.n_classes))
        self._run(runs, noise, offsets, np.zeros(size, dtype=np.int64), 1)


def build(
    graph: ServingGraph,
    choice: Choice,
    *,
    largest_batch: int,
    threads: int = 1,
    lone_threads: int | None = 1,
    cache: Path | None = None,
) -> OnnxEngine:
    """Build an engine on the provider chosen; `auto` takes CUDA where it truly works, else the CPU.

    Takes and raises what OnnxEngine does: a provider that was named is had or refused, never replaced.
    """
    engine = partial(
        OnnxEngine,
        graph,
        largest_batch=largest_batch,
        threads=threads,
        lone_threads=lone_threads,
        cache=cache,
    )
    if choice != "auto":
        return engine(choice)
    if onnx_session.is_built_in("cuda"):
        try:
            return engine("cuda")
        except ProviderError as failure:
            _log.warning("CUDA is built in but not to be had, the CPU is taken: %s", failure)
    return engine("cpu")


class _Table(NamedTuple):
    """The rows that a batch is ranked by, (R, L), as they were given and as the graph takes them."""

    offsets: NDArray[np.float64]
    factors: NDArray[np.float64] | None
    scaled: NDArray[np.float32]
    centred: NDArray[np.float32]
    shifts: NDArray[np.float64]  # (R,), what a row of `centred` lacks
    scales: NDArray[np.float64] | None  # (R, 1), what both were divided by


def _table(offsets: NDArray[np.float64], factors: NDArray[np.float64] | None) -> _Table:
    # A row less its largest entry is small where it matters, so float32 keeps the winners exact however
    # far tau spreads the classes; the constant changes no rank and comes back in float64.
    shifts, scales, centred, scaled = offsets.max(axis=1), None, offsets, factors
    if factors is not None:
        # A row divided by its largest factor keeps its ranks, and each score its own precision.
        scales = factors.max(axis=1, keepdims=True)
        shifts[(factors != 1).any(axis=1)] = 0
        scaled, centred = factors / scales, offsets / scales
    centred = (centred - shifts[:, None]).astype(np.float32)
    ones = np.ones_like(centred) if scaled is None else scaled.astype(np.float32)
    return _Table(offsets, factors, ones, centred, shifts, scales)


def _batch_sizes(provider: Provider, largest: int) -> tuple[int, ...]:
    """The sizes to warm up. A GPU chooses its algorithms by shape, so there the sizes are a closed set.

    A CPU takes any; it is shown that the network takes more than one, and not kept from its start for long.
    """
    if provider == "cpu":
        return (1,) if largest == 1 else (1, 2)
    return (*(1 << power for power in range((largest - 1).bit_length())), largest)


def _best(
    logits: NDArray[np.float32],
    offsets: NDArray[np.float64],
    factors: NDArray[np.float64] | None,
    k: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rank more classes than the graph does: the k best of f * factor + offset, ties to the lower index."""
    with np.errstate(invalid="ignore"):  # in rows that are not finite, which mean nothing
        scores = logits.astype(np.float64) * (1 if factors is None else factors) + offsets
    indices = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return indices, np.take_along_axis(scores, indices, axis=1)
