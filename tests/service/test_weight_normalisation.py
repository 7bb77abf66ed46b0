"""Weight normalisation from outside: offered by the bundle, decided, recorded, counted and replayed."""

import json

import numpy as np
import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests import tiny
from tests.service import v2
from tests.service.problems import problem

WEIGHTS, BIASES = tiny.weights()
NORMS = np.linalg.norm(WEIGHTS.astype(np.float64), axis=0)
PART = {
    "nu": "norm",
    "norms": NORMS.tolist(),
    "biases": BIASES.tolist(),
    "bias": "drop",
    "tau": 0.5,
    "tau_rule": "balanced-error",
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A client of a service with a bundle that offers the method, dropping the bias."""
    folder = tmp_path_factory.mktemp("normalised")
    tiny.make(folder / "models" / "tiny", weight_normalisation=PART)
    settings = Settings(models_dir=folder / "models", state_dir=folder / "state")
    with TestClient(create_app(settings), follow_redirects=False) as client:
        yield client


def rescaled_head(pixels, tau):
    """The network again, its head's weights divided by their norms to the power tau, without a bias."""
    scaled = (pixels[None].astype(np.float64) / 255 - np.array(tiny.MEAN)) / np.array(tiny.STD)
    return scaled.mean(axis=(1, 2)) @ (WEIGHTS / NORMS**tau)


@pytest.mark.parametrize("tau", [None, 0, 1, 3.5, 100])
def test_a_decision_is_that_of_the_head_rescaled(client, image, pixels, tau):
    query = "" if tau is None else f"&tau={tau}"
    answer = client.post(f"/predict?method=weight-normalisation&top_k=4{query}", content=image).json()
    strength = 0.5 if tau is None else tau
    expected = rescaled_head(pixels, strength)[0]
    assert answer["adjustment"] == {
        "method": "weight-normalisation",
        "tau": strength,
        "temperature": 1.25,
        "priors": None,
    }
    (one,) = answer["predictions"]
    assert [entry["index"] for entry in one["top"]] == np.argsort(-expected, kind="stable").tolist()
    scores = [entry["score"] for entry in one["top"]]
    np.testing.assert_allclose(scores, np.sort(expected)[::-1], rtol=1e-5, atol=1e-4)
    assert [entry["probability"] for entry in one["top"]] == [None] * 4
    assert one["unadjusted"]["index"] == int(tiny.logits(pixels[None])[0].argmax())
    assert 0 < one["unadjusted"]["probability"] < 1


def test_the_models_say_that_it_is_offered_and_with_what(client, lasting_client):
    (entry,) = client.get("/models").json()["models"]
    assert entry["methods"] == ["logit-adjustment", "weight-normalisation", "none"]
    said = client.get("/models/tiny").json()["weight_normalisation"]
    assert {key: said[key] for key in PART} == PART
    (without,) = lasting_client.get("/models").json()["models"]
    assert without["methods"] == ["logit-adjustment", "none"]
    assert lasting_client.get("/models/tiny").json()["weight_normalisation"] is None


def test_what_is_recorded_reads_as_it_was_answered_and_counts_as_served(client, image, pixels):
    answer = client.post("/predict?method=weight-normalisation&tau=2", content=image).json()
    (one,) = answer["predictions"]
    stored = client.get(f"/predictions/{one['prediction_id']}").json()
    assert {key: stored[key] for key in answer} == answer
    before = client.get("/monitor").json()["classes"][one["index"]]["predicted"]
    client.post("/predict?method=weight-normalisation&tau=2", content=image)
    assert client.get("/monitor").json()["classes"][one["index"]]["predicted"] == before + 1
    counted = client.get("/metrics").text
    assert 'tare_predictions_total{method="weight-normalisation",model="tiny"}' in counted


def test_adjust_answers_as_predict_did(client, image):
    query = "/predict?method=weight-normalisation&tau=1.5&include=logits"
    predicted = client.post(query, content=image).json()
    (one,) = predicted["predictions"]
    body = {"logits": [one["logits"]], "tau": 1.5, "method": "weight-normalisation"}
    adjusted = client.post("/adjust", json=body).json()
    assert adjusted["adjustment"] == predicted["adjustment"]
    (again,) = adjusted["predictions"]
    assert [entry["index"] for entry in again["top"]] == [entry["index"] for entry in one["top"]]
    assert [entry["probability"] for entry in again["top"]] == [None] * 4


def test_a_prior_is_refused_beside_it(client, image):
    answer = client.post("/predict?method=weight-normalisation&priors=default", content=image)
    assert problem(answer, 422, "conflicting-parameters")["parameter"] == "priors"
    body = {"logits": [[1, 2, 3, 4]], "method": "weight-normalisation", "target_prior": [0.25] * 4}
    assert problem(client.post("/adjust", json=body), 422, "conflicting-parameters")["parameter"] == (
        "target_prior"
    )
    answer = client.get("/monitor?method=weight-normalisation&priors=default")
    assert problem(answer, 422, "conflicting-parameters")["parameter"] == "priors"


def test_a_replay_by_the_method_decides_as_a_request_would_whatever_was_served(client):
    rng = np.random.default_rng(8)
    images = [rng.integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8) for _ in range(40)]
    flat = [np.full_like(one, one[0, 0]) for one in images]  # far apart in colour: decisions differ
    since = client.post("/predict", content=tiny.png(flat[0])).json()["predictions"][0]["prediction_id"]
    start = client.get(f"/predictions/{since}").json()["created"]
    for one in flat[1:]:
        client.post("/predict?tau=1", content=tiny.png(one))
    for tau in (0, 1, 6):
        expected = np.bincount([int(rescaled_head(one, tau)[0].argmax()) for one in flat], minlength=4)
        query = {"method": "weight-normalisation", "tau": tau, "since": start}
        report = client.get("/monitor", params=query).json()
        assert (report["basis"], report["method"], report["priors"]) == (
            "replayed",
            "weight-normalisation",
            None,
        )
        assert [entry["predicted"] for entry in report["classes"]] == expected.tolist()
    plain = client.get("/monitor", params={"method": "none", "since": start}).json()
    assert (plain["basis"], plain["tau"], plain["priors"]) == ("replayed", 0, None)


def test_the_curve_is_the_methods_own(client):
    curve = client.get("/monitor/tau-curve?method=weight-normalisation").json()
    assert (curve["method"], curve["priors"], curve["served_tau"]) == ("weight-normalisation", None, 0.5)
    assert client.get("/monitor/tau-curve").json()["method"] == "logit-adjustment"
    problem(client.get("/monitor/tau-curve?method=none"), 422, "invalid-parameter")


def test_v2_ranks_by_it_and_gives_no_probabilities(client, image, pixels):
    parameters = {"method": "weight-normalisation", "tau": 1}
    answer = v2.post(client, *v2.images([image], parameters=parameters)).json()
    outputs = {one["name"]: one["data"] for one in answer["outputs"]}
    assert "probabilities" not in outputs
    expected = rescaled_head(pixels, 1)[0]
    assert outputs["indices"][0] == int(expected.argmax())
    np.testing.assert_allclose(outputs["scores"][0], expected.max(), rtol=1e-5)


def test_every_number_of_an_answer_has_a_json_form(client):
    body = {"logits": [[3e38, -3e38, 1e-30, 0]], "tau": 100, "method": "weight-normalisation"}
    text = client.post("/adjust", json=body).text
    (one,) = json.loads(text, parse_constant=pytest.fail)["predictions"]
    assert all(np.isfinite(entry["score"]) for entry in one["top"])
