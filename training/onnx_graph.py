"""A person's ONNX file brought to the one form that bundles hold, or refused in one sentence.

That form: one file, opset 11 to 20, IR at most 10, one input [batch, ...] of a fixed image size and one
output [batch, classes], both in the precision they had. No torch here: the file may come from anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from bundle.files import NEWEST_IR, NEWEST_OPSET, OLDEST_OPSET
from bundle.manifest import Datatype
from training.exceptions import TrainingError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

Layout = Literal["NCHW", "NHWC"]

_MAX_BYTES: Final = 2**31 - 1  # one protobuf message holds no more
_IMAGE_TYPES: Final[dict[int, str]] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.UINT8: "uint8",
}
_TENSOR_TYPES: Final[dict[int, tuple[str, Datatype]]] = {
    TensorProto.FLOAT: ("float32", "FP32"),
    TensorProto.FLOAT16: ("float16", "FP16"),
    TensorProto.DOUBLE: ("float64", "FP64"),
    TensorProto.UINT8: ("uint8", "UINT8"),
    TensorProto.INT8: ("int8", "INT8"),
    TensorProto.INT32: ("int32", "INT32"),
    TensorProto.INT64: ("int64", "INT64"),
}
_PASSING: Final = ("Identity", "Cast", "Dropout")  # what may stand between a Softmax and the output


class GraphError(TrainingError):
    """An ONNX file that cannot be taken, and why."""


@dataclass(frozen=True)
class Signature:
    """What a graph takes: images of one size in one layout. `batch` is None where any number goes in."""

    input: str
    dtype: str
    layout: Layout
    channels: int
    height: int
    width: int
    batch: int | None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one image in the graph's layout."""
        image = (self.height, self.width)
        return (self.channels, *image) if self.layout == "NCHW" else (*image, self.channels)


@dataclass(frozen=True)
class TensorSignature:
    """What a graph takes that is no image: rows of numbers. `batch` is None where any number goes in."""

    input: str
    dtype: str
    datatype: Datatype
    row_shape: tuple[int, ...]
    batch: int | None


def read_graph(path: Path) -> ModelProto:
    """Read an ONNX file with the weights beside it, checked by onnx itself. Raises GraphError."""
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise GraphError(f"{path} is larger than the 2 GiB that one ONNX file can hold")
        model = onnx.load_model(path, format="protobuf")
    except FileNotFoundError as failure:
        raise GraphError(f"{failure.filename or path} does not exist") from failure
    except OSError as failure:
        raise GraphError(f"{path} cannot be read: {first_line(failure)}") from failure
    except DecodeError as failure:
        raise GraphError(f"{path} is not an ONNX file") from failure
    except (onnx.checker.ValidationError, ValueError) as failure:
        raise GraphError(
            f"{path}: the weights beside it cannot be taken in: {first_line(failure)}"
        ) from failure
    if not model.graph.node:
        raise GraphError(f"{path} is not an ONNX file, or holds no graph")
    if model.ByteSize() > _MAX_BYTES:
        raise GraphError(f"{path} and its weights are larger than the 2 GiB that one ONNX file can hold")
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as failure:
        raise GraphError(f"{path} breaks the rules of ONNX: {first_line(failure)}") from failure
    _check_finite(model)
    return model


def read_signature(
    model: ModelProto, *, size: tuple[int, int] | None = None, layout: Layout | None = None
) -> Signature:
    """Return what the graph takes; `size` (height, width) and `layout` fill in what it leaves open.

    Raises GraphError for what cannot be an image, contradicts the options, or is open and not given.
    """
    name, number, dims = _input(model)
    if number not in _IMAGE_TYPES:
        raise GraphError(f"the input '{name}' is {_kind(number)}; float32, float16 and uint8 can be served")
    if len(dims) != 4:
        raise GraphError(f"the input '{name}' has {len(dims)} dimensions; images in a batch have 4")
    found = layout or _layout(dims)
    channels, height, width = (dims[1], dims[2], dims[3]) if found == "NCHW" else (dims[3], dims[1], dims[2])
    if channels not in (1, 3):
        raise GraphError(
            f"the input has {channels or 'an open number of'} channels in layout {found}; 1 or 3 go"
        )
    if size is None and (height is None or width is None):
        raise GraphError("the graph takes images of any size; say which with --input-size HEIGHTxWIDTH")
    for mine, given in zip((height, width), size or (height, width), strict=True):
        if mine is not None and mine != given:
            raise GraphError(f"--input-size {size} is not what the graph takes: {height} x {width}")
    chosen = size or (height or 0, width or 0)
    if min(chosen) < 1:
        raise GraphError("the graph takes images without a pixel")
    return Signature(name, _IMAGE_TYPES[number], found, channels, *chosen, dims[0])


