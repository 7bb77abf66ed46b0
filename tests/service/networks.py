"""Networks of many kinds round one linear map, so that every way in and out of the graph can be tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bundle.files import MODEL, Bundle, write
from bundle.manifest import ImageInput, Manifest
from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

NUMPY = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.DOUBLE: np.float64}


def weights(channels: int, n_classes: int) -> NDArray[np.float64]:
    return np.random.default_rng(5).normal(0, 1, (channels, n_classes)).round(2)


def linear(
    *,
    layout: str = "NCHW",
    channels: int = 3,
    n_classes: int = 4,
    dtype: int = TensorProto.FLOAT,
    size: tuple[int, int] = (6, 4),
    opset: int = 18,
    ir: int = 8,
    batch: int | str | None = "n",
    prefix: str = "",
    squeeze: str | None = None,
) -> onnx.ModelProto:
    """logits = (mean colour) @ W: the mean by ReduceMean over height and width, the map by MatMul.

    `squeeze` is an operator between mean and map; a uint8 input is cast to float32 first.
    """
    axes = [2, 3] if layout == "NCHW" else [1, 2]
    shape = [channels, *size] if layout == "NCHW" else [*size, channels]
    inner = TensorProto.FLOAT if dtype == TensorProto.UINT8 else dtype
    nodes = [helper.make_node("Cast", [f"{prefix}pixels"], [f"{prefix}x"], to=inner)]
    initial = [numpy_helper.from_array(weights(channels, n_classes).astype(NUMPY[inner]), f"{prefix}W")]
    if opset >= 18:
        initial.append(numpy_helper.from_array(np.array(axes, dtype=np.int64), f"{prefix}axes"))
        mean = helper.make_node("ReduceMean", [f"{prefix}x", f"{prefix}axes"], [f"{prefix}m"], keepdims=0)
    else:
        mean = helper.make_node("ReduceMean", [f"{prefix}x"], [f"{prefix}m"], keepdims=0, axes=axes)
    nodes.append(mean)
    features = f"{prefix}m"
    if squeeze is not None:
        nodes.append(helper.make_node(squeeze, [features], [f"{prefix}q"]))
        features = f"{prefix}q"
    nodes.append(helper.make_node("MatMul", [features, f"{prefix}W"], [f"{prefix}scores"]))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info(f"{prefix}pixels", dtype, [batch, *shape])],
        [helper.make_tensor_value_info(f"{prefix}scores", inner, [batch, n_classes])],
        initial,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = ir
    return model


def manifest(name: str = "linear", n_classes: int = 4, prefix: str = "", **changes: object) -> Manifest:
    fields: dict[str, object] = {
        "input": ImageInput(height=6, width=4, mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3]),
        "graph": {"input": f"{prefix}pixels", "output": f"{prefix}scores"},
    }
    return tiny.manifest(name, n_classes, **{**fields, **changes})


def bundle(folder: Path, model: onnx.ModelProto | bytes, said: Manifest) -> Bundle:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return write(folder, said, {MODEL: data})


def logits(pixels: NDArray[np.uint8], spec: ImageInput, n_classes: int = 4) -> NDArray[np.float64]:
    """What `linear` answers for uint8 pixels (B, H, W, C) in RGB, in float64."""
    ordered = pixels[..., ::-1] if spec.colour == "BGR" else pixels
    scaled = (ordered.astype(np.float64) * spec.scale - np.array(spec.mean)) / np.array(spec.std)
    return np.asarray(scaled.mean(axis=(1, 2)) @ weights(spec.channels, n_classes))


def flat(size: int = 8, n_classes: int = 4) -> onnx.ModelProto:
    """logits = every number of the picture @ W: none can be another, or elsewhere, unseen."""
    matrix = np.random.default_rng(6).normal(0, 1, (3 * size * size, n_classes)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["pixels"], ["x"]), helper.make_node("MatMul", ["x", "W"], ["scores"])],
        "flat",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, size, size])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", n_classes])],
        [numpy_helper.from_array(matrix, "W")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return model


def flat_manifest(name: str, size: int = 8, **changes: object) -> Manifest:
    """The manifest for `flat`, with pixels as they are."""
    spec = ImageInput(height=size, width=size, scale=1, mean=[0, 0, 0], std=[1, 1, 1])
    return tiny.manifest(
        name, 4, **{"input": spec, "graph": {"input": "pixels", "output": "scores"}, **changes}
    )


def flat_logits(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """What `flat` answers for uint8 pixels (B, H, W, 3), in float64."""
    rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1).astype(np.float64)
    matrix = np.random.default_rng(6).normal(0, 1, (rows.shape[1], 4)).astype(np.float32)
    return np.asarray(rows @ matrix)
