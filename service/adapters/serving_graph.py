"""One ONNX graph from raw pixels to ranked classes, composed round a bundle's network when it is loaded.

    pixels uint8 (B, H, W, C) -> scale, mean, std, colour, layout -> network -> f
    (or rows of another kind, as they are -> network -> f)
    s = f * factors[rows] + offsets[rows] -> the K best, and log sum exp((s - max s) / T)
    the same, K = 1, for f + logit_offset (tau = 0)

The network's own opset and precision stay; all that is ours is float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bundle.files import BundleError
from bundle.manifest import ImageInput, TensorInput
from service.adapters.network_checks import (
    check_operators,
    check_weights,
    checked_input,
    checked_opset,
    checked_output,
    graphs,
    parsed,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bundle.files import Bundle
    from bundle.manifest import Manifest

# Up to this size mean and std are constants of a whole image. For int8 ONNX Runtime moves the transposition
# behind them, and to spread three numbers over the last axis there costs a twentieth of a ResNet-32's time.
_SPREAD_PIXELS: Final = 64 * 64
_OLDEST_IR: Final = 4  # from here on a weight need not be listed as an input


@dataclass(frozen=True)
class Inputs:
    """The names of what the serving graph takes.

    `pixels` uint8 (B, H, W, C), or rows (B, ...) of another kind;
    `factors` and `offsets` float32 (R, L), the table of distinct rows; `rows`
    int64 (B,), each image's row; `top_k` int64 (1,), between 1 and L.
    """

    pixels: str
    factors: str
    offsets: str
    rows: str
    top_k: str


@dataclass(frozen=True)
class Outputs:
    """The names of what the serving graph gives, all float32 but for the indices, which are int64.

    `indices` and `scores` (B, K), best first, ties to the lower index; `log_sum` (B,) is
    log sum exp((s - max s) / T), so that logsumexp(s / T) is scores[:, 0] / T + log_sum; `unadjusted_*` the
    same with K = 1 for f + (logit_offset - its largest); `logits` (B, L) is f.
    """

    indices: str
    scores: str
    log_sum: str
    unadjusted_index: str
    unadjusted_score: str
    unadjusted_log_sum: str
    logits: str


@dataclass(frozen=True)
class ServingGraph:
    """The composed model, ready for a runtime, with the names of its inputs and outputs."""

    model: bytes
    inputs: Inputs
    outputs: Outputs
    n_classes: int
    input: ImageInput | TensorInput
    temperature: float
    unadjusted_shift: float
    """The largest logit_offset, taken off in the graph: unadjusted_score + this is f + b."""
    top_k: int | None = None
    """K where it is a constant of the graph and no input."""

    def output_shapes(self, batch: int, k: int) -> list[tuple[str, tuple[int, ...], type[np.generic]]]:
        """Return the outputs in their order for a batch: name, shape, type."""
        out = self.outputs
        return [
            (out.indices, (batch, k), np.int64),
            (out.scores, (batch, k), np.float32),
            (out.log_sum, (batch,), np.float32),
            (out.unadjusted_index, (batch, 1), np.int64),
            (out.unadjusted_score, (batch, 1), np.float32),
            (out.unadjusted_log_sum, (batch,), np.float32),
            (out.logits, (batch, self.n_classes), np.float32),
        ]


def compose(bundle: Bundle) -> ServingGraph:
    """Compose the serving graph of a bundle. Raises BundleError with a code and the reason.

    The offset row of tau = 0 lies in the graph with its largest entry taken off, as the engine does with
    the rows it is given: a float32 score then is as exact as f itself, however large the offsets.
    """
    manifest = bundle.manifest
    network = parsed(bundle.model_bytes())
    opset = checked_opset(network)
    _check_numbers(manifest)
    check_operators(network)
    check_weights(network)
    entry = checked_input(network.graph, manifest)
    logits = checked_output(network.graph, manifest)

    prefix = _free_prefix(network.graph)
    inputs = Inputs(*(prefix + name for name in Inputs.__dataclass_fields__))
    outputs = Outputs(*(prefix + name for name in Outputs.__dataclass_fields__))
    offset = np.array(manifest.logit_offset)
    shift = float(offset.max())
    weave = _Weaver(prefix, opset)

    _to_network(weave, inputs.pixels, entry, manifest)
    weave.nodes.extend(network.graph.node)
    weave.add("Cast", [logits], outputs.logits, to=TensorProto.FLOAT)
    factor = weave.add("Gather", [inputs.factors, inputs.rows], axis=0)
    added = weave.add("Gather", [inputs.offsets, inputs.rows], axis=0)
    score = weave.add("Add", [weave.add("Mul", [outputs.logits, factor]), added])
    _rank(weave, score, inputs.top_k, (outputs.scores, outputs.indices, outputs.log_sum), manifest)
    plain = weave.add("Add", [outputs.logits, weave.constant((offset - shift).astype(np.float32))])
    one = weave.constant(np.array([1], dtype=np.int64))
    unadjusted = (outputs.unadjusted_score, outputs.unadjusted_index, outputs.unadjusted_log_sum)
    _rank(weave, plain, one, unadjusted, manifest)

    model = _assembled(network, weave, inputs, outputs, manifest)
    return ServingGraph(
        model.SerializeToString(),
        inputs,
        outputs,
        len(manifest.classes),
        manifest.input,
        manifest.temperature,
        shift,
    )


def with_constant_top_k(graph: ServingGraph, top_k: int) -> ServingGraph:
    """Return the graph with K as a constant, so that every shape in it follows from the batch's."""
    model = onnx.load_from_string(graph.model)
    kept = [value for value in model.graph.input if value.name != graph.inputs.top_k]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    constant = numpy_helper.from_array(np.array([top_k], dtype=np.int64), graph.inputs.top_k)
    model.graph.initializer.append(constant)
    return replace(graph, model=model.SerializeToString(), top_k=top_k)


