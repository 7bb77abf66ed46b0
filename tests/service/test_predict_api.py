"""POST /predict and /adjust from outside: the formula, the forms of a body, and each refusal."""

import json
import uuid

import numpy as np
import pytest

from tests import tiny
from tests.service.problems import problem
from tests.tiny import png


@pytest.fixture(scope="module", params=["asgi", "http"])
def way(request):
    """The application itself, and its server, which takes plain predictions before the application."""
    return request.param


def formula(logits, tau, temperature=1.25, target=None, n_classes=4):
    """Section 1 of the design, written out again."""
    source = np.array(tiny.manifest().source_prior)
    target = np.full(n_classes, 1 / n_classes) if target is None else np.asarray(target)
    with np.errstate(divide="ignore"):
        shift = tau * (np.log(target) - np.log(source)) if tau else np.zeros(n_classes)
    scores = logits + shift
    weights = np.exp((scores - scores.max()) / temperature)
    return scores, weights / weights.sum()


@pytest.mark.parametrize("tau", [0, 0.5, 1, 1.5, 10, 100])
def test_a_decision_is_the_formula_and_says_what_it_was_made_with(lasting_client, image, pixels, tau):
    answer = lasting_client.post(f"/predict?tau={tau}&top_k=4&include=logits", content=image).json()
    logits = tiny.logits(pixels[None])[0]
    scores, probabilities = formula(logits, tau)
    _, plain = formula(logits, 0)
    (one,) = answer["predictions"]
    order = np.argsort(-scores, kind="stable")
    assert [entry["index"] for entry in one["top"]] == order.tolist()
    np.testing.assert_allclose([entry["score"] for entry in one["top"]], scores[order], atol=1e-4)
    np.testing.assert_allclose([e["probability"] for e in one["top"]], probabilities[order], atol=1e-4)
    np.testing.assert_allclose(one["logits"], logits, atol=1e-4)
    assert {key: one[key] for key in one["top"][0]} == one["top"][0]
    assert one["label"] == tiny.LABELS[order[0]]
    assert one["unadjusted"]["index"] == int(plain.argmax())
    assert one["unadjusted"]["probability"] == pytest.approx(plain.max(), abs=1e-4)
    assert answer["adjustment"] == {
        "method": "logit-adjustment",
        "tau": tau,
        "temperature": 1.25,
        "priors": {"name": "default", "version": 1},
    }
    assert uuid.UUID(one["prediction_id"]).version == 7


def test_without_tau_the_setting_counts_and_without_that_the_bundle(client, client_for, image, tmp_path):
    assert client.post("/predict", content=image).json()["adjustment"]["tau"] == 1.0
    other = client_for(tau=2.5, state_dir=tmp_path / "other")
    assert other.post("/predict", content=image).json()["adjustment"]["tau"] == 2.5
    assert other.post("/predict?tau=0", content=image).json()["adjustment"]["tau"] == 0


def test_the_content_type_of_one_image_does_not_matter(lasting_client, image):
    for kind in ("image/jpeg", "text/plain", "application/json", "application/x-www-form-urlencoded", "junk"):
        assert (
            lasting_client.post("/predict", content=image, headers={"Content-Type": kind}).status_code == 200
        )


def test_a_form_answers_its_files_in_order(lasting_client):
    rng = np.random.default_rng(5)
    many = [rng.integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8) for _ in range(5)]
    answer = lasting_client.post("/predict?tau=0&include=logits", files=[("any", png(one)) for one in many])
    got = [one["logits"] for one in answer.json()["predictions"]]
    np.testing.assert_allclose(got, tiny.logits(np.stack(many)), atol=1e-4)
    assert len({one["prediction_id"] for one in answer.json()["predictions"]}) == 5


def test_top_k_is_cut_to_the_number_of_classes(lasting_client, image):
    assert len(lasting_client.post("/predict?top_k=1", content=image).json()["predictions"][0]["top"]) == 1
    assert (
        len(lasting_client.post("/predict?top_k=999999", content=image).json()["predictions"][0]["top"]) == 4
    )


