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
import os
import re
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from service.core.ports import EngineError, EngineOutput

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
    """One session, safe from many threads: each `run` computes on the calling thread (and the GPU)."""

    def __init__(self, graph: ServingGraph, provider: Provider, *, largest_batch: int, threads: int = 1):
        """Load and warm up. `threads` is what one `run` spreads over; callers in parallel use cores better.

        Raises ProviderError where the provider cannot be had, EngineError where the graph does not run.
        """
        self._graph = graph
        self._provider = provider
        self._sizes = _batch_sizes(provider, largest_batch)
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
                self._warm_up(size)
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
    ) -> EngineOutput:
        """Answer a batch: see service.core.ports.Engine."""
        try:
            return self._run(pixels, offsets, rows, top_k, factors)
        except _FAILURES as failure:
            raise EngineError(f"the network failed: {_reason(failure)}") from failure

    def _run(
        self,
        pixels: NDArray[Any],
        offsets: NDArray[np.float64],
        rows: NDArray[np.int64],
        top_k: int,
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
            for array in self._session.run(
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

    def _warm_up(self, size: int) -> None:
        offsets = np.zeros((1, self._graph.n_classes))
        self._run(
            self._graph.input.noise(size), offsets, np.zeros(size, dtype=np.int64), self._graph.n_classes
        )


def build(graph: ServingGraph, choice: Choice, *, largest_batch: int, threads: int = 1) -> OnnxEngine:
    """Build an engine on the provider chosen; `auto` takes CUDA where it truly works, else the CPU.

    Raises as OnnxEngine does: a provider that was named is had or refused, never replaced.
    """
    if choice != "auto":
        return OnnxEngine(graph, choice, largest_batch=largest_batch, threads=threads)
    if _NAMES["cuda"] in onnxruntime.get_available_providers():
        try:
            return OnnxEngine(graph, "cuda", largest_batch=largest_batch, threads=threads)
        except ProviderError as failure:
            _log.warning("CUDA is built in but not to be had, the CPU is taken: %s", failure)
    return OnnxEngine(graph, "cpu", largest_batch=largest_batch, threads=threads)


def _session(model: bytes, provider: Provider, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; what fails is raised
    for pool in ("intra_op", "inter_op"):  # spinning burns 25 ms of a core after every run
        options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
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
    return line[:300]
