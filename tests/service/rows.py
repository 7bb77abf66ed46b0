"""Networks that eat no images, and what they answer computed with NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bundle.files import MODEL, Bundle, write
from bundle.manifest import TensorInput
from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

SHAPE = (3, 2)
WORDS = 10
WEIGHTS = np.random.default_rng(8).normal(0, 1, (6, 4)).round(2).astype(np.float32)
TABLE = np.random.default_rng(9).normal(0, 1, (WORDS, 4)).round(2).astype(np.float32)


def vectors(dtype: int = TensorProto.FLOAT, batch: int | str = "n") -> onnx.ModelProto:
    """rows (n, 3, 2) of any number -> float32 -> logits = flat @ WEIGHTS."""
    nodes = [
        helper.make_node("Cast", ["measured"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    return _model(nodes, "measured", dtype, [batch, *SHAPE], numpy_helper.from_array(WEIGHTS, "weights"))


def tokens(length: int | str = 5) -> onnx.ModelProto:
    """rows (n, 5) of int64 -> logits = the mean of their rows in TABLE; fails beyond the table."""
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["found"], axis=0),
        helper.make_node("ReduceMean", ["found"], ["logits"], axes=[1], keepdims=0),
    ]
    return _model(nodes, "tokens", TensorProto.INT64, ["n", length], numpy_helper.from_array(TABLE, "table"))


def bundle(folder: Path, model: onnx.ModelProto, spec: TensorInput, **changes: Any) -> Bundle:
    graph = {"input": model.graph.input[0].name, "output": "logits"}
    said = tiny.manifest(folder.name, input=spec, graph=graph, **changes)
    return write(folder, said, {MODEL: model.SerializeToString()})


def of_vectors(values: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(values.reshape(len(values), -1).astype(np.float64) @ WEIGHTS.astype(np.float64))


def of_tokens(values: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(TABLE.astype(np.float64)[values].mean(axis=1))


def _model(
    nodes: list[onnx.NodeProto], name: str, dtype: int, shape: list[int | str], weights: onnx.TensorProto
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "rows",
        [helper.make_tensor_value_info(name, dtype, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [shape[0], 4])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model
