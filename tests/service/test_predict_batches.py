"""Requests of every kind in one batch, held to the one formula and to what each gets alone."""

from __future__ import annotations

import asyncio
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longtail import adjustment as formula
from longtail.priors import prior_from_counts, uniform_prior
from service.adapters import bundles, images
from service.core.batcher import Capacity
from service.core.decide import Decider, QueuedImage, decide
from service.core.exceptions import Invalid
from service.core.predict import Predictor
from tests import tiny
from tests.service.predicting import (
    CLASSES,
    IMAGES,
    NOW,
    PIXELS,
    FakePriors,
    FakeStore,
    Heard,
    allowed,
    check,
    serving,
)

counts = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=CLASSES, max_size=CLASSES).filter(
    any
)
asked = st.tuples(
    st.sampled_from(["logit-adjustment", "weight-normalisation", "none"]),
    st.integers(0, len(IMAGES) - 1),
    st.one_of(st.sampled_from([0.0, 1.0, 100.0]), st.floats(0, 100)),
    counts.map(prior_from_counts),
    st.integers(1, CLASSES + 3),
)
NORMS = np.geomspace(2.5, 0.4, CLASSES)  # at tau = 100 they are 80 powers of ten apart
BIASES = tiny.weights(CLASSES)[1].astype(np.float64)


def normalised(f, tau, bias):
    """Weight normalisation written out again, in float64."""
    f = f.astype(np.float64)
    if bias == "divide":
        return f / NORMS**tau
    return (f - BIASES) / NORMS**tau + (BIASES if bias == "keep" else 0)


def check_normalised(decision, tau, bias, top_k):
    """Hold a decision by weight normalisation to the formula, from the logits it says it saw."""
    scores = normalised(decision.logits, tau, bias)
    size = (np.abs(decision.logits) + 2 * np.abs(BIASES)) / NORMS**tau + np.abs(BIASES)
    order = formula.top_k(scores, top_k)
    assert len({entry.index for entry in decision.top}) == len(decision.top) == len(order)
    for entry, index in zip(decision.top, order, strict=True):
        assert entry.probability is None
        assert abs(entry.score - scores[entry.index]) <= 1e-6 * size[entry.index]
        assert abs(scores[entry.index] - scores[index]) <= 1e-6 * (size[entry.index] + size[index])


@pytest.fixture(scope="module", params=["divide", "keep", "drop"])
def decider(tmp_path_factory, request):
    bundle = tiny.make(
        tmp_path_factory.mktemp("m") / "tiny",
        n_classes=CLASSES,
        logit_offset=np.linspace(-2, 1, CLASSES).tolist(),
        weight_normalisation={
            "nu": "norm",
            "norms": NORMS.tolist(),
            "biases": BIASES.tolist(),
            "bias": request.param,
            "tau": 0.7,
        },
    )
    model = bundles.load(bundle, "cpu", Capacity(workers=1))
    decode = partial(images.pixels, spec=bundle.manifest.input)
    yield model, Decider(decode, model.engine, model.version.temperature)
    model.batcher.stop()


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(asked, min_size=1, max_size=16))
def test_a_decision_equals_the_formula_alone_and_in_any_batch(decider, requests):
    model, steps = decider
    version = model.version
    predictor = Predictor(FakeStore(), FakePriors(default=uniform_prior(CLASSES)), lambda: NOW, Heard())

    def adjustment(method, tau, target):
        if method == "logit-adjustment":
            return predictor.adjustment_for(model, method, tau, None, target)
        return predictor.adjustment_for(model, method, None if method == "none" else tau)

    ready = [
        steps.prepare(QueuedImage(IMAGES[image], 0, adjustment(method, tau, target), k))
        for method, image, tau, target, k in requests
    ]
    mixed = steps.run(ready)
    for decision, one, (method, image, asked_tau, target, top_k) in zip(mixed, ready, requests, strict=True):
        f = tiny.logits(PIXELS[image : image + 1], CLASSES)[0]
        np.testing.assert_allclose(decision.logits, f, atol=1e-5)
        (alone,) = steps.run([one])
        if method == "weight-normalisation":
            check_normalised(decision, asked_tau, version.weight_normalisation.bias, top_k)
            check_normalised(alone, asked_tau, version.weight_normalisation.bias, top_k)
            plain = decision.logits + version.logit_offset
            assert abs(plain[decision.unadjusted.index] - plain.max()) <= 1e-4
            continue
        tau = 0.0 if method == "none" else asked_tau
        scores = formula.scores(decision.logits, version.logit_offset, version.source_prior, target, tau)
        check(decision, scores - decision.logits, model, top_k)
        assert [entry.index for entry in alone.top] == [entry.index for entry in decision.top]
        for a, b in zip((*alone.top, alone.unadjusted), (*decision.top, decision.unadjusted), strict=True):
            assert abs(a.score - b.score) <= allowed(a.score)
            assert abs(a.probability - b.probability) <= 1e-4


