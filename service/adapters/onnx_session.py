"""ONNX Runtime's sessions, and what they truly run on: the only file that imports it.

Asking for a provider is not getting it: without its libraries ONNX Runtime logs a line and runs on the CPU.
So a GPU session forbids the CPU, and is asked what it became.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import io
import math
import os
import platform
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from service.core.ports import EngineError

# The import alone would write a device id under the home folder and look a collector up.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from service.adapters.serving_graph import ServingGraph

Provider = Literal["cpu", "cuda", "tensorrt"]

EXACT_INT8: Final = "session.x64quantprecision"

_CPU_MAX: Final = Path("/sys/fs/cgroup/cpu.max")
_CPU_INFO: Final = Path("/proc/cpuinfo")
_VNNI: Final = ("avx512_vnni", "avx_vnni")
_VERSION: Final = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
_SPIN_IS_LIMITED: Final = (1, 26)
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
# What ONNX Runtime raises: its exceptions share no base of their own.
FAILURES: Final[tuple[type[Exception], ...]] = (
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


def cores() -> int:
    """Return the cores this process may use: what it is pinned to, and what its container is allowed."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_MAX.read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, math.ceil(int(quota) / int(period))))


def is_built_in(provider: Provider) -> bool:
    """Whether this ONNX Runtime was built with it; whether it can be had is another question."""
    return _NAMES[provider] in onnxruntime.get_available_providers()


def saturates(machine: str, flags: set[str]) -> bool:
    """Whether the fast kernels for uint8 times int8 add up in 16 bits here and clip what is larger.

    So it is on x86 without VNNI. The exact kernels take twice the time, and with EXACT_INT8 ONNX Runtime
    would take them where VNNI is, too.
    """
    return machine.lower() in ("x86_64", "amd64") and not flags.intersection(_VNNI)


def _cpu_flags() -> set[str]:
    """Return what the processor says it can do; nothing where it cannot be read."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def open_session(
    graph: ServingGraph,
    provider: Provider,
    threads: int,
    *,
    spin: bool = False,
    capture: bool = False,
    sizes: Sequence[int] = (),
    cache: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Return a session that runs on `provider`, each run on so many threads.

    `spin` lets its threads wait busily for a run's next step. `capture` lets a GPU record each batch size as
    a CUDA graph. TensorRT builds an engine for `sizes`, kept under `cache`. Raises ProviderError where
    onnxruntime runs it on something else, or FAILURES.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised; a line of ONNX Runtime's own is no JSON
    spin = spin and _VERSION >= _SPIN_IS_LIMITED  # before that it burns 25 ms of a core after every run
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if saturates(platform.machine(), _cpu_flags()):
        options.add_session_config_entry(EXACT_INT8, "1")
    if spin:
        options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
        # Between runs the cores are wanted for the next request: waiting busily there costs a tenth of them.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    providers: Sequence[str | tuple[str, dict[str, str]]] = [_NAMES["cpu"]]
    if provider != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        cuda = (_NAMES["cuda"], {**_CUDA_OPTIONS, "enable_cuda_graph": "1" if capture else "0"})
        providers = [cuda]
        if provider == "tensorrt":
            providers = [(_NAMES["tensorrt"], _tensorrt_options(graph, sizes, cache)), cuda]
    session = onnxruntime.InferenceSession(graph.model, options, providers=providers, enable_fallback=0)
    granted = session.get_providers()[0]
    if granted != _NAMES[provider]:
        raise ProviderError(f"{provider} was asked for, onnxruntime runs on {granted}")
    return session


class PlainRuns:
    """Runs on the calling thread, from many at once, with arrays as they come."""

    def __init__(self, session: onnxruntime.InferenceSession, graph: ServingGraph) -> None:
        self._session = session
        self._graph = graph
        self._outputs = [name for name, _, _ in graph.output_shapes(1, 1)]

    def __call__(
        self,
        pixels: NDArray[Any],
        factors: NDArray[np.float32],
        offsets: NDArray[np.float32],
        rows: NDArray[np.int64],
        top_k: int,
    ) -> list[NDArray[Any]]:
        """Return the graph's outputs in their order. Raises FAILURES."""
        names = self._graph.inputs
        feed = {
            names.pixels: pixels,
            names.factors: factors,
            names.offsets: offsets,
            names.rows: rows,
            names.top_k: np.array([top_k], dtype=np.int64),
        }
        answers: list[NDArray[Any]] = self._session.run(self._outputs, feed)
        return answers


