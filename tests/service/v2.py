"""A v2 client of a few lines, from the specification: it builds bodies, reads answers, knows shapes."""

import json
import math

import numpy as np

from tests import tiny

LENGTH = "Inference-Header-Content-Length"
INFER = "/v2/models/tiny/infer"
DTYPES = {"FP32": "<f4", "FP64": "<f8", "FP16": "<f2", "INT64": "<i8", "INT32": "<i4", "UINT8": "u1"}


def elements(files):
    """BYTES in binary: each element after its length."""
    return b"".join(len(file).to_bytes(4, "little") + file for file in files)


def images(files, **more):
    """A request of encoded images: the JSON, and the binary data behind it."""
    raw = elements(files)
    tensor = {
        "name": "image",
        "shape": [len(files)],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(raw)},
    }
    return {"inputs": [tensor], **more}, raw


def array(values, datatype="UINT8", name="pixels", **more):
    """A request of one tensor of numbers, in binary."""
    raw = np.asarray(values, dtype=DTYPES[datatype]).tobytes()
    tensor = {
        "name": name,
        "shape": list(np.shape(values)),
        "datatype": datatype,
        "parameters": {"binary_data_size": len(raw)},
    }
    return {"inputs": [tensor], **more}, raw


def post(client, asked, raw=None, path=INFER, headers=None, encode=None):
    """Send a request; without `raw` it is JSON alone. `encode` compresses the body."""
    head = json.dumps(asked).encode()
    headers = dict(headers or {})
    if raw is not None:
        headers[LENGTH] = str(len(head))
    body = head + (raw or b"")
    return client.post(path, content=encode(body) if encode else body, headers=headers)


def outputs(answer):
    """Return the outputs by name, whatever their form; fails where the answer is not as specified."""
    assert answer.status_code == 200, answer.text
    body = answer.content
    head = int(answer.headers.get(LENGTH, len(body)))
    content = json.loads(body[:head])
    assert set(content) - {"id"} == {"model_name", "model_version", "parameters", "outputs"}
    assert all(type(value) in (str, int, float, bool) for value in content["parameters"].values())
    found, place = {}, head
    for one in content["outputs"]:
        count = math.prod(one["shape"])
        if "data" in one:
            assert set(one) == {"name", "datatype", "shape", "data"}
            values = one["data"]
        else:
            assert set(one) == {"name", "datatype", "shape", "parameters"}
            size = one["parameters"]["binary_data_size"]
            raw, place = body[place : place + size], place + size
            values = texts(raw) if one["datatype"] == "BYTES" else np.frombuffer(raw, DTYPES[one["datatype"]])
        assert len(values) == count
        found[one["name"]] = np.array(values).reshape(one["shape"])
    assert place == len(body)
    return found


def texts(raw):
    found = []
    while raw:
        size = int.from_bytes(raw[:4], "little")
        found.append(raw[4 : 4 + size].decode())
        raw = raw[4 + size :]
    return found


def error(answer, status):
    """The text of a refusal; fails where it is not of the protocol's form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    (text,) = answer.json().values()
    assert list(answer.json()) == ["error"]
    assert text.endswith(".")
    return text


def noise(n, seed=3):
    """Seeded pixels of the tiny network's size."""
    return np.random.default_rng(seed).integers(0, 256, (n, tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
