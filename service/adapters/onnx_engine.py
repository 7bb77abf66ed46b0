"""Runs serving graphs in ONNX Runtime, and says truly what it runs them on: the only file that imports it.

Asking for a provider is not getting it: without its libraries ONNX Runtime logs a line and runs on the CPU.
So a GPU session forbids the CPU, is asked what it became, and has run every batch size before it is taken.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import io
import logging
import math
import os
import re
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from service.core.ports import DeviceLostError, EngineError, EngineOutput

# The import alone would write a device id under the home folder and look a collector up.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from service.adapters.serving_graph import ServingGraph

Provider = Literal["cpu", "cuda", "tensorrt"]
Choice = Literal["auto", "cpu", "cuda", "tensorrt"]

_log = logging.getLogger("tare.engine")
_CPU_MAX: Final = Path("/sys/fs/cgroup/cpu.max")
_VERSION: Final = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
_SPIN_IS_LIMITED: Final = (1, 26)
_WORTHWHILE: Final = 0.9  # of the time of one thread: below that a second session pays for its memory
_MEASURING_S: Final = 0.15
_WHEELS: Final = ("onnxruntime", "onnxruntime-gpu")
_NAMES: Final[dict[Provider, str]] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_CUDA_OPTIONS: Final = {
    "cudnn_conv_algo_search": "HEURISTIC",  # exhaustive search costs half a second for each new shape
    "arena_extend_strategy": "kSameAsRequested",  # what it takes it never gives back
}
# Errors after which CUDA refuses every further call of the process, by number and by words (the Runtime API
# calls them sticky: the only remedy is another process).
_POISONED: Final = re.compile(
    r"CUDA (?:failure|error):? ?(?:46|214|220|226|700|70[2-9]|71[0-9]|999)\b"
    r"|illegal memory access|device-side assert|unspecified launch failure|uncorrectable ECC"
    r"|misaligned address|illegal instruction|invalid program counter|launch timed out|device is lost",
    re.IGNORECASE,
)
# ONNX Runtime's exceptions share no base of their own.
_FAILURES: Final[tuple[type[Exception], ...]] = (
    RuntimeError,
    ValueError,
    *(
        kind
        for kind in vars(onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
)


class ProviderError(EngineError):
    """What was asked to run the network cannot be had here."""


def installed_wheel() -> str:
    """Return which of onnxruntime and onnxruntime-gpu is installed, with its version.

    Both write one folder, so that of two one is broken and pip does not say so. Raises EngineError with one
    line that says what to do, unless exactly one is there.
    """
    found = []
    for wheel in _WHEELS:
        try:
            found.append(f"{wheel} {importlib.metadata.version(wheel)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if len(found) != 1:
        have = "both are" if found else "neither is"
        raise EngineError(
            f"exactly one of {' and '.join(_WHEELS)} must be installed, {have}; uninstall what is there of "
            "them, then install tare with the extra cpu or gpu"
        )
    return found[0]


class OnnxEngine:
    """One session, safe from many threads: each `run` computes on the calling thread (and the GPU).

    On a CPU a second session may stand beside it, whose runs spread over more threads: for runs that are
    alone.
    """

    def __init__(
        self,
        graph: ServingGraph,
        provider: Provider,
        *,
        largest_batch: int,
        threads: int = 1,
        lone_threads: int | None = 1,
    ):
        """Load and warm up. `threads` is what one `run` spreads over; callers in parallel use cores better.

        `lone_threads` is what one spreads over that is alone, on a CPU; None is all cores if that is measured
        to be faster.

        Raises ProviderError where the provider cannot be had, EngineError where the graph does not run.
        """
        self._graph = graph
        self._provider = provider
        self._sizes = _batch_sizes(provider, largest_batch)
        self.largest_run_s = 0.0
        if _NAMES[provider] not in onnxruntime.get_available_providers():
            raise ProviderError(f"this onnxruntime is built without {provider}; install the extra gpu")
        missing = [] if provider == "cpu" else _missing_libraries()
        try:
            self._session = _session(graph.model, provider, threads)
            granted = self._session.get_providers()[0]
            if granted != _NAMES[provider]:
                raise ProviderError(
                    "; ".join([f"{provider} was asked for, onnxruntime runs on {granted}", *missing])
                )
            for size in self._sizes:
                started = time.perf_counter()
                self._warm_up(self._session, size)
                self.largest_run_s = time.perf_counter() - started
            self._lone = self._session
            if provider == "cpu" and lone_threads != 1:
                self._lone = self._faster_alone(threads, lone_threads)
        except _FAILURES as failure:
            kind = EngineError if provider == "cpu" else ProviderError
            reason = "; ".join(missing) or _reason(failure)  # a missing library shows as something else
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
            session = self._lone if alone else self._session
            return self._run(session, pixels, offsets, rows, top_k, factors=factors)
        except _FAILURES as failure:
            kind = (
                DeviceLostError if self._provider != "cpu" and _POISONED.search(str(failure)) else EngineError
            )
            raise kind(f"the network failed: {_reason(failure)}") from failure

    def _run(
        self,
        session: onnxruntime.InferenceSession,
        pixels: NDArray[Any],
        offsets: NDArray[np.float64],
        rows: NDArray[np.int64],
        top_k: int,
        *,
        factors: NDArray[np.float64] | None = None,
    ) -> EngineOutput:
        graph, names = self._graph, self._graph.inputs
        images = len(pixels)
        # A row less its largest entry is small where it matters, so float32 keeps the winners exact however
        # far tau spreads the classes; the constant changes no rank and comes back in float64 below.
        shifts = offsets.max(axis=1)
        scales = None
        if factors is not None:
            # A row divided by its largest factor keeps its ranks, and each score its own precision.
            scales = factors.max(axis=1, keepdims=True)
            shifts[(factors != 1).any(axis=1)] = 0
            factors, offsets = factors / scales, offsets / scales
        centred = (offsets - shifts[:, None]).astype(np.float32)
        padded, padded_rows = self._padded(pixels, rows)
        out = graph.outputs
        indices, scores, log_sum, plain_index, plain_score, plain_log_sum, logits = (
            array[:images]
            for array in session.run(
                [
                    out.indices,
                    out.scores,
                    out.log_sum,
                    out.unadjusted_index,
                    out.unadjusted_score,
                    out.unadjusted_log_sum,
                    out.logits,
                ],
                {
                    names.pixels: padded,
                    names.factors: np.ones_like(centred) if factors is None else factors.astype(np.float32),
                    names.offsets: centred,
                    names.rows: padded_rows,
                    names.top_k: np.array([min(top_k, graph.n_classes)], dtype=np.int64),
                },
            )
        )
        if logits.shape != (images, graph.n_classes):
            raise EngineError(f"the network gives logits of shape {logits.shape} for {images} images")
        whole = scores + shifts[rows][:, None]
        if scales is not None:
            whole *= scales[rows]
        plain = plain_score[:, 0] + np.float64(graph.unadjusted_shift)
        return EngineOutput(
            indices=indices,
            scores=whole,
            log_partition=whole[:, 0] / graph.temperature + log_sum,
            unadjusted_index=plain_index[:, 0],
            unadjusted_score=plain,
            unadjusted_log_partition=plain / graph.temperature + plain_log_sum,
            logits=logits,
        )

    def _padded(
        self, pixels: NDArray[Any], rows: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Fill a batch up to a size that was warmed up, where the provider tunes itself to each size."""
        if self._provider == "cpu":
            return pixels, rows
        missing = next((size for size in self._sizes if size >= len(pixels)), len(pixels)) - len(pixels)
        if not missing:
            return pixels, rows
        return np.concatenate([pixels, np.repeat(pixels[:1], missing, axis=0)]), np.concatenate(
            [rows, np.zeros(missing, dtype=np.int64)]
        )

    def _faster_alone(self, threads: int, lone_threads: int | None) -> onnxruntime.InferenceSession:
        """Return a session of more threads for runs that are alone; the usual one where that is no slower."""
        spread = cores() if lone_threads is None else lone_threads
        if spread == threads:
            return self._session
        lone = _session(self._graph.model, self._provider, spread, spin=True)
        self._warm_up(lone, 1)
        if lone_threads is not None:
            return lone
        one, many = self._shortest_runs(self._session, lone)
        _log.info("one image takes %.2f ms, %.2f ms spread over %d threads", one * 1e3, many * 1e3, spread)
        return lone if many < _WORTHWHILE * one else self._session

    def _shortest_runs(self, *sessions: onnxruntime.InferenceSession) -> list[float]:
        """Return the shortest of each session's runs of one image, taken in turns, in seconds."""
        shortest = [math.inf] * len(sessions)
        stop = time.perf_counter() + _MEASURING_S
        while time.perf_counter() < stop or math.inf in shortest:
            for place, session in enumerate(sessions):
                started = time.perf_counter()
                self._warm_up(session, 1)
                shortest[place] = min(shortest[place], time.perf_counter() - started)
        return shortest

    def _warm_up(self, session: onnxruntime.InferenceSession, size: int) -> None:
        noise, offsets = self._graph.input.noise(size), np.zeros((1, self._graph.n_classes))
        self._run(session, noise, offsets, np.zeros(size, dtype=np.int64), self._graph.n_classes)


