"""The way from an image to its answer, held to the one formula: what is decided, kept and refused."""

from __future__ import annotations

import asyncio
from functools import partial

import numpy as np
import pytest

from longtail import adjustment as formula
from longtail.priors import prior_from_counts, uniform_prior
from service.adapters import bundles, images
from service.core.batcher import Batcher, Capacity
from service.core.decide import Decider, QueuedImage, decide
from service.core.exceptions import Invalid, NotFound, TooLarge, Unavailable, UnknownImageFormat
from service.core.ids import time_of
from service.core.models import LoadedModel
from service.core.ports import EngineError
from service.core.predict import Predictor
from service.core.records import PriorVersion
from tests import tiny
from tests.service import networks
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
from tests.tiny import png


def test_predictions_come_in_order_with_rising_ids_that_hold_their_time_and_are_kept_first(tmp_path):
    async def main():
        async with serving(tmp_path) as (predictor, model, store):
            adjustment = predictor.adjustment_for(model)
            answers = await predictor.predict(IMAGES, model=model, adjustment=adjustment, top_k=2)
            assert store.kept == answers
            ids = [answer.id for answer in answers]
            assert ids == sorted(set(ids))
            assert {time_of(one) for one in ids} == {NOW.replace(microsecond=500_000)}
            first = answers[0]
            assert (first.created, first.model_name, first.model_version) == (
                NOW,
                "tiny",
                model.version.version,
            )
            assert (first.method, first.tau, first.temperature) == ("logit-adjustment", 1.0, 1.25)
            assert (first.prior_name, first.prior_version) == ("default", 1)
            for i, answer in enumerate(answers):
                f = tiny.logits(PIXELS[i : i + 1], CLASSES)[0]
                np.testing.assert_allclose(answer.decision.logits, f, atol=1e-5)

    asyncio.run(main())


def test_without_recording_there_are_answers_and_no_ids(tmp_path):
    async def main():
        async with serving(tmp_path, record=False) as (predictor, model, store):
            adjustment = predictor.adjustment_for(model)
            (answer,) = await predictor.predict(IMAGES[:1], model=model, adjustment=adjustment, top_k=1)
            assert answer.id is None
            assert store.kept == []

    asyncio.run(main())


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (b"no image", UnknownImageFormat),
        (IMAGES[0][:60], Invalid),
        (png(np.zeros((9, 9, 3), np.uint8)), TooLarge),
    ],
    ids=["no image", "cut off", "too large"],
)
def test_one_bad_image_fails_its_request_by_position_and_nothing_of_it_is_kept(tmp_path, bad, kind):
    async def main():
        async with serving(tmp_path) as (predictor, loaded, store):
            model = with_limit(loaded, 64)
            adjustment = predictor.adjustment_for(model)

            async def predict(*data):
                return await predictor.predict(data, model=model, adjustment=adjustment, top_k=1)

            good, failed = await asyncio.gather(
                predict(*IMAGES[:3]), predict(*IMAGES[3:8], bad, IMAGES[8], bad), return_exceptions=True
            )
            await asyncio.to_thread(model.batcher.stop)
            assert isinstance(failed, kind)
            assert failed.fields["position"] == 5
            assert len(good) == 3
            assert store.kept == good

    asyncio.run(main())


def with_limit(model, max_pixels):
    """The same model behind a decoder with another limit."""
    decode = partial(images.pixels, spec=model.manifest.input, max_pixels=max_pixels)
    steps = Decider(decode, model.engine, model.version.temperature)
    batcher = Batcher(steps.prepare, steps.run, Capacity(workers=2, largest_batch=4))
    return LoadedModel(model.version, model.manifest, model.engine, batcher)


def test_logits_that_are_not_finite_fail_their_own_request_only_and_are_not_kept(tmp_path):
    said = networks.manifest()
    dark = np.zeros((6, 4, 3), np.uint8)  # below the mean: the square root of a negative number
    light = np.full((6, 4, 3), 250, np.uint8)
    bundle = networks.bundle(tmp_path / "m", networks.linear(squeeze="Sqrt"), said)
    model = bundles.load(bundle, "cpu", Capacity(workers=1))
    decode = partial(images.pixels, spec=said.input)
    steps = Decider(decode, model.engine, model.version.temperature)

    async def main():
        store = FakeStore()
        predictor = Predictor(store, FakePriors(default=uniform_prior(4)), lambda: NOW, Heard())
        adjustment = predictor.adjustment_for(model)
        first, second, third = steps.run(
            [steps.prepare(QueuedImage(png(pixels), 0, adjustment, 2)) for pixels in (light, dark, light)]
        )
        assert isinstance(second, Unavailable)
        assert second.code == "logits-not-finite"
        for decision in (first, third):
            check(decision, adjustment.offset, model, 2)
        with pytest.raises(Unavailable):
            await predictor.predict([png(light), png(dark)], model=model, adjustment=adjustment, top_k=1)
        assert store.kept == []
        await asyncio.to_thread(model.batcher.stop)

    asyncio.run(main())


