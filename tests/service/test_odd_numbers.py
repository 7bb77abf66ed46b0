"""NaN, infinities, denormals and giants as tau, priors and logits: the right answer or a 422, everywhere."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests import tiny
from tests.service import v2

SMALLEST = 5e-324
SOURCE = np.array(tiny.manifest().source_prior)
TEMPERATURE = 1.25


@pytest.fixture(scope="module", params=["asgi", pytest.param("http", marks=pytest.mark.slow)])
def way(request):
    """The application itself, and its server, which takes plain predictions before the application."""
    return request.param


def scores(logits, tau, target):
    """Section 1 of the design, written out again: float64, and -inf where the target is 0 and tau is not."""
    if not tau:
        return np.array(logits, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.array(logits) + tau * (np.log(target) - np.log(SOURCE))


def check(top, logits, tau, target):
    """Hold a whole ranking to the formula; its probabilities make up one."""
    expected = scores(logits, tau, target)
    with np.errstate(over="ignore"):
        weights = np.exp((expected - expected.max()) / TEMPERATURE)
    shares = weights / weights.sum()
    possible = [index for index in np.argsort(-expected, kind="stable") if expected[index] > -np.inf]
    assert [one["index"] for one in top] == possible
    for one in top:
        assert np.isfinite(one["score"])
        assert one["score"] == pytest.approx(expected[one["index"]], rel=1e-6, abs=1e-4)
        assert one["probability"] == pytest.approx(shares[one["index"]], abs=1e-4)
    assert sum(one["probability"] for one in top) == pytest.approx(1, abs=1e-6)


def strict(answer):
    """The JSON of a good answer, which has no NaN and no Infinity."""
    assert answer.status_code == 200, answer.text
    return json.loads(answer.text, parse_constant=pytest.fail)


TARGETS = {
    "denormal": [SMALLEST, 0.5, 0.5, 0],
    "denormals all but one": [1, SMALLEST, 2 * SMALLEST, 1e-310],
    "smallest normal": [np.finfo(float).tiny, 1, 0, 0],
    "one class": [0, 0, 1, 0],
    "spread over all of float64": [1, 1e-100, 1e-200, 1e-300],
}
TAUS = [0, SMALLEST, 1e-310, 1e-30, 1, 99.999999, 100]


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_prior_that_is_legal_is_ranked_by_the_formula_by_every_way(client, image, pixels, name):
    target = TARGETS[name]
    said = client.put("/priors/odd", json={"probabilities": target})
    assert strict(said)["probabilities"] == dict(zip(tiny.LABELS, target, strict=True))
    assert strict(client.get("/priors/odd"))["probabilities"] == strict(said)["probabilities"]
    logits = tiny.logits(pixels[None])[0]
    for tau in TAUS:
        answer = strict(client.post(f"/predict?tau={tau!r}&priors=odd&top_k=9", content=image))
        assert answer["adjustment"]["tau"] == tau
        check(answer["predictions"][0]["top"], logits, tau, target)
        asked = {"tau": tau, "priors": "odd", "top_k": 9}
        found = v2.outputs(v2.post(client, *v2.images([image], parameters=asked)))
        top = [
            {"index": index, "score": float(score), "probability": float(share)}
            for index, score, share in zip(
                found["indices"][0], found["scores"][0], found["probabilities"][0], strict=True
            )
        ]
        check(top, logits, tau, target)
        by_itself = {"logits": [logits.tolist()], "tau": tau, "top_k": 9}
        for prior in ({"priors": "odd"}, {"target_prior": target}):
            one = strict(client.post("/adjust", json={**by_itself, **prior}))["predictions"][0]
            check(one["top"], logits, tau, target)


@pytest.mark.parametrize("scale", [SMALLEST, 1e-30, 1e30, 3e38])
def test_logits_of_any_size_that_float32_holds_are_ranked(lasting_client, scale):
    logits = [scale, -scale, 0, scale / 2]
    target = [0.1, 0.2, 0.3, 0.4]
    for tau in (0, 1, 100):
        sent = {"logits": [logits], "tau": tau, "target_prior": target, "top_k": 4}
        check(strict(lasting_client.post("/adjust", json=sent))["predictions"][0]["top"], logits, tau, target)


@pytest.mark.parametrize(
    "counts", [[SMALLEST, 0, 0, 0], [1e308, 1, 1, 1], [1e-320, 1e300, 0, 5], [0, 0, 0, 1]]
)
def test_counts_of_any_size_make_a_prior_or_a_422(client, image, counts):
    answer = client.put("/priors/counted", json={"counts": counts})
    assert answer.status_code in {200, 422}
    if answer.status_code == 200:
        assert sum(strict(answer)["probabilities"].values()) == pytest.approx(1, abs=1e-12)
        top = strict(client.post("/predict?tau=1&priors=counted&top_k=9", content=image))["predictions"][0][
            "top"
        ]
        assert sum(one["probability"] for one in top) == pytest.approx(1, abs=1e-6)


NO_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e308", "-0.1", "100.0000001", "9" * 5000]


@pytest.mark.parametrize("number", NO_NUMBERS)
def test_a_tau_that_is_none_is_a_422_by_every_way(lasting_client, image, number):
    for query in (number, number.lower(), f"%2B{number}"):
        for path in ("/predict", "/monitor", "/monitor/tau-curve"):
            method = "POST" if path == "/predict" else "GET"
            answer = lasting_client.request(method, f"{path}?tau={query}", content=image)
            assert answer.status_code == 422, (path, query, answer.text)
    body = f'{{"logits": [[1, 2, 3, 4]], "tau": {number}}}'.encode()
    assert lasting_client.post("/adjust", content=body).status_code == 422
    asked, raw = v2.images([image], parameters={"tau": 12345.5})
    head = json.dumps(asked).replace("12345.5", number).encode()
    answer = lasting_client.post(v2.INFER, content=head + raw, headers={v2.LENGTH: str(len(head))})
    v2.error(answer, 422)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e-320", "1.1", "1e308"])
def test_a_probability_that_is_none_is_a_422(lasting_client, number):
    for form in (f"[{number}, 0.5, 0.5, 0]", f'{{"red": {number}, "green": 0.5, "blue": 0.5, "grey": 0}}'):
        for path, body in (
            ("/priors/odd", f'{{"probabilities": {form}}}'),
            ("/adjust", f'{{"logits": [[1, 2, 3, 4]], "target_prior": {form}}}'),
        ):
            method = "PUT" if path == "/priors/odd" else "POST"
            answer = lasting_client.request(method, path, content=body.encode())
            assert answer.status_code == 422, (path, body, answer.text)
            json.loads(answer.text, parse_constant=pytest.fail)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e-320"])
def test_a_count_or_a_smoothing_that_is_none_is_a_422(lasting_client, number):
    for body in (f'{{"counts": [{number}, 1, 1, 1]}}', f'{{"counts": [1, 1, 1, 1], "smoothing": {number}}}'):
        assert lasting_client.put("/priors/odd", content=body.encode()).status_code == 422


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e39", "1e999"])
def test_logits_that_are_none_are_a_422(lasting_client, number):
    body = f'{{"logits": [[1, 2, 3, {number}]]}}'.encode()
    assert lasting_client.post("/adjust", content=body).status_code == 422
