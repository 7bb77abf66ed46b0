"""The Open Inference Protocol from outside: its shapes, its two forms of tensors, and each refusal."""

import base64
import json

import numpy as np
import pytest

from tests import tiny
from tests.service import v2


@pytest.fixture
def version(lasting_client):
    return lasting_client.get("/models/tiny").json()["version"]


def names(answer, key):
    return [one["name"] for one in answer.json()[key]]


def test_the_server_says_what_it_is_and_which_extensions_it_has(lasting_client):
    answer = lasting_client.get("/v2").json()
    assert set(answer) == {"name", "version", "extensions"}
    assert "binary_tensor_data" in answer["extensions"]


def test_a_model_says_what_it_takes_and_gives(lasting_client, version):
    answer = lasting_client.get("/v2/models/tiny")
    content = answer.json()
    assert set(content) == {"name", "versions", "platform", "inputs", "outputs"}
    assert content["name"] == "tiny"
    assert content["versions"] == [version]
    assert content["inputs"] == [
        {"name": "image", "datatype": "BYTES", "shape": [-1]},
        {"name": "pixels", "datatype": "UINT8", "shape": [-1, tiny.SIZE, tiny.SIZE, 3]},
    ]
    assert {"name": "logits", "datatype": "FP32", "shape": [-1, 4]} in content["outputs"]
    assert lasting_client.get(f"/v2/models/tiny/versions/{version}").json() == content


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/nobody",
        "/v2/models/tiny/versions/1",
        "/v2/models/nobody/versions/1",
        f"/v2/models/{'m' * 2000}",
        f"/v2/models/tiny/versions/{'1' * 2000}",
    ],
)
def test_a_model_or_version_that_is_not_there_is_a_404(lasting_client, path):
    v2.error(lasting_client.get(path), 404)
    v2.error(lasting_client.get(f"{path}/ready"), 404)
    v2.error(v2.post(lasting_client, *v2.images([b"x"]), path=f"{path}/infer"), 404)


def test_the_repository_lists_what_is_loaded_and_what_is_not(client_for, tmp_path):
    tiny.make(tmp_path / "models" / "tiny")
    (tmp_path / "models" / "broken").mkdir()
    client = client_for(models_dir=tmp_path / "models")
    good, bad = client.post("/v2/repository/index").json()
    assert (good["name"], good["state"], good["reason"]) == ("tiny", "READY", "")
    assert (bad["name"], bad["state"]) == ("broken", "UNAVAILABLE")
    assert bad["reason"]
    assert client.post("/v2/repository/index", json={"ready": True}).json() == [good]
    v2.error(client.post("/v2/repository/index", json={"raedy": True}), 422)


@pytest.mark.parametrize(
    "path", ["repository/models/tiny/load", "models/tiny/stats", "models/tiny/config", "x"]
)
def test_what_is_not_offered_is_a_404_in_the_protocols_form(lasting_client, path):
    v2.error(lasting_client.post(f"/v2/{path}"), 404)


@pytest.mark.parametrize("as_pixels", [True, False])
@pytest.mark.parametrize("binary", [True, False])
def test_inference_is_predict_with_tensors(lasting_client, as_pixels, binary):
    pixels = v2.noise(5)
    files = [tiny.png(one) for one in pixels]
    said = lasting_client.post(
        "/predict?tau=1.5&top_k=3&include=logits", files=[("f", f) for f in files]
    ).json()
    parameters = {"tau": 1.5, "top_k": 3, "binary_data_output": binary}
    asked, raw = v2.array(pixels) if as_pixels else v2.images(files)
    answer = v2.post(lasting_client, {**asked, "parameters": parameters, "id": "one"}, raw)
    found = v2.outputs(answer)
    assert (v2.LENGTH in answer.headers) == binary
    tops = [one["top"] for one in said["predictions"]]
    assert found["labels"].tolist() == [[entry["label"] for entry in top] for top in tops]
    assert found["indices"].tolist() == [[entry["index"] for entry in top] for top in tops]
    np.testing.assert_allclose(found["scores"], [[e["score"] for e in top] for top in tops], atol=1e-5)
    np.testing.assert_allclose(
        found["probabilities"], [[e["probability"] for e in t] for t in tops], atol=1e-6
    )
    np.testing.assert_allclose(found["logits"], [one["logits"] for one in said["predictions"]], atol=1e-5)
    content = json.loads(answer.content[: int(answer.headers.get(v2.LENGTH, len(answer.content)))])
    assert content["id"] == "one"
    assert content["model_version"] == said["model"]["version"]
    assert content["parameters"] == {
        "method": "logit-adjustment",
        "tau": 1.5,
        "temperature": 1.25,
        "priors": "default",
        "priors_version": 1,
    }


