"""GET /models: what is loaded, what was refused, what each says of itself."""

import json
import shutil

import pytest

from tests import tiny


def test_a_model_says_what_it_is_made_of(client):
    short = client.get("/models").json()
    assert short["default"] == "tiny"
    (entry,) = short["models"]
    assert (entry["classes"], entry["ready"], entry["provider"]) == (4, True, "cpu")
    whole = client.get("/models/tiny").json()
    manifest = tiny.manifest()
    assert {key: whole[key] for key in entry} == entry
    assert whole["labels"] == manifest.labels
    assert whole["class_counts"] == manifest.class_counts.tolist()
    assert whole["source_prior"] == pytest.approx(manifest.source_prior)
    assert (whole["temperature"], whole["tau"]) == (1.25, 1.0)
    assert whole["input"]["height"] == tiny.SIZE
    assert whole["groups"][0]["name"] == "many"
    assert set(whole) >= {"logit_offset", "tau_curve", "metrics"}


def test_a_bundle_that_fails_a_check_is_refused_by_reason_and_the_others_load(
    client_for, tiny_models, tmp_path
):
    models = tmp_path / "models"
    shutil.copytree(tiny_models, models)
    shutil.copytree(models / "tiny", models / "spoilt")
    (models / "spoilt" / "model.onnx").write_bytes(b"junk")
    (models / "empty").mkdir()
    client = client_for(models_dir=models)
    answer = client.get("/models").json()
    assert [entry["name"] for entry in answer["models"]] == ["tiny"]
    refused = {entry["folder"]: entry["code"] for entry in answer["refused"]}
    assert refused == {"spoilt": "bundle-checksum", "empty": "bundle-incomplete"}
    assert str(tmp_path) not in json.dumps(answer)


def test_without_a_bundle_the_service_runs_and_says_why_it_is_not_ready(client_for, tmp_path, image):
    (tmp_path / "none").mkdir()
    client = client_for(models_dir=tmp_path / "none")
    assert client.get("/models").json() == {"default": None, "models": [], "refused": []}
    assert client.get("/healthz").status_code == 200
    for answer in (client.get("/readyz"), client.post("/predict", content=image)):
        assert (answer.status_code, answer.json()["code"]) == (503, "no-model")


def test_a_default_that_does_not_load_is_not_replaced_by_another(client_for, image):
    client = client_for(model="wanted")
    assert client.get("/models").json()["default"] is None
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert "wanted" in answer.json()["detail"]
    assert client.post("/predict", content=image).status_code == 503
    assert client.post("/predict?model=tiny", content=image).status_code == 200


def test_a_provider_that_is_not_to_be_had_leaves_the_service_running_and_not_ready(client_for, image):
    client = client_for(provider="tensorrt")
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert "tensorrt" in answer.json()["detail"]
    assert client.get("/models").json()["refused"][0]["code"] == "provider-unavailable"
    assert client.post("/predict?model=tiny", content=image).status_code == 503