def test_an_engine_that_fails_is_unavailable_with_its_reason(tmp_path, monkeypatch):
    async def main():
        async with serving(tmp_path) as (predictor, model, _):

            def fail(*_, **__):
                raise EngineError("the device is lost")

            monkeypatch.setattr(model.engine, "run", fail)
            adjustment = predictor.adjustment_for(model)
            with pytest.raises(Unavailable, match="the device is lost") as refused:
                await predictor.predict(IMAGES[:2], model=model, adjustment=adjustment, top_k=1)
            assert refused.value.code == "engine-failed"
            monkeypatch.undo()
            assert len(await predictor.predict(IMAGES[:2], model=model, adjustment=adjustment, top_k=1)) == 2

    asyncio.run(main())


def test_no_answer_goes_out_that_the_store_did_not_keep(tmp_path):
    async def main():
        async with serving(tmp_path) as (predictor, model, store):
            store.failure = Unavailable("store-failed", "The disk is full.")
            with pytest.raises(Unavailable, match="disk is full"):
                await predictor.predict(
                    IMAGES[:1], model=model, adjustment=predictor.adjustment_for(model), top_k=1
                )

    asyncio.run(main())


def test_an_answer_that_cannot_be_shaped_fails_its_own_request_and_is_not_kept(tmp_path):
    async def main():
        async with serving(tmp_path) as (predictor, model, store):
            asked = {"model": model, "adjustment": predictor.adjustment_for(model), "top_k": 1}

            def shape(predictions):
                raise KeyError("no such label")

            with pytest.raises(KeyError):
                await predictor.ask(IMAGES[:1], shape=shape, **asked)
            assert len(await predictor.predict(IMAGES[:1], **asked)) == 1
            assert len(store.kept) == 1

    asyncio.run(main())


def test_tau_is_the_requests_else_the_services_else_the_bundles_else_one(tmp_path):
    async def main():
        async with serving(tmp_path, change={"tau": 1.7}) as (predictor, model, _):
            assert predictor.adjustment_for(model).tau == 1.7
            assert predictor.adjustment_for(model, tau=0.25).tau == 0.25
        async with serving(tmp_path / "b", change={"tau": 1.7}, default_tau=0.5) as (predictor, model, _):
            assert predictor.adjustment_for(model).tau == 0.5
        async with serving(tmp_path / "c", change={"tau": None}) as (predictor, model, _):
            assert predictor.adjustment_for(model).tau == 1.0
        async with serving(tmp_path / "d", change={"tau": 1.7}, default_tau=0.0) as (predictor, model, _):
            assert predictor.adjustment_for(model).tau == 0.0

    asyncio.run(main())


def test_an_adjustment_is_the_formula_with_the_prior_that_was_named(tmp_path):
    async def main():
        skewed = prior_from_counts([5, 0, *[1] * (CLASSES - 2)])
        async with serving(tmp_path, priors={"skewed": skewed}) as (predictor, model, _):
            version = model.version
            for name, q in (("skewed", skewed), (None, uniform_prior(CLASSES))):
                made = predictor.adjustment_for(model, tau=2.5, priors_name=name)
                expected = formula.scores(
                    np.zeros(CLASSES), version.logit_offset, version.source_prior, q, 2.5
                )
                np.testing.assert_array_equal(made.offset, expected)
                assert made.prior.name == (name or "default")
                assert predictor.adjustment_for(model, tau=2.5, priors_name=name) is made
            given = predictor.adjustment_for(model, tau=2.5, target_prior=skewed)
            assert given.prior is None
            np.testing.assert_allclose(
                given.offset, predictor.adjustment_for(model, tau=2.5, priors_name="skewed").offset
            )

    asyncio.run(main())


def test_a_new_version_of_a_prior_is_used_by_the_next_request(tmp_path):
    async def main():
        async with serving(tmp_path) as (predictor, model, _):
            before = predictor.adjustment_for(model, tau=1)
            q = prior_from_counts(range(1, CLASSES + 1))
            predictor._priors.current = lambda label_set, name: PriorVersion(
                label_set, name, 2, q, NOW, None, None
            )
            after = predictor.adjustment_for(model, tau=1)
            assert (before.prior.version, after.prior.version) == (1, 2)
            assert not np.array_equal(before.offset, after.offset)

    asyncio.run(main())