def test_json_alone_takes_pixels_flat_or_nested_and_files_in_base64(lasting_client, version):
    pixels = v2.noise(2)
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(pixels.shape)}
    text = [base64.b64encode(tiny.png(one)).decode() for one in pixels]
    file = {"name": "image", "datatype": "BYTES", "shape": [2, 1], "parameters": {"content_type": "base64"}}
    for one in (
        {**tensor, "data": pixels.ravel().tolist()},
        {**tensor, "data": pixels.tolist()},
        {**file, "data": text},
        {**file, "data": [[one] for one in text]},
    ):
        path = f"/v2/models/tiny/versions/{version}/infer"
        found = v2.outputs(v2.post(lasting_client, {"inputs": [one], "parameters": {"tau": 0}}, path=path))
        np.testing.assert_allclose(found["logits"], tiny.logits(pixels), atol=1e-4)


def test_only_the_outputs_that_are_asked_for_come_in_that_order_and_form(lasting_client, image):
    wanted = [
        {"name": "indices", "parameters": {"binary_data": False}},
        {"name": "labels"},
        {"name": "prediction_id", "parameters": {"binary_data": True}},
    ]
    for everywhere in (True, False):
        asked, raw = v2.images([image], outputs=wanted, parameters={"binary_data_output": everywhere})
        answer = v2.post(lasting_client, asked, raw)
        assert list(v2.outputs(answer)) == ["indices", "labels", "prediction_id"]
        described = json.loads(answer.content[: int(answer.headers[v2.LENGTH])])["outputs"]
        assert ["data" in one for one in described] == [True, not everywhere, False]


def test_an_inference_is_recorded_and_takes_feedback(client, image):
    found = v2.outputs(v2.post(client, *v2.images([image, image], parameters={"tau": 2})))
    first, second = found["prediction_id"].tolist()
    stored = client.get(f"/predictions/{first}").json()
    assert stored["adjustment"]["tau"] == 2
    assert stored["predictions"][0]["label"] == found["labels"][0, 0]
    assert client.post("/feedback", json={"prediction_id": second, "label": "red"}).json()["accepted"] == 1
    assert client.get("/monitor").json()["predictions"] == 2
    assert 'tare_predictions_total{method="logit-adjustment",model="tiny"} 2.0' in client.get("/metrics").text


def test_with_recording_off_there_is_no_id(client_for, image):
    client = client_for(record=False)
    assert "prediction_id" not in names(client.get("/v2/models/tiny"), "outputs")
    assert "prediction_id" not in v2.outputs(v2.post(client, *v2.images([image])))
    asked, raw = v2.images([image], outputs=[{"name": "prediction_id"}])
    v2.error(v2.post(client, asked, raw), 422)


def test_a_named_prior_and_a_method_are_as_in_predict(client, image):
    put = client.put(
        "/priors/only-two", json={"probabilities": {"red": 0.5, "green": 0.5, "blue": 0, "grey": 0}}
    )
    assert put.status_code == 200
    asked, raw = v2.images([image], parameters={"priors": "only-two", "tau": 1})
    assert sorted(v2.outputs(v2.post(client, asked, raw))["indices"][0]) == [0, 1]
    answer = v2.post(client, *v2.images([image], parameters={"method": "none"}))
    assert answer.json()["parameters"] == {"method": "none", "tau": 0, "temperature": 1.25}
    v2.error(v2.post(client, *v2.images([image], parameters={"priors": "nobody"})), 404)