class BoundRuns:
    """Runs of a closed set of batch sizes on a device's buffers, which stay where they are: one at a time.

    A batch is filled up to the next size. For each size the device finds its algorithms once, and records the
    run as a CUDA graph where the session captures. The graph's K is a constant there.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        graph: ServingGraph,
        sizes: Sequence[int],
        *,
        device: str = "cuda",
        capture: bool = False,
    ) -> None:
        """Raises FAILURES where the device has no room."""
        self._lock = threading.Lock()
        self._batches = [
            _BoundBatch(session, graph, size, device, number if capture else None)
            for number, size in enumerate(sizes, start=1)
        ]

    def __call__(
        self,
        pixels: NDArray[Any],
        factors: NDArray[np.float32],
        offsets: NDArray[np.float32],
        rows: NDArray[np.int64],
        _top_k: int,
    ) -> list[NDArray[Any]]:
        """Return the graph's outputs in their order. Raises FAILURES."""
        batch = next(batch for batch in self._batches if batch.size >= len(pixels))
        with self._lock:
            return batch.run(pixels, factors[rows], offsets[rows])


class _BoundBatch:
    """The buffers of one batch size. Each image has a row of the table to itself: one size for all."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        graph: ServingGraph,
        size: int,
        device: str,
        graph_id: int | None,
    ) -> None:
        self.size = size
        self._session = session
        self._options = onnxruntime.RunOptions()
        if graph_id is not None:
            self._options.add_run_config_entry("gpu_graph_id", str(graph_id))
        names, n_classes = graph.inputs, graph.n_classes
        shapes: list[tuple[str, tuple[int, ...], Any]] = [
            (names.pixels, (size, *graph.input.row_shape), graph.input.dtype),
            (names.factors, (size, n_classes), np.float32),
            (names.offsets, (size, n_classes), np.float32),
            (names.rows, (size,), np.int64),
        ]
        self._host = [np.zeros(shape, dtype) for _, shape, dtype in shapes]
        self._host[3][:] = np.arange(size)
        self._binding = session.io_binding()
        self._inputs = []
        for (name, _, _), host in zip(shapes, self._host, strict=True):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(host, device, 0)
            self._binding.bind_ortvalue_input(name, value)
            self._inputs.append(value)
        self._outputs = []
        for name, shape, dtype in graph.output_shapes(size, graph.top_k or 1):
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, device, 0)
            self._binding.bind_ortvalue_output(name, value)
            self._outputs.append(value)

    def run(
        self, pixels: NDArray[Any], factors: NDArray[np.float32], offsets: NDArray[np.float32]
    ) -> list[NDArray[Any]]:
        """Copy in, run, copy out. What an earlier batch left in the rows behind is run along and cut off."""
        images = len(pixels)
        for host, value, given in zip(self._host, self._inputs, (pixels, factors, offsets), strict=False):
            host[:images] = given
            value.update_inplace(host)
        self._session.run_with_iobinding(self._binding, self._options)
        return [value.numpy()[:images] for value in self._outputs]


def missing_libraries() -> list[str]:
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


def is_poisoned(failure: Exception) -> bool:
    """Whether CUDA will refuse every further call of this process."""
    return _POISONED.search(str(failure)) is not None


def reason_of(failure: Exception) -> str:
    """One line of an ONNX Runtime message, without its source files and status numbers."""
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    line = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0])
    line = re.sub(r"\S+\.(?:cc|cpp|h|cu):\d+\s*", "", line)
    line = line.partition(" ; GPU=")[0]  # behind it CUDA's failures name the host, a source file and its line
    return line[:300]


def _tensorrt_options(graph: ServingGraph, sizes: Sequence[int], cache: Path | None) -> dict[str, str]:
    """One engine for every batch size, kept by what it is good for, since building it takes minutes."""
    names, row = graph.inputs, graph.input.row_shape

    def shapes(size: int) -> str:
        table = f"{size}x{graph.n_classes}"
        pixels = "x".join(str(side) for side in (size, *row))
        given = {names.pixels: pixels, names.factors: table, names.offsets: table, names.rows: str(size)}
        return ",".join(f"{name}:{shape}" for name, shape in given.items())

    options = {
        "trt_profile_min_shapes": shapes(sizes[0]),
        "trt_profile_opt_shapes": shapes(sizes[-1]),
        "trt_profile_max_shapes": shapes(sizes[-1]),
    }
    if cache is not None:
        # TensorRT puts the GPU's and its own version into the file's name.
        folder = cache / f"{hashlib.sha256(graph.model).hexdigest()[:16]}-ort-{onnxruntime.__version__}"
        folder.mkdir(parents=True, exist_ok=True)
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}
    return options
