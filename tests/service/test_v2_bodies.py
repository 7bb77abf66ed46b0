"""The body of an inference request under /v2: lengths, encodings, and tensors that are not as promised."""

import gzip
import json
import zlib

import numpy as np
import pytest

from tests import tiny
from tests.service import v2


def pixels_of(**changes):
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, tiny.SIZE, tiny.SIZE, 3]}
    return {**tensor, "data": [0] * (tiny.SIZE**2 * 3), **changes}


@pytest.mark.parametrize(
    "tensor",
    [
        pixels_of(name="input0"),
        pixels_of(datatype="FP32"),
        pixels_of(datatype="BOOL"),
        pixels_of(shape=[1, 3, tiny.SIZE, tiny.SIZE]),
        pixels_of(shape=[tiny.SIZE, tiny.SIZE, 3]),
        pixels_of(shape=[]),
        pixels_of(shape=[-1, tiny.SIZE, tiny.SIZE, 3]),
        pixels_of(shape=[1.0, tiny.SIZE, tiny.SIZE, 3]),
        pixels_of(shape=[2**63, tiny.SIZE, 2**63, 3]),
        pixels_of(shape=[0, tiny.SIZE, tiny.SIZE, 3], data=[]),
        pixels_of(data=[0]),
        pixels_of(data=[256] * (tiny.SIZE**2 * 3)),
        pixels_of(data=[-1] * (tiny.SIZE**2 * 3)),
        pixels_of(data=[0.5] * (tiny.SIZE**2 * 3)),
        pixels_of(data=[True] * (tiny.SIZE**2 * 3)),
        pixels_of(data=[None] * (tiny.SIZE**2 * 3)),
        pixels_of(data=["0"] * (tiny.SIZE**2 * 3)),
        pixels_of(data=[[0]] * (tiny.SIZE**2 * 3)),
        pixels_of(data=None),
        pixels_of(data="0"),
        pixels_of(parameters={"binary_data_size": -1}),
        pixels_of(parameters={"shared_memory_region": "mine", "shared_memory_byte_size": 192}),
        pixels_of(parameters={"content_type": "base64"}),
        {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["GIF89a"]},
        {
            "name": "image",
            "datatype": "BYTES",
            "shape": [1],
            "data": ["*"],
            "parameters": {"content_type": "base64"},
        },
        {"name": "image", "datatype": "BYTES", "shape": [1, 2], "data": ["a", "b"]},
        {"name": "image", "datatype": "BYTES", "shape": [2], "data": ["a"]},
        {"name": "image", "datatype": "BYTES", "shape": [1], "data": [1]},
    ],
)
def test_a_tensor_that_is_not_as_the_model_takes_it_is_a_422(lasting_client, tensor):
    v2.error(v2.post(lasting_client, {"inputs": [tensor]}), 422)


def test_one_input_is_sent_and_not_none_or_two(lasting_client):
    for inputs in ([], [pixels_of(), pixels_of()], {}, None):
        v2.error(v2.post(lasting_client, {"inputs": inputs}), 422)
    v2.error(v2.post(lasting_client, {}), 422)


def test_more_rows_than_a_form_may_have_are_a_413(lasting_client):
    assert v2.outputs(v2.post(lasting_client, *v2.array(v2.noise(64))))["labels"].shape == (64, 4)
    v2.error(v2.post(lasting_client, *v2.array(v2.noise(65))), 413)


def test_one_bad_file_fails_the_request_and_is_named_by_its_place(lasting_client, image):
    assert "Input 1," in v2.error(v2.post(lasting_client, *v2.images([image, b"junk", b""])), 415)
    assert "Input 2," in v2.error(v2.post(lasting_client, *v2.images([image, image, image[:60]])), 422)


