"""Small classifiers as other people's tools write them, and what they answer computed with NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto

N_CLASSES = 5
LABELS = ("ant", "bee", "cat", "dog", "eel")
COUNTS = (400, 120, 60, 20, 4)  # training images of each class, where a command asks
HEIGHT, WIDTH = 6, 10


def weights(channels: int = 3, n_classes: int = N_CLASSES) -> NDArray[np.float32]:
    """A matrix (channels + 1, L): logits = [mean colour, 1] @ weights."""
    return np.random.default_rng(3).normal(0, 2, (channels + 1, n_classes)).astype(np.float32)


def logits(
    network_input: NDArray[Any], layout: str = "NCHW", n_classes: int = N_CLASSES
) -> NDArray[np.float64]:
    """What the classifier says of its input (B, ...), in float64."""
    pooled = network_input.astype(np.float64).mean(axis=(2, 3) if layout == "NCHW" else (1, 2))
    matrix = weights(pooled.shape[1], n_classes).astype(np.float64)
    return np.asarray(pooled @ matrix[:-1] + matrix[-1])


def classifier(
    *,
    layout: str = "NCHW",
    batch: int | str = "batch",
    dtype: int = TensorProto.FLOAT,
    channels: int = 3,
    size: tuple[int | str, int | str] = (HEIGHT, WIDTH),
    n_classes: int = N_CLASSES,
    inside: tuple[float, float] | None = None,
    softmax: bool = False,
    sigmoid: bool = False,
    maps: bool = False,
    aux: bool = False,
    opset: int = 18,
    ir: int = 10,
) -> ModelProto:
    """Return mean colour -> linear. `inside`: (divide, subtract) in the graph; `maps`: (B, L, 1, 1) out."""
    half = dtype == TensorProto.FLOAT16
    number = np.float16 if half else np.float32
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    matrix = weights(channels, n_classes).astype(number)
    held = [numpy_helper.from_array(matrix[:-1], "matrix"), numpy_helper.from_array(matrix[-1], "constant")]
    nodes, now = [], "image"
    if dtype == TensorProto.UINT8:
        nodes.append(helper.make_node("Cast", [now], ["as_float"], to=TensorProto.FLOAT))
        now = "as_float"
    if inside is not None:
        held += [
            numpy_helper.from_array(np.array(value, number), name)
            for value, name in zip(inside, ("divide", "subtract"), strict=True)
        ]
        nodes.append(helper.make_node("Div", [now, "divide"], ["divided"]))
        nodes.append(helper.make_node("Sub", ["divided", "subtract"], ["normal"]))
        now = "normal"
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", [now], ["planes"], perm=[0, 3, 1, 2]))
        now = "planes"
    nodes.append(helper.make_node("GlobalAveragePool", [now], ["pooled"]))
    # The way an exporter writes x.view(x.size(0), -1): with the traced batch where it was fixed.
    rows = batch if isinstance(batch, int) else -1
    held.append(numpy_helper.from_array(np.array([rows, channels]), "rows"))
    nodes.append(helper.make_node("Reshape", ["pooled", "rows"], ["features"]))
    nodes.append(helper.make_node("Gemm", ["features", "matrix", "constant"], ["logits"]))
    output, shape = "logits", [batch, n_classes]
    if maps:
        held.append(numpy_helper.from_array(np.array([-1, n_classes, 1, 1]), "maps"))
        nodes.append(helper.make_node("Reshape", ["logits", "maps"], ["answer"]))
        output, shape = "answer", [batch, n_classes, 1, 1]
    if softmax or sigmoid:
        nodes.append(helper.make_node("Softmax" if softmax else "Sigmoid", [output], ["chances"]))
        output = "chances"
    outputs = [helper.make_tensor_value_info(output, kind, shape)]
    if aux:
        held.append(numpy_helper.from_array(matrix[:-1] * 2, "aux_matrix"))
        nodes.append(helper.make_node("MatMul", ["features", "aux_matrix"], ["aux"]))
        outputs.append(helper.make_tensor_value_info("aux", kind, [batch, n_classes]))
    image = (channels, *size) if layout == "NCHW" else (*size, channels)
    graph = helper.make_graph(
        nodes, "classifier", [helper.make_tensor_value_info("image", dtype, [batch, *image])], outputs, held
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = ir
    onnx.checker.check_model(model)
    return model
