"""What of a bundle is checked with its network open: ONNX in one file, finite weights, shapes that fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]
from onnx import TensorProto, numpy_helper

from bundle.files import NEWEST_IR, NEWEST_OPSET, OLDEST_OPSET, BundleError
from bundle.manifest import TensorInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from bundle.manifest import ImageInput, Manifest

_INPUT_TYPES: Final = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8}
_OUTPUT_TYPES: Final = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
_FLOATING: Final = _OUTPUT_TYPES | {
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E4M3FNUZ,
    TensorProto.FLOAT8E5M2,
    TensorProto.FLOAT8E5M2FNUZ,
}

_STANDARD: Final = {"", "ai.onnx", "ai.onnx.ml"}


def parsed(data: bytes) -> onnx.ModelProto:
    """Return the model that the bytes hold. Raises BundleError where they hold none."""
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as failure:
        raise BundleError("model-not-onnx", "model.onnx is not an ONNX model") from failure
    if not model.graph.node:  # other files, and none at all, can parse as an empty model
        raise BundleError("model-not-onnx", "model.onnx is not an ONNX model: it has no nodes")
    return model


def checked_opset(model: onnx.ModelProto) -> int:
    """Return the version of the default operator set, between the oldest and the newest we compose with."""
    if model.ir_version > NEWEST_IR:
        raise BundleError(
            "model-ir-version", f"model.onnx has IR version {model.ir_version}; export it with {NEWEST_IR}"
        )
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise BundleError(
            "model-opset",
            f"model.onnx has opset {opset}; export it with one between {OLDEST_OPSET} and {NEWEST_OPSET}",
        )
    return opset


def check_operators(model: onnx.ModelProto) -> None:
    """Raise BundleError for operators that are neither ONNX's own nor functions in the file.

    Those that ONNX Runtime adds are not the same on every device, and some take shapes on trust: a wrong one
    writes where it should not.
    """
    own = {(function.domain, function.name) for function in model.functions}
    for node in _nodes(model):
        if node.domain not in _STANDARD and (node.domain, node.op_type) not in own:
            raise BundleError(
                "model-domain",
                f"model.onnx uses {node.op_type[:100]!r} of {node.domain[:100]!r}; export it with ONNX's own "
                "operators",
            )


def check_weights(model: onnx.ModelProto) -> None:
    """Raise BundleError for weights outside the file, and for a NaN or an infinity among them."""
    scales = _scales(model)
    for tensor in _tensors(model):
        name = tensor.name or "a constant"
        if tensor.data_location == TensorProto.EXTERNAL:
            raise BundleError(
                "model-external-data",
                f"model.onnx keeps {name} in another file; export it with all weights inside",
            )
        if tensor.data_type not in _FLOATING:
            continue
        try:
            values = numpy_helper.to_array(tensor)
            if values.dtype.kind not in "fc":  # the small floats that NumPy does not know
                values = values.astype(np.float32)
        except (ValueError, TypeError) as failure:
            raise BundleError("model-not-onnx", f"model.onnx: {name} is damaged") from failure
        # A lone infinity is a mask or the rim of a pooling window, not a weight; but no scale is one.
        counts = values.size > 1 or tensor.name in scales
        if np.isnan(values).any() or (counts and np.isinf(values).any()):
            raise BundleError("model-non-finite", f"model.onnx: {name} has a weight that is not finite")


def checked_input(graph: onnx.GraphProto, manifest: Manifest) -> onnx.ValueInfoProto:
    """Return the one input to feed: the manifest's, of its size and layout, for any number of images."""
    weights = {tensor.name for tensor in graph.initializer}
    entries: dict[str, onnx.ValueInfoProto] = {
        value.name: value for value in graph.input if value.name not in weights
    }
    name, spec = manifest.graph.input, manifest.input
    if name not in entries:
        raise BundleError("model-input", f"model.onnx has no input {name!r}; it has {_listed(list(entries))}")
    if len(entries) > 1:
        raise BundleError("model-input", f"model.onnx has {len(entries)} inputs; only {name!r} can be fed")
    entry = entries[name]
    if isinstance(spec, TensorInput):
        _check_type(entry, spec)
        _check_shape(entry, spec.row_shape, "as its input's shape")
    else:
        _check_image_type(entry, spec)
        image = spec.row_shape
        _check_shape(entry, image if spec.layout == "NHWC" else (image[2], *image[:2]), f"({spec.layout})")
    return entry