@pytest.mark.parametrize("tau", [0, 0.7, 30, 100])
def test_given_logits_are_normalised_as_images_are(decider, tau):
    model, _ = decider
    predictor = Predictor(FakeStore(), FakePriors(default=uniform_prior(CLASSES)), lambda: NOW, Heard())
    adjustment = predictor.adjustment_for(model, "weight-normalisation", tau)
    logits = np.random.default_rng(3).normal(0, 4, (20, CLASSES)).astype(np.float32)
    for decision in decide(logits, adjustment, model.version, 4):
        check_normalised(decision, tau, model.version.weight_normalisation.bias, 4)


def test_weight_normalisation_has_a_tau_of_its_own_and_knows_no_prior(decider):
    model, _ = decider
    predictor = Predictor(FakeStore(), FakePriors(default=uniform_prior(CLASSES)), lambda: NOW, Heard())
    made = predictor.adjustment_for(model, "weight-normalisation")
    assert (made.method, made.tau, made.prior) == ("weight-normalisation", 0.7, None)
    assert predictor.adjustment_for(model, "weight-normalisation", 0.7) is made
    assert predictor.adjustment_for(model).tau == 1.0
    of_service = Predictor(FakeStore(), FakePriors(), lambda: NOW, Heard(), default_tau=2.0)
    with pytest.raises(Invalid) as refused:
        of_service.adjustment_for(model, "weight-normalisation", priors_name="default")
    assert (refused.value.code, refused.value.fields) == ("conflicting-parameters", {"parameter": "priors"})
    with pytest.raises(Invalid) as refused:
        of_service.adjustment_for(model, "weight-normalisation", target_prior=uniform_prior(CLASSES))
    assert refused.value.fields == {"parameter": "target_prior"}
    for tau in (-1, 101, np.nan):
        with pytest.raises(Invalid):
            predictor.adjustment_for(model, "weight-normalisation", tau)