def read_tensor_signature(model: ModelProto, shape: tuple[int, ...] | None = None) -> TensorSignature:
    """Return what a graph takes that is no image; `shape` of a row fills in what it leaves open.

    Raises GraphError for a type that cannot be served, and for a shape that is open or contradicted.
    """
    name, number, dims = _input(model)
    if number not in _TENSOR_TYPES:
        kinds = ", ".join(dtype for dtype, _ in _TENSOR_TYPES.values())
        raise GraphError(f"the input '{name}' is {_kind(number)}; {kinds} can be served")
    if len(dims) < 2:
        raise GraphError(f"the input '{name}' has {len(dims)} dimensions; rows in a batch have 2 or more")
    wanted = dims[1:] if shape is None else list(shape)
    if len(wanted) != len(dims) - 1 or any(
        mine not in (None, given) for mine, given in zip(dims[1:], wanted, strict=True)
    ):
        raise GraphError(f"--input-shape {shape} is not what the graph takes: {dims[1:]}")
    row_shape = tuple(size for size in wanted if size)
    if len(row_shape) != len(wanted):
        raise GraphError(f"the graph takes rows of shape {wanted}; say which with --input-shape, as in 16x3")
    dtype, datatype = _TENSOR_TYPES[number]
    return TensorSignature(name, dtype, datatype, row_shape, dims[0])


def output_name(model: ModelProto, wanted: str | None) -> str:
    """Return the name of the output to serve; `wanted` where there are several. Raises GraphError."""
    names: list[str] = [value.name for value in model.graph.output]
    if wanted is not None:
        if wanted not in names:
            raise GraphError(f"--output {wanted}: the graph's outputs are {', '.join(names)}")
        return wanted
    if len(names) != 1:
        raise GraphError(f"the graph has several outputs, choose with --output: {', '.join(names)}")
    return names[0]


def without_softmax(model: ModelProto, output: str) -> str | None:
    """Return the tensor that a Softmax at the end was made from, or None if there is none.

    Raises GraphError for a Sigmoid at the end: such a network says yes or no to each class by itself.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    node = makers.get(output)
    while node is not None and node.op_type in _PASSING:
        node = makers.get(node.input[0])
    if node is not None and node.op_type == "Sigmoid":
        raise GraphError(
            "the graph ends in a Sigmoid: its classes do not exclude each other; export logits of one"
            " softmax over all classes"
        )
    return str(node.input[0]) if node is not None and node.op_type == "Softmax" else None


def standardised(
    model: ModelProto, signature: Signature | TensorSignature, output: str, answer: NDArray[Any]
) -> ModelProto:
    """Return a copy in the form that bundles hold, its one output the tensor `output`. Raises GraphError.

    `answer` is what the original gives at that tensor, to know its type and shape by. The result is a claim,
    not a proof: compare its answers with the original's.
    """
    changed = ModelProto()
    changed.CopyFrom(model)
    if changed.functions:
        changed = onnx.inliner.inline_local_functions(changed)
    if signature.batch is not None:
        _free_batch(changed.graph, signature)
    _keep_what_leads_to(changed.graph, output)
    if answer.ndim > 2:
        output = _flatten(changed.graph, output)
    del changed.graph.input[:], changed.graph.output[:]  # weights listed as inputs, as IR 3 had them, go too
    changed.graph.input.append(
        helper.make_tensor_value_info(
            signature.input, _type_number(signature.dtype), ["batch", *signature.row_shape]
        )
    )
    changed.graph.output.append(
        helper.make_tensor_value_info(
            output, helper.np_dtype_to_tensor_dtype(answer.dtype), ["batch", int(np.prod(answer.shape[1:]))]
        )
    )
    changed = _in_opset_range(changed)
    changed.ir_version = min(max(changed.ir_version, 8), NEWEST_IR)
    try:
        onnx.checker.check_model(changed)
    except onnx.checker.ValidationError as failure:
        raise GraphError(f"the graph cannot be brought to IR {NEWEST_IR}: {first_line(failure)}") from failure
    return changed


def _input(model: ModelProto) -> tuple[str, int, list[int | None]]:
    """Return name, type and dimensions of the one input."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise GraphError(f"a classifier has one input here, this graph has {len(inputs)}: {names}")
    tensor = inputs[0].type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
    return inputs[0].name, tensor.elem_type, dims


