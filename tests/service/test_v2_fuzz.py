"""Requests of the Open Inference Protocol that lie about themselves: read as they are meant, or refused."""

from __future__ import annotations

import base64
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bundle.manifest import TensorInput
from service.adapters import bundles
from service.api import v2_infer, v2_tensors
from service.api.problems import STATUS
from service.core.batcher import Capacity
from service.core.exceptions import Refusal
from tests import tiny
from tests.service import v2

SIDE = tiny.SIZE
ROW = (SIDE, SIDE, 3)
DATATYPES = [*v2_tensors.NUMPY, "BOOL", "BF16", "", "fp32", "x" * 17]
SIZES = [0, 1, 2, 3, SIDE, 63, 64, 65, -1, 2**31, 2**63, 2**64, 10**30, 1.0, True, None, "1"]
NAMES = ["image", "pixels", "", "x" * 65, "\ud800", None, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    loaded = bundles.load(tiny.make(tmp_path_factory.mktemp("m") / "tiny"), "cpu", Capacity(workers=1))
    yield loaded
    loaded.batcher.stop()


raws = st.lists(st.binary(max_size=12), min_size=1, max_size=3)
noise = st.integers(1, 3).map(v2.noise)


def in_base64(files):
    return [base64.b64encode(file).decode() for file in files]


# What a good request is made of: its tensor, and what follows the JSON.
GOOD = st.one_of(
    raws.map(lambda files: (v2.images(files)[0]["inputs"][0], v2.elements(files))),
    noise.map(lambda pixels: (v2.array(pixels)[0]["inputs"][0], pixels.tobytes())),
    raws.map(
        lambda files: (
            {
                "name": "image",
                "shape": [len(files)],
                "datatype": "BYTES",
                "parameters": {"content_type": "base64"},
                "data": in_base64(files),
            },
            b"",
        )
    ),
    noise.map(
        lambda pixels: (
            {"name": "pixels", "shape": list(pixels.shape), "datatype": "UINT8", "data": pixels.tolist()},
            b"",
        )
    ),
)
DATA = st.one_of(
    st.lists(st.integers(-1, 256), max_size=4),
    st.lists(st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.just([])), max_size=4),
    st.recursive(st.just(0), lambda inner: st.lists(inner, max_size=2), max_leaves=9),
    st.sampled_from([None, {}, 0, "AAAA", ["AAAA"], ["A"], [10**30], [[[[[[[[[[]]]]]]]]]]]),
)
SHAPES = st.one_of(
    st.lists(st.sampled_from(SIZES), max_size=9),
    st.sampled_from(
        [None, {}, "1", [[1]], [2**62, 2**62], [0, 2**63], [1, 2**31, SIDE, 3], [1, 1], [1, 3, SIDE, SIDE]]
    ),
)
FIELDS = {
    "name": st.sampled_from(NAMES),
    "shape": SHAPES,
    "datatype": st.sampled_from(DATATYPES),
    "data": DATA,
    "parameters": st.sampled_from([{}, None, [], {"content_type": "gzip"}, {"content_type": "base64"}]),
    "extra": DATA,
}
ASKED = {
    "id": st.sampled_from(["x", "", "\ud800", "x" * 1001, 3]),
    "parameters": st.sampled_from([{"tau": 1}, {"tau": 1e999}, {"top_k": 2**70}, [], {"a": {"b": []}}]),
    "outputs": st.sampled_from(
        [[], [{"name": "labels"}], {}, [{"name": "x", "parameters": {"binary_data": 1}}]]
    ),
    "model_name": st.sampled_from(["tiny", "other", 1]),
    "inputs": st.sampled_from([[], {}, None, [1]]),
    "more": DATA,
}
LIES = ["field", "asked", "size", "tail", "length", "twice", "deep", "json", "two"]


