"""Tensors of the Open Inference Protocol v2, and the two forms they have on the wire, JSON and binary.

A tensor of numbers is little-endian and row-major in binary; BYTES elements are text or files, each after its
length in four bytes. In memory BYTES is an object array of `bytes`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from service.core.exceptions import Invalid, Malformed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

NUMPY: Final[Mapping[str, np.dtype[Any]]] = {
    "UINT8": np.dtype("u1"),
    "INT8": np.dtype("i1"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
"""The datatypes that models here take or give."""

_LENGTH_BYTES: Final = 4
_MOST: Final = 2**31


def from_binary(name: str, datatype: str, shape: Sequence[int], raw: memoryview) -> NDArray[Any]:
    """Return the tensor that `raw` holds; numbers are a view of it, not a copy.

    Raises Malformed where `raw` is not as long as shape and datatype say, or an element runs past its end.
    """
    count = _count(name, shape)
    if datatype == "BYTES":
        return _objects(_elements(name, raw, count), shape)
    dtype = NUMPY[datatype]
    if len(raw) != count * dtype.itemsize:
        raise Malformed(
            "malformed-tensor",
            f"{name}: {len(raw)} bytes are no {datatype} of shape {list(shape)}, which takes "
            f"{count * dtype.itemsize}.",
        )
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def from_json(name: str, datatype: str, shape: Sequence[int], data: Sequence[Any]) -> NDArray[Any]:
    """Return the tensor that a JSON list holds, flat in row-major order or nested as the shape is.

    Text of BYTES becomes its UTF-8. Raises Invalid for another count or nesting than the shape's, and for
    elements that are not of the datatype.
    """
    flat = _flat(name, shape, data)
    kinds = {type(element) for element in flat}
    if datatype == "BYTES":
        if kinds - {str}:
            _refuse(name, "a BYTES tensor in JSON is a list of texts")
        return _objects([element.encode("utf-8", "surrogatepass") for element in flat], shape)
    dtype = NUMPY[datatype]
    if datatype == "FP16":
        _refuse(name, "FP16 has no form in JSON; send it as binary data")
    if kinds - ({int, float} if dtype.kind == "f" else {int}):
        _refuse(name, f"{datatype} is a list of {'numbers' if dtype.kind == 'f' else 'whole numbers'}")
    if dtype.kind != "f":
        limits = np.iinfo(dtype)
        if flat and not limits.min <= min(flat) <= max(flat) <= limits.max:
            _refuse(name, f"{datatype} lies between {limits.min} and {limits.max}")
        return np.array(flat, dtype=dtype).reshape(shape)
    try:
        with np.errstate(over="ignore"):  # to infinity, which whoever takes the tensor refuses
            return np.array(flat, dtype=np.float64).astype(dtype).reshape(shape)
    except OverflowError:
        _refuse(name, f"a number is too large for {datatype}")


def to_binary(datatype: str, values: NDArray[Any]) -> bytes:
    """Return the tensor's bytes."""
    if datatype == "BYTES":
        return b"".join(
            part
            for element in values.ravel()
            for part in (len(element).to_bytes(_LENGTH_BYTES, "little"), element)
        )
    return np.ascontiguousarray(values, dtype=NUMPY[datatype]).tobytes()


def to_json(datatype: str, values: NDArray[Any]) -> Any:
    """Return the tensor's elements, flat, in a form that orjson writes. BYTES must hold UTF-8."""
    if datatype == "BYTES":
        return [element.decode() for element in values.ravel()]
    return np.ascontiguousarray(values.ravel(), dtype=NUMPY[datatype].newbyteorder("="))


def _count(name: str, shape: Sequence[int]) -> int:
    """Return how many elements there are; one of none may still have a shape that no array can have."""
    if math.prod(max(1, size) for size in shape) > _MOST:
        _refuse(name, f"no tensor of shape {list(shape)} is taken")
    return math.prod(shape)


def _elements(name: str, raw: memoryview, count: int) -> list[bytes]:
    found: list[bytes] = []
    place = 0
    while place < len(raw) and len(found) < count:
        start = place + _LENGTH_BYTES
        place = start + int.from_bytes(raw[place:start], "little")
        if start > len(raw) or place > len(raw):
            raise Malformed(
                "malformed-tensor", f"{name}: element {len(found)} runs past the end of the tensor."
            )
        found.append(bytes(raw[start:place]))
    if len(found) != count or place != len(raw):
        raise Malformed(
            "malformed-tensor",
            f"{name}: its {len(raw)} bytes do not hold {count} BYTES elements, each after"
            " its length in four bytes.",
        )
    return found


def _objects(elements: Sequence[bytes], shape: Sequence[int]) -> NDArray[Any]:
    found = np.empty(len(elements), dtype=object)
    found[:] = elements
    return found.reshape(shape)


def _flat(name: str, shape: Sequence[int], data: Sequence[Any]) -> list[Any]:
    """Return the elements in row-major order: `data` is flat, or has one level of lists a dimension."""
    if not any(isinstance(element, list) for element in data):
        if len(data) != _count(name, shape):
            _refuse(name, f"{len(data)} elements are not those of shape {list(shape)}")
        return list(data)
    _count(name, shape)
    level: list[Any] = [data]
    for size in shape:
        if any(not isinstance(one, list) or len(one) != size for one in level):
            _refuse(name, f"its lists are not nested as shape {list(shape)} is")
        level = [element for one in level for element in one]
    return level


def _refuse(name: str, why: str) -> NoReturn:
    raise Invalid("invalid-tensor", f"{name}: {why}.", field=name)