def _kind(number: int) -> str:
    return str(TensorProto.DataType.Name(number)).lower() if number else "no tensor"


def _layout(dims: list[int | None]) -> Layout:
    """Tell the layout by where the 1 or 3 channels stand."""
    first, last = dims[1] in (1, 3), dims[3] in (1, 3)
    if first == last:
        raise GraphError(
            f"the input's shape {dims} does not say where the channels are; say so with --layout"
        )
    return "NCHW" if first else "NHWC"


def _check_finite(model: ModelProto) -> None:
    for name, tensor in _constants(model.graph):
        if tensor.data_type in (
            TensorProto.FLOAT,
            TensorProto.FLOAT16,
            TensorProto.DOUBLE,
            TensorProto.BFLOAT16,
        ):
            values = numpy_helper.to_array(tensor)
            values = values.astype(np.float64)
            # A lone infinity is a mask or the rim of a pooling window, not a weight.
            if np.isnan(values).any() or (values.size > 1 and np.isinf(values).any()):
                raise GraphError(f"the weights '{name}' hold NaN or infinity")


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """Yield every initialiser and Constant of the graph itself, by the name it is used under."""
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    yield node.output[0], attribute.t


def _free_batch(graph: onnx.GraphProto, signature: Signature | TensorSignature) -> None:
    """Turn the batch that exporting wrote into constant Reshape targets into one taken from the input."""
    constants = dict(_constants(graph))
    on_pixels = {signature.input}
    for node in graph.node:
        if not on_pixels.intersection(node.input):
            continue
        on_pixels.update(node.output)
        if node.op_type != "Reshape" or node.input[0] not in on_pixels or node.input[1] not in constants:
            continue
        target = numpy_helper.to_array(constants[node.input[1]]).copy()
        if not target.size or target[0] != signature.batch:
            continue
        zero_copies = not any(item.name == "allowzero" and item.i for item in node.attribute)
        if -1 not in target:
            target[0] = -1
        elif zero_copies:
            target[0] = 0
        name = f"{node.output[0]}_any_batch"
        graph.initializer.append(numpy_helper.from_array(target, name))
        node.input[1] = name


def _keep_what_leads_to(graph: onnx.GraphProto, output: str) -> None:
    """Drop the nodes and weights that other outputs needed."""
    needed, nodes = {output}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(_used_by(node))
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    nodes.reverse()
    del graph.node[:], graph.initializer[:], graph.value_info[:]  # value_info has shapes with the old batch
    graph.node.extend(nodes)
    graph.initializer.extend(weights)


def _used_by(node: NodeProto) -> set[str]:
    """Return the names a node reads, those that its inner graphs take from outside included."""
    names = set(node.input)
    for attribute in node.attribute:
        graphs = list(attribute.graphs)
        if attribute.type == AttributeProto.GRAPH:
            graphs.append(attribute.g)
        for inner in graphs:
            for inner_node in inner.node:
                names |= _used_by(inner_node)
            names |= {value.name for value in inner.output}
    return names


def _flatten(graph: onnx.GraphProto, output: str) -> str:
    """Append what turns (batch, classes, 1, 1) into rows, and return the rows' name."""
    used = {name for node in graph.node for name in (*node.input, *node.output)}
    rows = output + "_rows"
    while rows in used:
        rows += "_"
    graph.node.append(helper.make_node("Flatten", [output], [rows], axis=1))
    return rows


def _in_opset_range(model: ModelProto) -> ModelProto:
    opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), None)
    if opset is None or OLDEST_OPSET <= opset <= NEWEST_OPSET:
        return model
    target = NEWEST_OPSET if opset > NEWEST_OPSET else OLDEST_OPSET
    try:
        return onnx.version_converter.convert_version(model, target)
    except RuntimeError as failure:
        raise GraphError(
            f"the graph is of opset {opset} and cannot be converted to {target} ({first_line(failure)});"
            f" export it with opset {NEWEST_OPSET}"
        ) from failure


def _type_number(dtype: str) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
