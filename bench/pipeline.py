"""What every server does with an image, and nothing else: decode, batch, run, top five.

The bare limit is a loop of this; the peers' apps call it from inside their frameworks. The decoder is the
service's own, so that nobody wins by theirs, and the pixels are normalised in the graph. No torch here.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from service.adapters.images import pixels

# As the service does before it imports it: it would look a collector up.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from bundle.manifest import ImageInput

TOP = 5


class Pipeline:
    """A network from uint8 pixels (B, H, W, 3) to logits (B, L), and what stands round it."""

    def __init__(self, model: Path | str, threads: int | None = None) -> None:
        """Load the network. `threads` computes each run on so many, without spinning; None: its own way."""
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        (entry,) = self._session.get_inputs()
        self._entry = entry.name
        self.row_shape: tuple[int, ...] = tuple(entry.shape[1:])
        height, width = self.row_shape[:2]
        # The decoder looks at no more of a manifest than this, and the peers have no use for the rest.
        self._spec = cast(
            "ImageInput",
            SimpleNamespace(height=height, width=width, colour="RGB", resize=SimpleNamespace(rule="stretch")),
        )

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """Return the pixels of a file, (H, W, 3)."""
        return pixels(data, self._spec)

    def run(self, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the logits of decoded images, (B, L)."""
        batch = images if isinstance(images, np.ndarray) else np.stack(images)
        logits: NDArray[np.float32] = self._session.run(None, {self._entry: batch})[0]
        return logits

    def answers(self, images: Sequence[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        """Return for each decoded image what goes out as JSON: its best classes with their probabilities."""
        indices, probabilities = top_five(self.run(images))
        return [
            {"top": [{"index": int(i), "probability": float(p)} for i, p in zip(*row, strict=True)]}
            for row in zip(indices, probabilities, strict=True)
        ]


def top_five(logits: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return the indices and probabilities of the five best classes of each row, best first, (B, 5)."""
    indices = np.argpartition(-logits, range(min(TOP, logits.shape[1])), axis=1)[:, :TOP]
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    best = np.take_along_axis(exponentials, indices, axis=1)
    return indices, best / exponentials.sum(axis=1, keepdims=True)