def test_the_method_none_is_tau_zero_and_knows_no_prior(tmp_path):
    async def main():
        async with serving(tmp_path, default_tau=3.0) as (predictor, model, _):
            for tau in (None, 0.0):
                made = predictor.adjustment_for(model, "none", tau)
                assert (made.method, made.tau, made.prior) == ("none", 0.0, None)
                np.testing.assert_array_equal(made.offset, model.version.logit_offset)
            with pytest.raises(Invalid) as refused:
                predictor.adjustment_for(model, "none", 1.0)
            assert refused.value.code == "tau-not-allowed"
            answers = await predictor.predict(IMAGES, model=model, adjustment=made, top_k=1)
            for answer in answers:
                assert answer.decision.top == (answer.decision.unadjusted,)
                assert (answer.prior_name, answer.prior_version) == (None, None)

    asyncio.run(main())


@pytest.mark.parametrize("tau", [-1.0, -1e-9, 100.001, 1e308, float("nan"), float("inf"), float("-inf")])
def test_a_tau_out_of_range_is_refused(tmp_path, tau):
    async def main():
        async with serving(tmp_path) as (predictor, model, _):
            for method in ("logit-adjustment", "none"):
                with pytest.raises(Invalid):
                    predictor.adjustment_for(model, method, tau)

    asyncio.run(main())


def test_a_target_prior_that_is_none_is_refused_by_label(tmp_path):
    async def main():
        async with serving(tmp_path, n_classes=4) as (predictor, model, _):
            for values, label in (
                ([0.5, 0.5, -0.1, 0.1], "blue"),
                ([0.5, float("nan"), 0.5, 0], "green"),
                ([0.5, 0.5], None),
                ([0.5, 0.4, 0, 0], None),
                ([0, 0, 0, 0], None),
            ):
                with pytest.raises(Invalid) as refused:
                    predictor.adjustment_for(model, target_prior=values)
                assert refused.value.code == "invalid-prior"
                assert refused.value.fields.get("label") == label
            with pytest.raises(Invalid) as refused:
                predictor.adjustment_for(model, priors_name="default", target_prior=[0.25] * 4)
            assert refused.value.code == "conflicting-parameters"
            with pytest.raises(NotFound):
                predictor.adjustment_for(model, priors_name="nobody")
            with pytest.raises(NotFound):
                predictor.adjustment_for(model, "none", priors_name="nobody")

    asyncio.run(main())


def test_adjust_without_an_engine_gives_what_predict_gave(tmp_path):
    async def main():
        q = prior_from_counts([0, 3, *[1] * (CLASSES - 2)])
        async with serving(tmp_path) as (predictor, model, _):
            adjustment = predictor.adjustment_for(model, tau=33.3, target_prior=q)
            answers = await predictor.predict(IMAGES, model=model, adjustment=adjustment, top_k=CLASSES + 5)
            decisions = decide(
                [answer.decision.logits.tolist() for answer in answers],
                adjustment,
                model.version,
                CLASSES + 5,
            )
            for answer, decision in zip(answers, decisions, strict=True):
                check(decision, adjustment.offset, model, CLASSES + 5)
                assert len(decision.top) == CLASSES - 1
                assert [e.index for e in decision.top] == [e.index for e in answer.decision.top]
                for a, b in zip(decision.top, answer.decision.top, strict=True):
                    assert abs(a.score - b.score) <= allowed(a.score)
                    assert abs(a.probability - b.probability) <= 1e-4
                assert decision.unadjusted.index == answer.decision.unadjusted.index

    asyncio.run(main())


@pytest.mark.slow
def test_ten_thousand_classes_are_ranked_as_the_formula_ranks_them(tmp_path):
    async def main():
        n = 10_000
        rng = np.random.default_rng(4)
        q = prior_from_counts(rng.integers(0, 3, n))
        async with serving(tmp_path, n_classes=n) as (predictor, model, _):
            adjustment = predictor.adjustment_for(model, tau=1.5, target_prior=q)
            for answer in await predictor.predict(IMAGES[:3], model=model, adjustment=adjustment, top_k=n):
                check(answer.decision, adjustment.offset, model, n)
                assert len(answer.decision.top) == np.count_nonzero(q)

    asyncio.run(main())
