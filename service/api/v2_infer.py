"""One inference of the Open Inference Protocol v2: from a body to inputs, from decisions to tensors."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NoReturn

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from bundle.manifest import TensorInput
from service.api import v2_tensors
from service.api.bodies import RequestModel, parse
from service.api.parameters import LONGEST_DEADLINE_MS, Name
from service.core.exceptions import Invalid, Malformed, TooLarge
from service.core.methods import LARGEST_TAU
from service.core.records import Method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bundle.manifest import ImageInput, Manifest
    from service.core.models import LoadedModel
    from service.core.records import Adjustment, Prediction

MAX_ROWS: Final = 64

Row = NDArray[Any]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a model takes or gives; -1 is a size that may vary."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ParametersIn(RequestModel):
    """What a request may choose, as in /predict, and how its outputs are to come."""

    tau: Annotated[float, Field(ge=0, le=LARGEST_TAU, description="Strength of the adjustment.")] | None = (
        None
    )
    top_k: Annotated[int, Field(ge=1, description="Classes to answer for each input.")] = 5
    priors: Name | None = Field(default=None, description="A priors name; without it `default`.")
    method: Method = "logit-adjustment"
    timeout: Annotated[int, Field(ge=1, le=1000 * LONGEST_DEADLINE_MS)] | None = Field(
        default=None, description="Microseconds until a 504, where X-Request-Timeout-Ms says no less."
    )
    binary_data_output: bool = Field(
        default=False, description="Outputs as binary data unless they say otherwise."
    )


class InputParametersIn(RequestModel):
    """How an input comes: as binary data of this length after the JSON, or as base64 in it."""

    binary_data_size: Annotated[int, Field(ge=0)] | None = None
    content_type: Literal["base64"] | None = None


class InputIn(RequestModel):
    """One input tensor. `data` is left out where the tensor follows as binary data."""

    name: Name
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=8)]
    datatype: Annotated[str, Field(max_length=16)]
    parameters: InputParametersIn = InputParametersIn()
    data: list[Any] | None = Field(
        default=None, description="Flat in row-major order, or nested as the shape is."
    )


class OutputParametersIn(RequestModel):
    """How an output is to come."""

    binary_data: bool | None = None


class OutputIn(RequestModel):
    """One output that is asked for."""

    name: Name
    parameters: OutputParametersIn = OutputParametersIn()


class InferIn(RequestModel):
    """An inference request; without `outputs` all of them are answered."""

    model_config = ConfigDict(protected_namespaces=())

    id: Annotated[str, Field(max_length=1000)] | None = None
    model_name: Name | None = Field(default=None, description="If it is sent, the one of the path.")
    parameters: ParametersIn = ParametersIn()
    inputs: Annotated[list[InputIn], Field(min_length=1)]
    outputs: list[OutputIn] | None = None


def inputs_of(manifest: Manifest) -> list[TensorSpec]:
    """Return the inputs that a model takes, one of them a request."""
    spec = manifest.input
    if isinstance(spec, TensorInput):
        return [TensorSpec(manifest.graph.input, spec.datatype, (-1, *spec.row_shape))]
    return [TensorSpec("image", "BYTES", (-1,)), TensorSpec("pixels", "UINT8", (-1, *spec.row_shape))]


def outputs_of(n_classes: int, *, recorded: bool, method: Method = "logit-adjustment") -> list[TensorSpec]:
    """Return the outputs that a model gives: a row an input, and in it the `top_k` best classes first.

    Scores of weight normalisation stand for no probabilities.
    """
    probabilities = [TensorSpec("probabilities", "FP32", (-1, -1))]
    given = [
        TensorSpec("labels", "BYTES", (-1, -1)),
        *(probabilities if method != "weight-normalisation" else []),
        TensorSpec("scores", "FP32", (-1, -1)),
        TensorSpec("indices", "INT64", (-1, -1)),
        TensorSpec("logits", "FP32", (-1, n_classes)),
    ]
    return [*given, TensorSpec("prediction_id", "BYTES", (-1,))] if recorded else given


def read(body: bytes, json_bytes: int | None, loaded: LoadedModel) -> tuple[InferIn, Sequence[bytes | Row]]:
    """Return what a body asks for, and its rows: encoded images, or arrays.

    `json_bytes` is where the JSON ends and binary data begins. Raises Malformed, Invalid or TooLarge.
    """
    if json_bytes is not None and json_bytes > len(body):
        raise Malformed(
            "malformed-tensor",
            f"Inference-Header-Content-Length is {json_bytes} and the body has {len(body)} bytes.",
        )
    head = len(body) if json_bytes is None else json_bytes
    asked = parse(InferIn, body[:head])
    if asked.model_name not in (None, loaded.name):
        raise Invalid("invalid-field", "model_name: the path names another model.", field="model_name")
    if len(asked.inputs) > 1:
        raise Invalid("invalid-tensor", "inputs: send one tensor, with a row for each input.", field="inputs")
    given = asked.inputs[0]
    _check(given, inputs_of(loaded.manifest))
    return asked, list(_values(given, memoryview(body)[head:], loaded.manifest.input))


def wanted(asked: InferIn, given: Sequence[TensorSpec]) -> list[tuple[TensorSpec, bool]]:
    """Return the outputs that a request asks for, each with whether it is to be binary. Raises Invalid."""
    everywhere = asked.parameters.binary_data_output
    if not asked.outputs:
        return [(spec, everywhere) for spec in given]
    by_name = {spec.name: spec for spec in given}
    names = ", ".join(by_name)
    found = []
    for one in asked.outputs:
        if one.name not in by_name:
            raise Invalid(
                "invalid-tensor",
                f"outputs: {one.name!r} is none of this answer's, or stands twice; there are {names}.",
                field="outputs",
            )
        binary = one.parameters.binary_data
        found.append((by_name.pop(one.name), everywhere if binary is None else binary))
    return found


def write(
    asked: InferIn,
    outputs: Sequence[tuple[TensorSpec, bool]],
    loaded: LoadedModel,
    adjustment: Adjustment,
    predictions: Sequence[Prediction],
) -> tuple[bytes, int | None]:
    """Return the answer's body, and the length of its JSON if binary data follows."""
    described: list[dict[str, object]] = []
    binary: list[bytes] = []
    for spec, as_binary in outputs:
        values = _output(spec.name, predictions, loaded.version.labels)
        one: dict[str, object] = {"name": spec.name, "datatype": spec.datatype, "shape": values.shape}
        if as_binary:
            binary.append(v2_tensors.to_binary(spec.datatype, values))
            one["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            one["data"] = v2_tensors.to_json(spec.datatype, values)
        described.append(one)
    content: dict[str, object] = {
        "model_name": loaded.name,
        "model_version": loaded.version.version,
        **({} if asked.id is None else {"id": asked.id}),
        "parameters": _said(adjustment),
        "outputs": described,
    }
    head = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join([head, *binary]), len(head) if binary else None


def _check(given: InputIn, taken: Sequence[TensorSpec]) -> None:
    """Refuse an input by its name, datatype and shape, before its data is looked at."""
    spec = next((one for one in taken if one.name == given.name), None)
    if spec is None:
        _refuse(given, f"there is no such input; there is {' or '.join(one.name for one in taken)}")
    if given.datatype != spec.datatype:
        _refuse(given, f"its datatype is {spec.datatype}")
    shape = given.shape
    if spec.datatype == "BYTES" and len(shape) == 2 and shape[1] == 1:  # as batching clients write a column
        shape = shape[:1]
    if len(shape) != len(spec.shape) or tuple(shape[1:]) != spec.shape[1:]:
        _refuse(given, f"its shape is {list(spec.shape)}, with -1 for the number of rows")
    if not shape[0]:
        _refuse(given, "it has no row; send 1 or more")
    if shape[0] > MAX_ROWS:
        raise TooLarge(
            "too-many-items",
            f"{given.name}: {shape[0]} rows are more than {MAX_ROWS}; send several requests.",
            limit_items=MAX_ROWS,
        )


def _values(given: InputIn, binary: memoryview, spec: ImageInput | TensorInput) -> NDArray[Any]:
    """Return the tensor, with its rows along the first axis; `binary` is what follows the JSON."""
    size, in_base64 = given.parameters.binary_data_size, given.parameters.content_type == "base64"
    if (size is None) == (given.data is None):
        _refuse(given, "send either data, or binary_data_size and the tensor after the JSON")
    if len(binary) != (size or 0):
        raise Malformed(
            "malformed-tensor",
            f"{given.name}: {len(binary)} bytes follow the JSON, binary_data_size promises {size or 0}.",
        )
    if in_base64 and (given.datatype != "BYTES" or given.data is None):
        _refuse(given, "content_type base64 goes with BYTES in JSON")
    if given.data is None:
        values = v2_tensors.from_binary(given.name, given.datatype, given.shape, binary)
    else:
        values = v2_tensors.from_json(given.name, given.datatype, given.shape, given.data)
    if given.datatype != "BYTES":
        if isinstance(spec, TensorInput):
            _check_values(given, values, spec)
        return values
    values = values.reshape(-1)
    if given.data is not None:
        if not in_base64:
            _refuse(given, "a file is no text; send it as binary data, or with content_type base64")
        values[:] = [_from_base64(given, text) for text in values]
    return values


def _check_values(given: InputIn, values: NDArray[Any], spec: TensorInput) -> None:
    """Refuse numbers that are not finite, or beyond what the manifest says the network takes."""
    low = -np.inf if spec.low is None else spec.low
    high = np.inf if spec.high is None else spec.high
    taken = np.isfinite(values) & (values >= low) & (values <= high)
    bad = np.flatnonzero(~taken.reshape(len(values), -1).all(axis=1))
    if bad.size:
        unbounded = spec.low is None and spec.high is None
        wanted = "finite" if unbounded else f"finite and between {low:g} and {high:g}"
        _refuse(given, f"in row {bad[0]}, counted from 0, a number is not {wanted}")


def _from_base64(given: InputIn, text: bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        _refuse(given, "its text is not base64")


def _output(name: str, predictions: Sequence[Prediction], labels: Sequence[str]) -> NDArray[Any]:
    """Return one output. Every row has as many classes: all are ranked by one adjustment."""
    if name == "logits":
        return np.stack([one.decision.logits for one in predictions])
    if name == "prediction_id":
        return _bytes([str(one.id) for one in predictions])
    top = [ranked for one in predictions for ranked in one.decision.top]
    found: NDArray[Any]
    if name == "labels":
        found = _bytes([labels[ranked.index] for ranked in top])
    elif name == "indices":
        found = np.array([ranked.index for ranked in top], dtype=np.int64)
    elif name == "scores":
        limit = float(np.finfo(np.float32).max)
        found = np.array([ranked.score for ranked in top]).clip(-limit, limit).astype(np.float32)
    else:
        found = np.array([ranked.probability for ranked in top], dtype=np.float32)
    return found.reshape(len(predictions), -1)


def _bytes(texts: Sequence[str]) -> NDArray[Any]:
    return np.array([text.encode() for text in texts], dtype=object)


def _said(adjustment: Adjustment) -> dict[str, str | float]:
    """Say how scores were made, in the flat form of the protocol's parameters."""
    said: dict[str, str | float] = {
        "method": adjustment.method,
        "tau": adjustment.tau,
        "temperature": adjustment.temperature,
    }
    if adjustment.prior is not None:
        said |= {"priors": adjustment.prior.name, "priors_version": adjustment.prior.version}
    return said


def _refuse(given: InputIn, why: str) -> NoReturn:
    raise Invalid("invalid-tensor", f"{given.name}: {why}.", field=given.name)
