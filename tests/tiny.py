"""A real bundle with a network small enough to compute by hand: logits = W @ mean colour + c."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from bundle.files import HOLDOUT, MODEL, Bundle, encode_holdout, write
from bundle.manifest import Calibration, ClassEntry, Dataset, Group, ImageInput, Loss, Manifest

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LABELS = ("red", "green", "blue", "grey")
COUNTS = (400, 100, 30, 5)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SIZE = 8


def weights(n_classes: int = 4, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """W (3, L) and c (L,): class i < 3 leans towards channel i."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(0, 0.3, (3, n_classes)).astype(np.float32)
    matrix[:, : min(3, n_classes)] += 2 * np.eye(3, min(3, n_classes), dtype=np.float32)
    return matrix, np.linspace(0.3, -0.3, n_classes, dtype=np.float32)


def network(n_classes: int = 4, seed: int = 0) -> onnx.ModelProto:
    """GlobalAveragePool -> Flatten -> Gemm, float32 NCHW, symbolic batch, opset 18, IR 10."""
    matrix, constant = weights(n_classes, seed)
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["features"]),
            helper.make_node("Gemm", ["features", "weight", "constant"], ["logits"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", n_classes])],
        [numpy_helper.from_array(matrix, "weight"), numpy_helper.from_array(constant, "constant")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return model


def logits(pixels: NDArray[np.uint8], n_classes: int = 4, seed: int = 0) -> NDArray[np.float64]:
    """What the network answers for uint8 pixels (B, SIZE, SIZE, 3), computed with NumPy, (B, L)."""
    matrix, constant = weights(n_classes, seed)
    scaled = (pixels.astype(np.float64) / 255 - np.array(MEAN)) / np.array(STD)
    return np.asarray(scaled.mean(axis=(1, 2)) @ matrix.astype(np.float64) + constant)


def manifest(name: str = "tiny", n_classes: int = 4, **changes: object) -> Manifest:
    """The manifest of the tiny bundle; `changes` replace its fields."""
    if n_classes == len(LABELS):
        labels, counts = LABELS, np.array(COUNTS)
    else:
        labels = tuple(f"class-{i}" for i in range(n_classes))
        counts = np.maximum(1, np.geomspace(COUNTS[0], COUNTS[-1], n_classes).astype(int))
    names = {"many": counts >= 100, "medium": (counts < 100) & (counts > 20), "few": counts <= 20}
    fields: dict[str, object] = {
        "name": name,
        "created": datetime(2026, 1, 1, tzinfo=UTC),
        "classes": [
            ClassEntry(label=label, count=int(n), trained=int(n))
            for label, n in zip(labels, counts, strict=True)
        ],
        "source_prior": (counts / counts.sum()).tolist(),
        "logit_offset": [0.0] * n_classes,
        "temperature": 1.25,
        "tau": 1.0,
        "groups": [
            Group(name=group, indices=np.flatnonzero(members).tolist())
            for group, members in names.items()
            if members.any()
        ],
        "input": ImageInput(height=SIZE, width=SIZE, mean=list(MEAN), std=list(STD)),
        "network": "tiny",
        "loss": Loss(name="cross-entropy"),
        "dataset": Dataset(name="colours"),
        "calibration": Calibration(logit_offset="known", temperature="fitted", images=8, classes=4),
    }
    return Manifest.model_validate({**fields, **changes})


def make(folder: Path, n_classes: int = 4, seed: int = 0, **changes: object) -> Bundle:
    """Write the tiny bundle to `folder` and return it."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (16, SIZE, SIZE, 3), dtype=np.uint8)
    holdout = encode_holdout(
        logits(pixels, n_classes, seed).astype(np.float32), rng.integers(0, n_classes, 16)
    )
    files = {MODEL: network(n_classes, seed).SerializeToString(), HOLDOUT: holdout}
    return write(folder, manifest(folder.name, n_classes, **changes), files)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """The bytes of an image with these pixels, (height, width, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