def _check_type(entry: onnx.ValueInfoProto, spec: TensorInput) -> None:
    dtype = entry.type.tensor_type.elem_type
    if dtype != onnx.helper.np_dtype_to_tensor_dtype(spec.dtype):
        raise BundleError(
            "model-dtype", f"model.onnx takes {_dtype(dtype)}, the manifest says {spec.datatype}"
        )


def _check_image_type(entry: onnx.ValueInfoProto, spec: ImageInput) -> None:
    dtype = entry.type.tensor_type.elem_type
    if dtype not in _INPUT_TYPES:
        raise BundleError(
            "model-dtype", f"model.onnx takes {_dtype(dtype)}; export it with float32, float16 or uint8 input"
        )
    plain = spec.scale == 1 and not any(spec.mean) and set(spec.std) == {1}
    if dtype == TensorProto.UINT8 and not plain:
        raise BundleError(
            "model-dtype", "model.onnx takes uint8, so the manifest must say scale 1, mean 0 and std 1"
        )


def _check_shape(entry: onnx.ValueInfoProto, expected: tuple[int, ...], what: str) -> None:
    """Hold the declared shape of an input to batch x `expected`."""
    shape = _shape(entry)
    if shape is None:
        return
    if len(shape) != len(expected) + 1 or any(
        have is not None and have != want for have, want in zip(shape[1:], expected, strict=True)
    ):
        raise BundleError(
            "model-input",
            f"model.onnx takes {_written(shape)}, the manifest says batch x "
            f"{' x '.join(map(str, expected))} {what}",
        )
    if shape[0] is not None:
        raise BundleError(
            "model-batch", f"model.onnx takes batches of {shape[0]} only; export it with a symbolic batch"
        )


def checked_output(graph: onnx.GraphProto, manifest: Manifest) -> str:
    """Return the name of the logits: one an image and class. What is left open the warm-up finds out."""
    outputs = {value.name: value for value in graph.output}
    name, n_classes = manifest.graph.output, len(manifest.classes)
    if name not in outputs:
        raise BundleError(
            "model-output", f"model.onnx has no output {name!r}; it has {_listed(list(outputs))}"
        )
    dtype = outputs[name].type.tensor_type.elem_type
    if dtype and dtype not in _OUTPUT_TYPES:
        raise BundleError("model-dtype", f"model.onnx gives {_dtype(dtype)}; logits are floating-point")
    shape = _shape(outputs[name])
    if shape is None:
        return name
    if len(shape) != 2:
        raise BundleError("model-output", f"model.onnx gives {_written(shape)}; logits are batch x classes")
    if shape[1] is not None and shape[1] != n_classes:
        raise BundleError(
            "model-classes", f"model.onnx gives {shape[1]} logits an image for {n_classes} classes"
        )
    if shape[0] is not None:
        raise BundleError(
            "model-batch", f"model.onnx gives batches of {shape[0]} only; export it with a symbolic batch"
        )
    return name


def graphs(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """The graphs inside nodes (If, Loop, Scan), and those inside them."""
    for node in nodes:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield inner
                yield from graphs(inner.node)


def _bodies(model: onnx.ModelProto) -> tuple[list[Sequence[onnx.NodeProto]], list[onnx.GraphProto]]:
    """The lists of nodes that the model and its functions begin with, and the graphs inside their nodes."""
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    return bodies, [graph for nodes in bodies for graph in graphs(nodes)]


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    bodies, inner = _bodies(model)
    for nodes in (*bodies, *(graph.node for graph in inner)):
        yield from nodes


def _scales(model: onnx.ModelProto) -> set[str]:
    """The names of what the nodes of a quantised network take as scales, beside data and zero points."""
    return {
        name
        for node in _nodes(model)
        if node.op_type.endswith("QuantizeLinear") or node.op_type.startswith("QLinear")
        for name in node.input[1:]
    }


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor stored in the model: weights and constants, in inner graphs and functions too."""
    _, inner = _bodies(model)
    for graph in (model.graph, *inner):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
            yield from attribute.tensors


def _shape(value: onnx.ValueInfoProto) -> list[int | None] | None:
    """Return the declared shape, None for a dimension left open, or None where no shape is declared."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    return [
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None
        for dim in value.type.tensor_type.shape.dim
    ]


def _written(shape: list[int | None]) -> str:
    return " x ".join("?" if dim is None else str(dim) for dim in shape) or "one number"


def _dtype(dtype: int) -> str:
    return TensorProto.DataType.Name(dtype).lower() if dtype else "no declared type"


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:5]) or "none"