@pytest.mark.parametrize(
    "parameters",
    [
        {"tau": -1},
        {"tau": 100.5},
        {"tau": "1"},
        {"tau": True},
        {"top_k": 0},
        {"top_k": 1.5},
        {"priors": 3},
        {"method": "magic"},
        {"method": "weight-normalisation"},
        {"method": "none", "tau": 1},
        {"binary_data_output": "yes"},
        {"sequence_id": 3},
        {"timeout": 0},
        {"timeout": 1.5},
        {"timeout": 10**15},
        "tau",
    ],
)
def test_a_bad_parameter_is_a_422_and_nothing_is_recorded(lasting_client, image, parameters):
    before = lasting_client.get("/monitor").json()["predictions"]
    v2.error(v2.post(lasting_client, *v2.images([image], parameters=parameters)), 422)
    assert lasting_client.get("/monitor").json()["predictions"] == before


def test_a_timeout_in_microseconds_or_milliseconds_whichever_is_less_ends_in_a_504(
    lasting_client, image, gate
):
    for micro, milli in ((1, None), (1, 30_000), (10**8, 1), (10**8, None)):
        late = micro == 1 or milli == 1
        (gate.clear if late else gate.set)()
        headers = {} if milli is None else {"X-Request-Timeout-Ms": str(milli)}
        answer = v2.post(lasting_client, *v2.images([image], parameters={"timeout": micro}), headers=headers)
        gate.set()
        assert v2.error(answer, 504) if late else "queue;dur=" in answer.headers["server-timing"]


@pytest.mark.parametrize(
    "outputs", [[{"name": "nothing"}], [{"name": "labels"}, {"name": "labels"}], [{}], "labels"]
)
def test_an_output_that_is_not_there_is_a_422(lasting_client, image, outputs):
    v2.error(v2.post(lasting_client, *v2.images([image], outputs=outputs)), 422)


def test_the_model_name_may_stand_in_the_body_if_it_is_the_one_of_the_path(lasting_client, image):
    v2.outputs(v2.post(lasting_client, *v2.images([image], model_name="tiny")))
    v2.error(v2.post(lasting_client, *v2.images([image], model_name="large")), 422)


ROUTES = {
    "/v2": "GET",
    "/v2/health/live": "GET",
    "/v2/health/ready": "GET",
    "/v2/repository/index": "POST",
    "/v2/models/{name}": "GET",
    "/v2/models/{name}/ready": "GET",
    "/v2/models/{name}/infer": "POST",
    "/v2/models/{name}/versions/{version}": "GET",
    "/v2/models/{name}/versions/{version}/ready": "GET",
    "/v2/models/{name}/versions/{version}/infer": "POST",
}


def test_the_openapi_document_has_every_route_with_its_refusals(lasting_client):
    document = lasting_client.get("/openapi.json").json()
    paths = {path: found for path, found in document["paths"].items() if path.startswith("/v2")}
    assert {path: next(iter(found)).upper() for path, found in paths.items()} == ROUTES
    for found in paths.values():
        (operation,) = found.values()
        assert list(operation["responses"]["default"]["content"]) == ["application/json"]
    infer = paths["/v2/models/{name}/infer"]["post"]["requestBody"]["content"]
    assert set(infer) == {"application/json", "application/octet-stream"}


@pytest.mark.slow
def test_every_method_on_every_route_asks_for_a_token_but_for_health(client_for, image, version):
    client = client_for(admin_token="adm", predict_token="pre")
    asked, raw = v2.images([image])
    head = json.dumps(asked).encode()
    for path, good in ROUTES.items():
        place = path.format(name="tiny", version=version)
        body = head + raw if path.endswith("infer") else b""
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            fits = method == good or (method == "HEAD" and good == "GET")
            for token in (None, "", "wrong", "pre", "adm"):
                headers = {v2.LENGTH: str(len(head))} if body else {}
                if token is not None:
                    headers["Authorization"] = f"Bearer {token}"
                answer = client.request(method, place, content=body, headers=headers)
                opens = token in ("pre", "adm") or path.startswith("/v2/health/")
                wanted = (200 if opens else 401) if fits else 405
                assert answer.status_code == wanted, (method, path, token)
                if wanted == 401:
                    assert answer.headers["www-authenticate"].startswith("Bearer")
                if method != "HEAD" and wanted != 200:
                    v2.error(answer, wanted)
