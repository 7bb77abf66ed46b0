"""Runs ONNX graphs on the CPU, to learn what they answer and to hold a changed graph to the original."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx

from bundle.manifest import TensorInput
from training.exceptions import first_line
from training.onnx_graph import GraphError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from onnx import ModelProto

    from bundle.manifest import ImageInput

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported, too late afterwards

BATCHES: Final = (1, 3, 32)  # at which a changed graph is held to the original


class Runner:
    """A graph in ONNX Runtime. `batch` is the only number of rows it takes, or None for any."""

    def __init__(self, model: ModelProto, outputs: Sequence[str], batch: int | None = None) -> None:
        """Raise GraphError where ONNX Runtime is missing or will not load the graph."""
        try:
            import onnxruntime  # noqa: PLC0415  (an extra, cpu or gpu, that need not be there)
        except ImportError as failure:
            raise GraphError("onnxruntime is not installed: pip install 'tare[cpu]'") from failure
        declared = {value.name for value in model.graph.output}
        whole = onnx.ModelProto()
        whole.CopyFrom(model)
        whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in declared)
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # int8 by exact kernels on any CPU, as in serving; without VNNI the usual ones would clip sums.
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.log_severity_level = 4  # what is wrong is raised; its log would break the one line
        # ONNX Runtime's exceptions share no base of their own.
        failures: tuple[type[Exception], ...] = (
            RuntimeError,
            ValueError,
            *(
                kind
                for kind in vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
                if isinstance(kind, type) and issubclass(kind, Exception)
            ),
        )
        try:
            self._session = onnxruntime.InferenceSession(
                whole.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except failures as failure:
            raise GraphError(f"ONNX Runtime does not load the graph: {first_line(failure)}") from failure
        self._failures = failures
        self._input = self._session.get_inputs()[0].name
        self._outputs = list(outputs)
        self._batch = batch

    def run(self, images: NDArray[Any]) -> list[NDArray[Any]]:
        """Return each output for a batch that the graph takes as it is. Raises GraphError."""
        try:
            answers = self._session.run(self._outputs, {self._input: images})
        except self._failures as failure:
            raise GraphError(
                f"the graph fails on a batch of {len(images)}: {first_line(failure)}"
            ) from failure
        if not all(isinstance(answer, np.ndarray) for answer in answers):
            raise GraphError("the graph's output is no tensor; it must be logits [batch, classes]")
        return list(answers)

    def one_by_one(self, images: NDArray[Any]) -> list[NDArray[Any]]:
        """Return each output with every image run by itself, repeated to the fixed batch if there is one."""
        rows = [self.run(np.repeat(images[i : i + 1], self._batch or 1, axis=0)) for i in range(len(images))]
        for answers in rows:
            for answer in answers:
                if not answer.ndim or len(answer) != (self._batch or 1):
                    raise GraphError(
                        f"the graph answers one image with shape {list(answer.shape)}; it must be"
                        " [batch, classes]"
                    )
        return [np.concatenate([answers[i][:1] for answers in rows]) for i in range(len(self._outputs))]


def network_input(pixels: NDArray[np.uint8], spec: ImageInput, dtype: str) -> NDArray[Any]:
    """Return uint8 images (B, H, W, C) as the network takes them: (p * scale - mean) / std, in its layout."""
    images = pixels[:, :, :, ::-1] if spec.colour == "BGR" else pixels
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    scaled = (images.astype(np.float32) * np.float32(spec.scale) - mean) / std
    ordered = scaled.transpose(0, 3, 1, 2) if spec.layout == "NCHW" else scaled
    return np.ascontiguousarray(ordered.astype(dtype))


def probes(spec: ImageInput | TensorInput, dtype: str) -> NDArray[Any]:
    """Return rows as the network takes them, as many as the largest batch; the same ones every time."""
    n = max(BATCHES)
    return spec.noise(n) if isinstance(spec, TensorInput) else network_input(_images(spec, n), spec, dtype)


def _images(spec: ImageInput, n: int) -> NDArray[np.uint8]:
    """Return images (n, H, W, C) that differ in brightness, colour and detail."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (n, 4, 4, spec.channels), dtype=np.uint8)
    down, across = np.arange(spec.height) * 4 // spec.height, np.arange(spec.width) * 4 // spec.width
    grain = rng.integers(-32, 33, (n, spec.height, spec.width, spec.channels))
    pixels: NDArray[np.uint8] = np.clip(
        coarse[:, down][:, :, across].astype(np.int64) + grain, 0, 255
    ).astype(np.uint8)
    return pixels


def check_batches(runner: Runner, images: NDArray[Any], expected: NDArray[Any]) -> float:
    """Hold the graph at batches of 1, 3 and 32 to the answers `expected`; return the largest difference.

    Raises GraphError where a batch fails, or changes an answer by more than rounding does.
    """
    scale = max(1.0, float(np.abs(expected).max()))
    allowed = scale * (2e-2 if np.float16 in (images.dtype, expected.dtype) else 1e-4)
    worst = 0.0
    again = "export the model again, in inference mode and with a batch of any size"
    for batch in BATCHES:
        try:
            rows = np.concatenate([runner.run(part)[0] for part in _cut(images, batch)])
        except GraphError as failure:
            raise GraphError(
                f"the graph is made for one batch size and fails at {batch}; {again}"
            ) from failure
        if rows.shape != expected.shape:
            raise GraphError(
                f"a batch of {batch} is answered with shape {list(rows.shape)}, not"
                f" {list(expected.shape)}; {again}"
            )
        difference = float(np.abs(rows.astype(np.float64) - expected).max())
        if not difference <= allowed:
            raise GraphError(
                f"in a batch of {batch} an image is answered otherwise than alone ({difference:.2g}); {again}"
            )
        worst = max(worst, difference)
    return worst


def _cut(images: NDArray[Any], batch: int) -> Iterator[NDArray[Any]]:
    return (images[start : start + batch] for start in range(0, len(images), batch))
