"""Bundles that eat no images: composed, served through /v2 alone, adjusted and recorded as all others."""

import numpy as np
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError
from starlette.testclient import TestClient

from bundle.files import BundleError
from bundle.manifest import TensorInput
from service.adapters.onnx_engine import OnnxEngine
from service.adapters.serving_graph import compose
from service.app import create_app
from service.settings import Settings
from tests.service import rows, v2
from tests.service.problems import problem

MEASURED = TensorInput(kind="tensor", datatype="FP32", shape=[3, 2])
TOKENS = TensorInput(kind="tensor", datatype="INT64", shape=[5], low=0, high=rows.WORDS - 1)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A service with a model of measurements (the default) and one of tokens."""
    folder = tmp_path_factory.mktemp("rows")
    rows.bundle(folder / "models" / "measured", rows.vectors(), MEASURED)
    rows.bundle(folder / "models" / "tokens", rows.tokens(), TOKENS)
    settings = Settings(models_dir=folder / "models", state_dir=folder / "state")
    with TestClient(create_app(settings)) as client:
        yield client


def infer(client, model, values, datatype, **more):
    return v2.post(client, *v2.array(values, datatype, model, **more), path=f"/v2/models/{model}/infer")


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64", "UINT8", "INT8", "INT32", "INT64"])
def test_rows_of_every_datatype_reach_the_network_as_they_are(tmp_path, datatype):
    bounds = {} if datatype.startswith("FP") else {"low": 0, "high": 99}
    spec = TensorInput(kind="tensor", datatype=datatype, shape=list(rows.SHAPE), **bounds)
    model = rows.vectors(helper.np_dtype_to_tensor_dtype(spec.dtype))
    engine = OnnxEngine(compose(rows.bundle(tmp_path / "m", model, spec)), "cpu", largest_batch=4)
    values = np.random.default_rng(2).integers(0, 100, (3, *rows.SHAPE)).astype(spec.dtype)
    out = engine.run(values, np.zeros((1, 4)), np.zeros(3, dtype=np.int64), 4)
    np.testing.assert_allclose(out.logits, rows.of_vectors(values), atol=1e-4)


def test_measurements_are_decided_adjusted_and_recorded(client):
    values = np.random.default_rng(1).normal(0, 2, (7, *rows.SHAPE)).astype(np.float32)
    found = v2.outputs(infer(client, "measured", values, "FP32", parameters={"tau": 2, "top_k": 4}))
    logits = rows.of_vectors(values)
    np.testing.assert_allclose(found["logits"], logits, atol=1e-4)
    body = {"logits": found["logits"].tolist(), "tau": 2, "top_k": 4, "model": "measured"}
    said = client.post("/adjust", json=body).json()["predictions"]
    assert found["indices"].tolist() == [[entry["index"] for entry in one["top"]] for one in said]
    assert client.get(f"/predictions/{found['prediction_id'][0]}").status_code == 200
    in_json = {"name": "measured", "datatype": "FP32", "shape": list(values.shape), "data": values.tolist()}
    again = v2.outputs(v2.post(client, {"inputs": [in_json]}, path="/v2/models/measured/infer"))
    np.testing.assert_array_equal(again["logits"], found["logits"])


def test_tokens_are_decided(client):
    values = np.random.default_rng(1).integers(0, rows.WORDS, (4, 5))
    found = v2.outputs(infer(client, "tokens", values, "INT64"))
    np.testing.assert_allclose(found["logits"], rows.of_tokens(values), atol=1e-5)


def test_the_metadata_says_what_goes_in(client):
    measured = client.get("/v2/models/measured").json()["inputs"]
    assert measured == [{"name": "measured", "datatype": "FP32", "shape": [-1, 3, 2]}]
    assert client.get("/models/tokens").json()["input"] == TOKENS.model_dump()
    assert client.get("/readyz").status_code == 200
    assert client.get("/v2/models/tokens/ready").json() == {"name": "tokens", "ready": True}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_a_422_that_names_its_row(client, bad):
    values = np.zeros((3, *rows.SHAPE), dtype=np.float32)
    values[1, 2, 0] = bad
    assert "row 1," in v2.error(infer(client, "measured", values, "FP32"), 422)
    in_json = {"name": "measured", "datatype": "FP32", "shape": [1, 3, 2], "data": [1e39] * 6}
    v2.error(v2.post(client, {"inputs": [in_json]}, path="/v2/models/measured/infer"), 422)


@pytest.mark.parametrize("bad", [-1, rows.WORDS, 2**62])
def test_a_place_beyond_the_table_is_a_422_and_costs_nobody_else_an_answer(client, bad):
    values = np.zeros((2, 5), dtype=np.int64)
    values[0, 4] = bad
    assert "between 0 and 9" in v2.error(infer(client, "tokens", values, "INT64"), 422)


def test_an_image_is_refused_and_pointed_to_v2(client, image):
    for model in ("measured", "tokens"):
        answer = problem(client.post(f"/predict?model={model}", content=image), 422, "not-of-images")
        assert f"/v2/models/{model}/infer" in answer["detail"]
    v2.error(v2.post(client, *v2.images([image]), path="/v2/models/measured/infer"), 422)


@pytest.mark.parametrize(
    ("code", "model", "change"),
    [
        ("model-dtype", rows.vectors(TensorProto.DOUBLE), {}),
        ("model-input", rows.vectors(), {"shape": [3, 3]}),
        ("model-input", rows.vectors(), {"shape": [6]}),
        ("model-batch", rows.vectors(batch=4), {}),
    ],
)
def test_a_network_that_takes_other_rows_than_the_manifest_says_is_refused(tmp_path, code, model, change):
    spec = TensorInput.model_validate({**MEASURED.model_dump(), **change})
    with pytest.raises(BundleError) as caught:
        compose(rows.bundle(tmp_path / "m", model, spec))
    assert caught.value.code == code


@pytest.mark.parametrize(
    "fields",
    [
        {"datatype": "BYTES"},
        {"shape": []},
        {"shape": [0]},
        {"shape": [2**20, 2**20]},
        {"low": 1, "high": 0},
        {"low": float("nan")},
        {"datatype": "INT64"},
        {"datatype": "INT64", "low": 0},
        {"datatype": "INT64", "low": 0, "high": 1.5},
        {"datatype": "UINT8", "low": 0, "high": 256},
        {"datatype": "INT64", "low": 0, "high": 2**63},
    ],
)
def test_an_input_that_no_row_can_be_is_refused(fields):
    with pytest.raises(ValidationError):
        TensorInput.model_validate({**MEASURED.model_dump(), **fields})


@pytest.mark.parametrize(
    ("datatype", "low", "high", "least", "most"),
    [
        ("FP64", None, None, -1, 1),
        ("FP32", 5, None, 5, 5),
        ("FP32", None, -5, -5, -5),
        ("FP16", 0, 3, 0, 1),
        ("INT64", 2, 2, 2, 2),
        ("INT8", -128, 127, -128, 127),
    ],
)
def test_noise_lies_within_the_bounds(datatype, low, high, least, most):
    spec = TensorInput(kind="tensor", datatype=datatype, shape=[500], low=low, high=high)
    values = spec.noise(9)
    assert (values.shape, values.dtype) == ((9, 500), spec.dtype)
    least_seen, most_seen = float(values.min()), float(values.max())
    assert least <= least_seen <= most_seen <= most
    assert least == most or most_seen - least_seen > 0.9 * (most - least)