def _check_numbers(manifest: Manifest) -> None:
    """Refuse what the manifest may say and a float32 cannot: a number that becomes zero or infinite there."""
    spec = manifest.input
    with np.errstate(over="ignore"):
        positive, others = np.array([manifest.temperature]), np.array(manifest.logit_offset)
        if isinstance(spec, ImageInput):
            std = np.array(spec.std)
            positive = np.array([*positive, spec.scale, *std, *(spec.scale / std)])
            others = np.array([*others, *(np.array(spec.mean) / std)])
    limits = np.finfo(np.float32)
    if not ((positive > limits.tiny) & (positive < limits.max)).all() or (abs(others) > limits.max).any():
        raise BundleError(
            "manifest-range",
            "manifest.json has a temperature, logit offset, scale, mean or std that no float32 holds",
        )


class _Weaver:
    """Collects nodes and constants under names that the network does not use."""

    def __init__(self, prefix: str, opset: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._prefix = prefix
        self._opset = opset

    def add(self, kind: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        """Append a node with one output and return that output's name."""
        name = f"{self._prefix}node{len(self.nodes)}"
        output = output or f"{name}_{kind}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def constant(self, values: NDArray[np.generic]) -> str:
        """Keep an array beside the weights and return its name."""
        name = f"{self._prefix}constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def reduce(self, kind: str, of: str, axes_are_inputs_from: int) -> str:
        """Reduce the last axis, kept; the operator's axes became an input at some opset."""
        if self._opset >= axes_are_inputs_from:
            return self.add(kind, [of, self.constant(np.array([1], dtype=np.int64))], keepdims=1)
        return self.add(kind, [of], axes=[1], keepdims=1)


def _to_network(weave: _Weaver, pixels: str, entry: onnx.ValueInfoProto, manifest: Manifest) -> None:
    """Append what turns uint8 NHWC RGB pixels p into the network's input: (p * scale - mean) / std.

    Rows of another kind are taken as they are.
    """
    spec = manifest.input
    value = pixels
    if isinstance(spec, TensorInput):
        weave.add("Identity", [value], entry.name)
        return
    if spec.colour == "BGR":
        value = weave.add("Gather", [value, weave.constant(np.array([2, 1, 0], dtype=np.int64))], axis=3)
    if spec.layout == "NCHW":  # turned while a pixel is still one byte
        value = weave.add("Transpose", [value], perm=[0, 3, 1, 2])
    dtype = entry.type.tensor_type.elem_type
    if dtype == TensorProto.UINT8:
        weave.add("Identity", [value], entry.name)
        return
    mean, std = np.array(spec.mean), np.array(spec.std)
    slope, shift = (spec.scale / std).astype(np.float32), (mean / std).astype(np.float32)
    if spec.layout == "NCHW":
        slope, shift = slope[:, None, None], shift[:, None, None]
        if spec.height * spec.width <= _SPREAD_PIXELS:
            slope, shift = (np.tile(one, (1, spec.height, spec.width)) for one in (slope, shift))
    value = weave.add("Cast", [value], to=TensorProto.FLOAT)
    value = weave.add("Mul", [value, weave.constant(slope)])
    value = weave.add("Sub", [value, weave.constant(shift)])
    weave.add("Cast", [value], entry.name, to=dtype)


def _rank(weave: _Weaver, score: str, top_k: str, names: tuple[str, str, str], manifest: Manifest) -> None:
    """Append the K best of `score` (B, L), best first, and log sum exp((s - max s) / T), (B,).

    Less the largest first, so that exp cannot overflow; a class at -inf then adds exp(-inf) = 0. Some class
    lies above -inf: a prior sums to one.
    """
    values, indices, log_sum = names
    weave.nodes.append(
        helper.make_node("TopK", [score, top_k], [values, indices], axis=1, largest=1, sorted=1)
    )
    largest = weave.reduce("ReduceMax", score, axes_are_inputs_from=18)
    below = weave.add("Sub", [score, largest])
    scaled = weave.add("Div", [below, weave.constant(np.array(manifest.temperature, dtype=np.float32))])
    total = weave.reduce("ReduceSum", weave.add("Exp", [scaled]), axes_are_inputs_from=13)
    flat = weave.add("Reshape", [total, weave.constant(np.array([-1], dtype=np.int64))])
    weave.add("Log", [flat], log_sum)


def _assembled(
    network: onnx.ModelProto, weave: _Weaver, inputs: Inputs, outputs: Outputs, manifest: Manifest
) -> onnx.ModelProto:
    """Return the network's model with our nodes round it, our inputs and our outputs."""
    spec, n_classes = manifest.input, len(manifest.classes)
    batch, table, k = "batch", "distinct_rows", "top_k"

    def value(name: str, dtype: int, shape: list[int | str]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, shape)

    graph = network.graph
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(weave.nodes)
    graph.initializer.extend(weave.constants)
    graph.input.extend(
        [
            value(inputs.pixels, helper.np_dtype_to_tensor_dtype(spec.dtype), [batch, *spec.row_shape]),
            value(inputs.factors, TensorProto.FLOAT, [table, n_classes]),
            value(inputs.offsets, TensorProto.FLOAT, [table, n_classes]),
            value(inputs.rows, TensorProto.INT64, [batch]),
            value(inputs.top_k, TensorProto.INT64, [1]),
        ]
    )
    graph.output.extend(
        [
            value(outputs.indices, TensorProto.INT64, [batch, k]),
            value(outputs.scores, TensorProto.FLOAT, [batch, k]),
            value(outputs.log_sum, TensorProto.FLOAT, [batch]),
            value(outputs.unadjusted_index, TensorProto.INT64, [batch, 1]),
            value(outputs.unadjusted_score, TensorProto.FLOAT, [batch, 1]),
            value(outputs.unadjusted_log_sum, TensorProto.FLOAT, [batch]),
            value(outputs.logits, TensorProto.FLOAT, [batch, n_classes]),
        ]
    )
    network.ir_version = max(network.ir_version, _OLDEST_IR)
    return network


def _free_prefix(graph: onnx.GraphProto) -> str:
    """Return a beginning that no name in the network has."""
    taken: set[str] = set()
    for inner in (graph, *graphs(graph.node)):
        taken.update(value.name for value in (*inner.input, *inner.output, *inner.initializer))
        for node in inner.node:
            taken.update((node.name, *node.input, *node.output))
    prefix = "tare_"
    while any(name.startswith(prefix) for name in taken):
        prefix += "_"
    return prefix
