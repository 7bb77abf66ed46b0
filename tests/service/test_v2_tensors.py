"""Tensors there and back in both forms, and whatever else may come in their place."""

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from service.api import v2_infer, v2_tensors
from service.core.exceptions import Refusal
from tests import tiny
from tests.service import v2

NUMBERS = [name for name in v2_tensors.NUMPY if name != "BYTES"]


@st.composite
def numbers(draw):
    datatype = draw(st.sampled_from(NUMBERS))
    dtype = v2_tensors.NUMPY[datatype]
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))
    finite = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    return datatype, draw(hnp.arrays(dtype, shape, elements=hnp.from_dtype(dtype, **finite)))


@given(numbers())
def test_numbers_come_back_from_binary_and_from_json(case):
    datatype, values = case
    raw = memoryview(v2_tensors.to_binary(datatype, values))
    back = v2_tensors.from_binary("x", datatype, values.shape, raw)
    np.testing.assert_array_equal(back, values)
    if datatype != "FP16":
        flat, nested = values.ravel().tolist(), values.tolist()
        for data in (flat, nested, json.loads(json.dumps(nested))):
            back = v2_tensors.from_json("x", datatype, values.shape, data)
            np.testing.assert_array_equal(back, values)
            assert back.dtype == v2_tensors.NUMPY[datatype]


@given(st.lists(st.binary(max_size=20), max_size=8))
def test_bytes_come_back_from_binary(elements):
    values = np.empty(len(elements), dtype=object)
    values[:] = elements
    raw = v2_tensors.to_binary("BYTES", values)
    assert raw == v2.elements(elements)
    assert v2_tensors.from_binary("x", "BYTES", [len(elements)], memoryview(raw)).tolist() == elements


def test_binary_is_little_endian_and_row_major():
    values = np.array([[1, 2], [3, 4]], dtype=">i4").T
    assert v2_tensors.to_binary("INT32", values) == bytes([1, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0])


@given(
    st.sampled_from([*v2_tensors.NUMPY]),
    st.lists(st.integers(0, 2**64), max_size=4),
    st.binary(max_size=64),
)
@example("FP64", [2**32, 2**32], b"")
@example("BYTES", [0, 2**64], b"")
@example("BYTES", [1], b"\xff\xff\xff\xff")
@example("BYTES", [2**64], b"")
@example("FP32", [0, 2**30, 2**30, 2**30, 2**30], b"")
def test_any_bytes_are_a_tensor_of_that_shape_or_refused(datatype, shape, raw):
    try:
        values = v2_tensors.from_binary("x", datatype, shape, memoryview(raw))
    except Refusal:
        return
    assert list(values.shape) == shape
    assert v2_tensors.to_binary(datatype, values) == raw


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=12)


@given(
    st.sampled_from([*v2_tensors.NUMPY]), st.lists(st.integers(0, 4), max_size=3), st.lists(trees, max_size=6)
)
@example("FP32", [1], [10**400])
@example("FP32", [1], [1e300])
@example("INT64", [2], [2**63, 0])
@example("BYTES", [1], ["\ud800"])
def test_any_list_is_a_tensor_of_that_shape_or_refused(datatype, shape, data):
    try:
        values = v2_tensors.from_json("x", datatype, shape, data)
    except Refusal:
        return
    assert list(values.shape) == shape
    assert values.dtype == v2_tensors.NUMPY[datatype]


@pytest.fixture(scope="module")
def model(lasting_client):
    return lasting_client.app.state.parts.models.get("tiny")


GOOD = [v2.images([b"GIF89a", b""]), v2.array(v2.noise(1)[:, :, :, :])]
KEYS = ["id", "parameters", "inputs", "outputs", "name", "shape", "datatype", "data", "binary_data_size"]
junk = st.recursive(
    scalars | st.sampled_from(["image", "pixels", "BYTES", "UINT8", 2**63, -1]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner)
    ),
    max_leaves=12,
)


@st.composite
def bodies(draw):
    """Good requests with a bit of the JSON, its length or the binary data changed, and some far from good."""
    asked, raw = draw(st.sampled_from(GOOD))
    asked = json.loads(json.dumps(asked))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.sampled_from([asked, asked["inputs"][0], asked["inputs"][0]["parameters"]]))
        place[draw(st.sampled_from([*place, *KEYS]))] = draw(junk)
        if not (
            isinstance(asked["inputs"], list) and asked["inputs"] and isinstance(asked["inputs"][0], dict)
        ):
            break
        if not isinstance(asked["inputs"][0].get("parameters"), dict):
            break
    head = draw(
        st.just(json.dumps(asked).encode()) | st.binary(max_size=30) | junk.map(json.dumps).map(str.encode)
    )
    for _ in range(draw(st.integers(0, 2))):
        cut, end = sorted(draw(st.tuples(st.integers(0, len(raw)), st.integers(0, len(raw)))))
        raw = raw[:cut] + draw(st.binary(max_size=6)) + raw[end:]
    return head + raw, draw(st.none() | st.just(len(head)) | st.integers(0, 2**70))


@given(bodies())
def test_any_body_is_rows_that_the_model_takes_or_refused(model, body):
    try:
        _, rows = v2_infer.read(*body, model)
    except Refusal as refusal:
        assert refusal.detail.endswith(".")
        return
    assert 1 <= len(rows) <= v2_infer.MAX_ROWS
    assert all(
        isinstance(row, bytes) or (row.dtype == np.uint8 and row.shape == (tiny.SIZE, tiny.SIZE, 3))
        for row in rows
    )


def test_good_bodies_are_among_those_that_are_read(model):
    for asked, raw in GOOD:
        head = json.dumps(asked).encode()
        _, rows = v2_infer.read(head + raw, len(head), model)
        assert len(rows) == asked["inputs"][0]["shape"][0]