def test_a_tau_that_the_norms_do_not_bear_is_refused(tmp_path):
    async def main():
        part = {"nu": "prior", "norms": [1.0, 1e-4], "biases": [0.0, 0.0], "tau": None}
        async with serving(tmp_path, n_classes=2, change={"weight_normalisation": part}) as (
            predictor,
            model,
            _,
        ):
            assert predictor.adjustment_for(model, "weight-normalisation").tau == 1.0
            with pytest.raises(Invalid, match="tau: tau = 100 is too large") as refused:
                predictor.adjustment_for(model, "weight-normalisation", 100)
            assert refused.value.fields == {"parameter": "tau"}

    asyncio.run(main())


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A model with two workers, for requests side by side."""
    offset = np.linspace(-2, 1, CLASSES).tolist()
    bundle = tiny.make(tmp_path_factory.mktemp("s") / "tiny", n_classes=CLASSES, logit_offset=offset)
    model = bundles.load(bundle, "cpu", Capacity(workers=2, largest_batch=8))
    yield model
    model.batcher.stop()


many_asked = st.tuples(
    st.lists(st.integers(0, len(IMAGES) - 1), min_size=1, max_size=5),
    st.sampled_from(["logit-adjustment", "none"]),
    st.one_of(st.sampled_from([0.0, 1.0, 100.0]), st.floats(0, 100)),
    counts.map(prior_from_counts),
    st.integers(1, CLASSES + 3),
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(many_asked, min_size=2, max_size=12))
def test_requests_side_by_side_are_answered_as_one_by_one(served, requests):
    predictor = Predictor(FakeStore(), FakePriors(default=uniform_prior(CLASSES)), lambda: NOW, Heard())

    def predict(picked, method, tau, target, top_k):
        if method == "none":
            adjustment = predictor.adjustment_for(served, method)
        else:
            adjustment = predictor.adjustment_for(served, method, tau, None, target)
        images_of_it = [IMAGES[image] for image in picked]
        return predictor.predict(images_of_it, model=served, adjustment=adjustment, top_k=top_k)

    async def main():
        together = await asyncio.gather(*(predict(*one) for one in requests))
        for one, mixed in zip(requests, together, strict=True):
            alone = await predict(*one)
            assert len(alone) == len(mixed) == len(one[0])
            for a, b in zip(alone, mixed, strict=True):
                assert (a.method, a.tau, a.prior_name) == (b.method, b.tau, b.prior_name)
                np.testing.assert_allclose(a.decision.logits, b.decision.logits, atol=1e-6)
                for x, y in zip(
                    (*a.decision.top, a.decision.unadjusted),
                    (*b.decision.top, b.decision.unadjusted),
                    strict=True,
                ):
                    assert x.index == y.index
                    assert abs(x.score - y.score) <= 1e-6 * max(1, abs(x.score))
                    assert abs(x.probability - y.probability) <= 1e-6

    asyncio.run(main())


def test_concurrent_requests_keep_their_own_tau_prior_and_top_k(tmp_path):
    async def main():
        async with serving(tmp_path) as (predictor, model, store):
            rng = np.random.default_rng(5)

            async def request():
                tau, k = float(rng.choice([0, 0.5, 1.5, 40])), int(rng.integers(1, CLASSES + 1))
                target = prior_from_counts(rng.integers(0, 5, CLASSES) + (rng.random(CLASSES) < 0.5))
                picked = rng.integers(0, len(IMAGES), rng.integers(1, 6))
                adjustment = predictor.adjustment_for(model, tau=tau, target_prior=target)
                answers = await predictor.predict(
                    [IMAGES[i] for i in picked], model=model, adjustment=adjustment, top_k=k
                )
                for i, answer in zip(picked, answers, strict=True):
                    f = tiny.logits(PIXELS[i : i + 1], CLASSES)[0]
                    np.testing.assert_allclose(answer.decision.logits, f, atol=1e-5)
                    assert answer.tau == tau
                    added = formula.adjustment(model.version.source_prior, target, tau)
                    check(answer.decision, model.version.logit_offset + added, model, k)
                return len(picked)

            counted = await asyncio.gather(*(request() for _ in range(80)))
            assert len(store.kept) == sum(counted)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("logits", "position"),
    [
        ([[0.0] * (CLASSES - 1)], None),
        ([0.0] * CLASSES, None),
        ([[0.0] * CLASSES, [0.0] * 3], None),
        ([["a"] * CLASSES], None),
        ([[0.0] * CLASSES, [float("nan")] * CLASSES], 1),
        ([[1e39] * CLASSES], 0),
    ],
)
def test_logits_that_do_not_fit_are_refused(decider, logits, position):
    model, _ = decider
    predictor = Predictor(FakeStore(), FakePriors(default=uniform_prior(CLASSES)), lambda: NOW, Heard())
    with pytest.raises(Invalid) as refused:
        decide(logits, predictor.adjustment_for(model), model.version, 1)
    assert refused.value.code == "invalid-logits"
    assert refused.value.fields.get("position") == position