def test_method_none_is_tau_0_and_knows_no_prior(lasting_client, image):
    answer = lasting_client.post("/predict?method=none", content=image).json()
    assert answer["adjustment"] == {"method": "none", "tau": 0, "temperature": 1.25, "priors": None}
    assert answer["predictions"][0]["index"] == answer["predictions"][0]["unadjusted"]["index"]
    assert lasting_client.post("/predict?method=none&tau=0", content=image).status_code == 200
    problem(lasting_client.post("/predict?method=none&tau=1", content=image), 422, "tau-not-allowed")


def test_weight_normalisation_is_refused_where_the_bundle_has_none(lasting_client, image):
    answer = lasting_client.post("/predict?method=weight-normalisation", content=image)
    assert problem(answer, 422, "method-not-offered")["parameter"] == "method"


def test_what_is_no_image_is_a_415_and_half_an_image_a_422(lasting_client, image):
    assert problem(lasting_client.post("/predict", content=b""), 415, "unknown-image-format")["position"] == 0
    problem(lasting_client.post("/predict", content=b"<html>"), 415, "unknown-image-format")
    problem(lasting_client.post("/predict", content=image[: len(image) // 2]), 422, "undecodable-image")


def test_one_bad_file_fails_the_request_by_its_position(lasting_client, image):
    files = [("a", image), ("b", image), ("c", b"junk"), ("d", b"")]
    assert problem(lasting_client.post("/predict", files=files), 415, "unknown-image-format")["position"] == 2


def test_an_image_over_the_pixel_limit_is_a_413(client_for, image):
    answer = client_for(max_pixels=63).post("/predict", content=image)
    assert problem(answer, 413, "too-many-pixels")["position"] == 0


def test_a_body_over_the_byte_limit_is_a_413(client_for, image):
    client = client_for(max_body_bytes=len(image))
    assert client.post("/predict", content=image).status_code == 200
    problem(client.post("/predict", content=image + b"x"), 413, "body-too-large")
    problem(client.post("/predict", files=[("a", image)]), 413, "body-too-large")


@pytest.mark.parametrize(
    ("query", "code", "parameter"),
    [
        ("tau=nan", "invalid-parameter", "tau"),
        ("tau=-1", "invalid-parameter", "tau"),
        ("tau=1e308", "invalid-parameter", "tau"),
        ("top_k=0", "invalid-parameter", "top_k"),
        ("include=pixels", "invalid-parameter", "include"),
        ("method=magic", "invalid-parameter", "method"),
        ("temperature=1", "unknown-parameter", "temperature"),
        ("tau=1&tau=1", "repeated-parameter", "tau"),
    ],
)
def test_a_bad_parameter_is_a_422_that_names_it(lasting_client, image, query, code, parameter):
    assert (
        problem(lasting_client.post(f"/predict?{query}", content=image), 422, code)["parameter"] == parameter
    )


def test_what_is_named_and_not_there_is_a_404(lasting_client, image):
    problem(lasting_client.post("/predict?model=nobody", content=image), 404, "model-not-found")
    problem(lasting_client.post("/predict?priors=nobody", content=image), 404, "priors-not-found")
    problem(
        lasting_client.post("/adjust", json={"logits": [[0, 0, 0, 0]], "model": "nobody"}),
        404,
        "model-not-found",
    )
    problem(lasting_client.get("/models/nobody"), 404, "model-not-found")


def test_with_recording_off_there_is_no_id(client_for, image):
    assert (
        client_for(record=False).post("/predict", content=image).json()["predictions"][0]["prediction_id"]
        is None
    )


@pytest.mark.parametrize("tau", [0, 1, 2.5])
def test_adjust_is_the_formula_on_given_logits(lasting_client, tau):
    logits = np.random.default_rng(1).normal(0, 4, (7, 4))
    target = [0.1, 0.2, 0.3, 0.4]
    body = {"logits": logits.tolist(), "tau": tau, "target_prior": target, "top_k": 4}
    answer = lasting_client.post("/adjust", json=body).json()
    assert answer["adjustment"]["priors"] is None
    for row, one in zip(logits, answer["predictions"], strict=True):
        scores, probabilities = formula(row, tau, target=target)
        assert "prediction_id" not in one
        for entry in one["top"]:
            assert entry["score"] == pytest.approx(scores[entry["index"]], abs=1e-9)
            assert entry["probability"] == pytest.approx(probabilities[entry["index"]], abs=1e-9)


def test_adjust_answers_as_predict_did(lasting_client, image):
    predicted = lasting_client.post("/predict?tau=2&include=logits", content=image).json()
    one = predicted["predictions"][0]
    adjusted = lasting_client.post("/adjust", json={"logits": [one["logits"]], "tau": 2}).json()
    assert adjusted["adjustment"] == predicted["adjustment"]
    assert [e["index"] for e in adjusted["predictions"][0]["top"]] == [e["index"] for e in one["top"]]


def test_a_class_with_target_0_is_never_ranked_and_every_number_has_a_json_form(lasting_client):
    body = {"logits": [[50, 0, 0, 0]], "tau": 1, "target_prior": [0, 0.5, 0.5, 0], "top_k": 4}
    text = lasting_client.post("/adjust", json=body).text
    (one,) = json.loads(text, parse_constant=pytest.fail)["predictions"]
    assert sorted(entry["index"] for entry in one["top"]) == [1, 2]
    assert one["unadjusted"]["index"] == 0
    assert "null" not in text.replace('"priors":null', "")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"logits": []}, "invalid-field"),
        ({"logits": [[1, 2, 3]]}, "invalid-logits"),
        ({"logits": [[1, 2, 3, 4], [1]]}, "invalid-logits"),
        ({"logits": [1, 2, 3, 4]}, "invalid-field"),
        ({"logits": [[1, 2, 3, "4"]]}, "invalid-field"),
        ({"logits": [[1, 2, 3, 1e300]]}, "invalid-logits"),
        ({"tau": -1}, "invalid-field"),
        ({"tau": "1"}, "invalid-field"),
        ({"top_k": 0}, "invalid-field"),
        ({"priors": "default", "target_prior": [0.25] * 4}, "conflicting-parameters"),
        ({"target_prior": [0.5, 0.5]}, "invalid-prior"),
        ({"target_prior": [0.5, 0.5, 0.5, 0.5]}, "invalid-prior"),
        ({"target_prior": [1.5, -0.5, 0, 0]}, "invalid-prior"),
        ({"target_prior": [0, 0, 0, 0]}, "invalid-prior"),
        ({"method": "magic"}, "invalid-field"),
        ({"method": "none", "tau": 1}, "tau-not-allowed"),
        ({"method": "weight-normalisation"}, "method-not-offered"),
        ({"temperature": 1}, "unknown-field"),
    ],
)
def test_adjust_refuses_what_it_cannot_take(lasting_client, change, code):
    problem(lasting_client.post("/adjust", json={"logits": [[1, 2, 3, 4]], **change}), 422, code)


def test_adjust_takes_a_target_prior_by_label_too(lasting_client):
    by_index = {"logits": [[1, 2, 3, 4]], "tau": 1, "target_prior": [0.1, 0.2, 0.3, 0.4]}
    labelled = dict(zip(tiny.LABELS, [0.1, 0.2, 0.3, 0.4], strict=True))
    by_label = {**by_index, "target_prior": labelled}
    assert (
        lasting_client.post("/adjust", json=by_label).json()
        == lasting_client.post("/adjust", json=by_index).json()
    )
    missing = {**by_index, "target_prior": {"red": 1.0}}
    assert lasting_client.post("/adjust", json=missing).status_code == 422
