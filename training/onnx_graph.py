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
from training.exceptions import TrainingError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

Layout = Literal["NCHW", "NHWC"]

_MAX_BYTES: Final = 2**31 - 1  # one protobuf message holds no more
_INPUT_TYPES: Final = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.UINT8: "uint8",
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
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise GraphError(f"a classifier of images has one input, this graph has {len(inputs)}: {names}")
    tensor = inputs[0].type.tensor_type
    if tensor.elem_type not in _INPUT_TYPES:
        kind = TensorProto.DataType.Name(tensor.elem_type).lower() if tensor.elem_type else "no tensor"
        raise GraphError(f"the input '{inputs[0].name}' is {kind}; float32, float16 and uint8 can be served")
    dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
    if not tensor.HasField("shape") or len(dims) != 4:
        raise GraphError(f"the input '{inputs[0].name}' has {len(dims)} dimensions; images in a batch have 4")
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
    dtype = _INPUT_TYPES[tensor.elem_type]
    return Signature(inputs[0].name, dtype, found, channels, *chosen, dims[0])


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


def standardised(model: ModelProto, signature: Signature, output: str, answer: NDArray[Any]) -> ModelProto:
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
    image = (signature.height, signature.width)
    shape = (signature.channels, *image) if signature.layout == "NCHW" else (*image, signature.channels)
    del changed.graph.input[:], changed.graph.output[:]  # weights listed as inputs, as IR 3 had them, go too
    changed.graph.input.append(
        helper.make_tensor_value_info(signature.input, _type_number(signature.dtype), ["batch", *shape])
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


def _free_batch(graph: onnx.GraphProto, signature: Signature) -> None:
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
    return next(number for number, name in _INPUT_TYPES.items() if name == dtype)