@pytest.mark.parametrize("length", [0, 1, 10_000])
def test_a_json_length_that_is_not_the_jsons_is_a_400(lasting_client, image, length):
    asked, raw = v2.images([image])
    body = json.dumps(asked).encode() + raw
    v2.error(lasting_client.post(v2.INFER, content=body, headers={v2.LENGTH: str(length)}), 400)


@pytest.mark.parametrize("length", ["-1", "1e3", "", "0x10", "9" * 40])
def test_a_json_length_that_is_no_number_is_a_422(lasting_client, image, length):
    asked, raw = v2.images([image])
    body = json.dumps(asked).encode() + raw
    v2.error(lasting_client.post(v2.INFER, content=body, headers={v2.LENGTH: length}), 422)


@pytest.mark.parametrize("change", [b"", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\1"])
def test_binary_data_that_is_not_what_the_json_promises_is_a_400(lasting_client, image, change):
    asked, raw = v2.images([image])
    promised = asked["inputs"][0]["parameters"]
    if change:
        v2.error(v2.post(lasting_client, asked, raw + change), 400)
        promised["binary_data_size"] += len(change)
        v2.error(v2.post(lasting_client, asked, raw + change), 400)
    else:
        v2.error(v2.post(lasting_client, asked, raw[:-1]), 400)
        promised["binary_data_size"] -= 1
        v2.error(v2.post(lasting_client, asked, raw[:-1]), 400)
        promised["binary_data_size"] = 2**62
        v2.error(v2.post(lasting_client, asked, raw), 400)


def test_what_is_no_json_is_a_400_whatever_its_content_type(lasting_client):
    for body in (b"", b"{", b"\xff", b'{"inputs": [}'):
        v2.error(
            lasting_client.post(v2.INFER, content=body, headers={"Content-Type": "application/json"}), 400
        )
    v2.error(lasting_client.post(v2.INFER, content=b'{"inputs": NaN}'), 422)
    v2.error(lasting_client.post(v2.INFER, content=b'{"inputs": 1, "inputs": 1}'), 422)


@pytest.mark.parametrize("kind", ["application/json", "image/png", "junk", "multipart/form-data"])
def test_the_content_type_does_not_matter(lasting_client, image, kind):
    v2.outputs(v2.post(lasting_client, *v2.images([image]), headers={"Content-Type": kind}))


@pytest.mark.parametrize(("encoding", "encode"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_compressed_body_is_inflated(lasting_client, image, encoding, encode):
    asked, raw = v2.images([image])
    headers = {"Content-Encoding": encoding}
    v2.outputs(v2.post(lasting_client, asked, raw, headers=headers, encode=encode))
    v2.error(v2.post(lasting_client, asked, raw, headers=headers), 400)
    v2.error(v2.post(lasting_client, asked, raw, headers=headers, encode=lambda body: encode(body)[:-5]), 400)
    v2.error(
        v2.post(lasting_client, asked, raw, headers=headers, encode=lambda body: encode(body) + b"x"), 400
    )
    v2.error(v2.post(lasting_client, asked, raw, headers={"Content-Encoding": "br"}), 400)


def test_a_bomb_is_a_413_and_what_was_held_is_given_back(client_for, image):
    client = client_for(max_body_bytes=100_000)
    for size in (100_001, 50_000_000):
        body = gzip.compress(b" " * size)
        v2.error(client.post(v2.INFER, content=body, headers={"Content-Encoding": "gzip"}), 413)
    v2.error(client.post(v2.INFER, content=b" " * 100_001), 413)
    v2.outputs(v2.post(client, *v2.images([image])))
    assert client.app.state.intake.held_bytes == 0


def test_a_large_json_tensor_is_read_beside_the_loop_with_the_same_answer(lasting_client):
    pixels = v2.noise(64)
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.tolist()}
    body = json.dumps({"inputs": [tensor]}, indent=8)
    assert len(body) > 1 << 18
    found = v2.outputs(lasting_client.post(v2.INFER, content=body))
    np.testing.assert_allclose(found["logits"], tiny.logits(pixels), atol=1e-4)