@st.composite
def bodies(draw):
    """A body and what its Inference-Header-Content-Length says; true but for two things at most."""
    tensor, tail = draw(GOOD)
    tensor, asked = dict(tensor), {}
    lies = draw(st.sets(st.sampled_from(LIES), max_size=2))
    if "field" in lies:
        name = draw(st.sampled_from(list(FIELDS)))
        tensor[name] = draw(FIELDS[name])
    if "size" in lies:
        sizes = [0, 1, len(tail) - 1, len(tail) + 1, 2**62, -1, 1.5, "9", None, True]
        tensor["parameters"] = {"binary_data_size": draw(st.sampled_from(sizes))}
    if "tail" in lies:
        place = draw(st.integers(0, len(tail)))
        tail = tail[:place] + draw(st.binary(max_size=4)) + tail[place + draw(st.integers(0, 4)) :]
    asked["inputs"] = [tensor] * (2 if "two" in lies else 1)
    if "asked" in lies:
        name = draw(st.sampled_from(list(ASKED)))
        asked[name] = draw(ASKED[name])
    head = json.dumps(asked).encode()
    if "twice" in lies:
        head = head[:-1] + b', "inputs": ' + json.dumps(asked["inputs"]).encode() + b"}"
    if "deep" in lies:
        depth = draw(st.sampled_from([50, 5000]))
        head = head[:-1] + b', "id": ' + b"[" * depth + b"]" * depth + b"}"
    if "json" in lies:
        place = draw(st.integers(0, len(head)))
        head = head[:place] + draw(st.binary(max_size=3)) + head[place + draw(st.integers(0, 3)) :]
    whole, length = head + tail, len(head) if tail or draw(st.booleans()) else None
    if "length" in lies:
        odd = [0, 1, len(head) - 1, len(head) + 1, len(whole), len(whole) + 1, 2**63, None]
        length = draw(st.sampled_from(odd))
    return whole, length


LYING = json.dumps(
    {"inputs": [{"name": "image", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": 9}}]}
).encode()


@pytest.mark.slow
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@example((LYING + b"\5\0\0\0hello", len(LYING)))
@example((LYING + b"\xff\xff\xff\xffhello", len(LYING)))
@example((b"", 0))
@given(bodies())
def test_a_body_is_read_as_it_says_or_refused(model, sent):
    body, json_bytes = sent
    try:
        asked, rows = v2_infer.read(body, json_bytes, model)
    except Refusal as refusal:
        assert 400 <= next(STATUS[kind] for kind in type(refusal).__mro__ if kind in STATUS) < 500
        assert refusal.detail.endswith(".")
        return
    (given_input,) = asked.inputs
    assert len(rows) == given_input.shape[0] >= 1
    if given_input.name == "pixels":
        assert all(row.shape == ROW and row.dtype == np.uint8 for row in rows)
        if given_input.data is None:
            assert body[json_bytes:] == b"".join(row.tobytes() for row in rows)
    elif given_input.data is None:
        assert body[json_bytes:] == v2.elements(rows)
    else:
        assert in_base64(rows) == [one[0] if isinstance(one, list) else one for one in given_input.data]


numbers = st.sampled_from(["FP16", "FP32", "FP64", "INT8", "INT32", "INT64", "UINT8"])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(numbers, st.lists(st.integers(0, 4), max_size=4), st.data())
def test_a_tensor_of_numbers_comes_back_from_its_bytes_or_they_are_of_another_length(datatype, shape, drawn):
    size = math.prod(shape) * v2_tensors.NUMPY[datatype].itemsize
    raw = drawn.draw(st.binary(min_size=size, max_size=size))
    values = v2_tensors.from_binary("x", datatype, shape, memoryview(raw))
    assert (values.shape, v2_tensors.to_binary(datatype, values)) == (tuple(shape), raw)
    for other in (raw + b"\0", raw[:-1] if raw else b"\0\0"):
        with pytest.raises(Refusal):
            v2_tensors.from_binary("x", datatype, shape, memoryview(other))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=64), st.integers(0, 5))
def test_elements_are_found_whole_or_not_at_all(raw, count):
    try:
        found = v2_tensors.from_binary("x", "BYTES", [count], memoryview(raw))
    except Refusal:
        return
    assert len(found) == count
    assert v2_tensors.to_binary("BYTES", found) == raw


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(SIZES[:-4]).filter(lambda size: size >= 0), max_size=8), numbers)
def test_no_shape_takes_memory_that_was_not_sent(shape, datatype):
    try:
        values = v2_tensors.from_binary("x", datatype, shape, memoryview(b""))
    except Refusal:
        return
    assert values.size == 0


def test_rows_of_a_tensor_model_are_checked_number_by_number(model):
    spec = TensorInput(kind="tensor", datatype="FP32", shape=[2], low=-1, high=1)
    given_input = v2_infer.InputIn(name="x", shape=[2, 2], datatype="FP32")
    for bad in (np.nan, np.inf, -np.inf, 1.5, -2):
        values = np.array([[0, 1], [bad, 0]], np.float32)
        with pytest.raises(Refusal, match="row 1"):
            v2_infer._check_values(given_input, values, spec)