def build(
    graph: ServingGraph,
    choice: Choice,
    *,
    largest_batch: int,
    threads: int = 1,
    lone_threads: int | None = 1,
) -> OnnxEngine:
    """Build an engine on the provider chosen; `auto` takes CUDA where it truly works, else the CPU.

    Takes and raises what OnnxEngine does: a provider that was named is had or refused, never replaced.
    """
    engine = partial(
        OnnxEngine, graph, largest_batch=largest_batch, threads=threads, lone_threads=lone_threads
    )
    if choice != "auto":
        return engine(choice)
    if _NAMES["cuda"] in onnxruntime.get_available_providers():
        try:
            return engine("cuda")
        except ProviderError as failure:
            _log.warning("CUDA is built in but not to be had, the CPU is taken: %s", failure)
    return engine("cpu")


def cores() -> int:
    """Return the cores this process may use: what it is pinned to, and what its container is allowed."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_MAX.read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, math.ceil(int(quota) / int(period))))


def _session(
    model: bytes, provider: Provider, threads: int, *, spin: bool = False
) -> onnxruntime.InferenceSession:
    """Return a session; `spin` lets its threads wait busily for a moment, ready for the next step."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; what fails is raised
    spin = spin and _VERSION >= _SPIN_IS_LIMITED  # before that it burns 25 ms of a core after every run
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if spin:
        options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
    providers: Sequence[str | tuple[str, dict[str, str]]]
    cuda = (_NAMES["cuda"], _CUDA_OPTIONS)
    if provider == "cpu":
        providers = [_NAMES["cpu"]]
    else:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        providers = [cuda] if provider == "cuda" else [_NAMES["tensorrt"], cuda]
    return onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)


def _missing_libraries() -> list[str]:
    """Load pip's CUDA and cuDNN, which are not on the system's path; say what was not found there.

    That alone is no failure: they may be on the system's path.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ["there is no NVIDIA driver (libcuda.so.1)"]
    with contextlib.redirect_stdout(io.StringIO()) as said:  # it prints what fails, and returns normally
        onnxruntime.preload_dlls()
    return [line for line in said.getvalue().splitlines() if line.startswith("Failed to load")]


def _batch_sizes(provider: Provider, largest: int) -> tuple[int, ...]:
    """The sizes to warm up. A GPU chooses its algorithms by shape, so there the sizes are a closed set."""
    if provider == "cpu":
        return tuple(sorted({1, largest}))
    return (*(1 << power for power in range((largest - 1).bit_length())), largest)


def _reason(failure: Exception) -> str:
    """One line of an ONNX Runtime message, without its source files and status numbers."""
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    line = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0])
    line = re.sub(r"/\S+\.(?:cc|cpp|h|cu):\d+\s*", "", line)
    line = line.partition(" ; GPU=")[0]  # behind it CUDA's failures name the host, a source file and its line
    return line[:300]
