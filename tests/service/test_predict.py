"""The way from an image to its answer, held to the one formula, whatever else shares the batch."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longtail import adjustment as formula
from longtail.priors import prior_from_counts, uniform_prior
from service.adapters import bundles, images
from service.core.batcher import Batcher, Capacity
from service.core.decide import Decider, QueuedImage, decide
from service.core.exceptions import (
    DeadlineExceeded,
    Invalid,
    NotFound,
    Overloaded,
    TooLarge,
    Unavailable,
    UnknownImageFormat,
)
from service.core.ids import time_of
from service.core.models import LoadedModel
from service.core.ports import EngineError
from service.core.predict import Predictor
from service.core.records import PriorVersion
from tests import tiny
from tests.service import networks
from tests.tiny import png

CLASSES = 9
NOW = datetime(2026, 11, 24, 10, 0, 0, 500_250, tzinfo=UTC)
RNG = np.random.default_rng(7)
PIXELS = RNG.integers(0, 256, (24, tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)


IMAGES = [png(pixels) for pixels in PIXELS]


class FakePriors:
    """Named priors in memory, version 1 each."""

    def __init__(self, **named) -> None:
        self.named = named

    def current(self, label_set, name):
        if name not in self.named:
            raise NotFound("priors-not-found", f"There is no prior {name}.")
        return PriorVersion(label_set, name, 1, self.named[name], NOW, None, None)


class FakeStore:
    """Keeps what it is given, or fails."""

    def __init__(self) -> None:
        self.kept = []
        self.failure = None
        self.full = False

    def check_room(self, predictions, n_classes):
        if self.full:
            raise Overloaded("store-behind", "The store is behind.", retry_after_s=1)

    def keep(self, recordings, then):
        if self.failure is None:
            self.kept.extend(
                one for recording in recordings if recording.wanted for one in recording.predictions
            )
        then(self.failure)


class Heard:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.answered = []
        self.refused = []
        self.given_up = []

    def predicted(self, model, method, images, stages):
        self.answered.append((method, images, stages))

    def shed(self, model, reason):
        self.refused.append(reason)

    def dropped(self, model, reason):
        self.given_up.append(reason)


@asynccontextmanager
async def serving(
    folder, n_classes=CLASSES, capacity=None, priors=None, change=None, observer=None, **options
):
    """A predictor with the tiny bundle behind it: real decoder, queue and ONNX Runtime."""
    changes = {"logit_offset": np.linspace(-2, 1, n_classes).tolist(), **(change or {})}
    bundle = tiny.make(folder / "tiny", n_classes=n_classes, **changes)
    model = bundles.load(bundle, "cpu", capacity or Capacity(workers=2, largest_batch=16))
    store = FakeStore()
    named = {"default": uniform_prior(n_classes), **(priors or {})}
    try:
        yield Predictor(store, FakePriors(**named), lambda: NOW, observer or Heard(), **options), model, store
    finally:
        await asyncio.to_thread(model.batcher.stop)


def allowed(score):
    """The promise: 1e-4, one part in a million of a score beyond 100."""
    return max(1e-4, 1e-6 * abs(score))


def check(decision, offset, model, top_k):
    """Hold a decision to the formula in NumPy, in float64, from the logits it says it saw."""
    logits = decision.logits.astype(np.float64)
    for top, scores, k in (
        (decision.top, logits + offset, top_k),
        ((decision.unadjusted,), logits + model.version.logit_offset, 1),
    ):
        order, shares = formula.top_k(scores, k), formula.probabilities(scores, model.version.temperature)
        possible = [index for index in order if scores[index] > -np.inf]
        assert len(top) == len(possible)
        assert len({entry.index for entry in top}) == len(top)
        for entry, index in zip(top, possible, strict=True):
            assert abs(entry.score - scores[entry.index]) <= allowed(scores[entry.index])
            assert abs(entry.probability - shares[entry.index]) <= 1e-4
            # Another class may stand here only where the two are equal as far as the promise goes.
            assert abs(scores[entry.index] - scores[index]) <= 2 * allowed(scores[index])
        assert all(a.score >= b.score for a, b in pairwise(top))


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


@asynccontextmanager
async def held_up(folder, monkeypatch, **options):
    """A predictor whose engine waits at a gate; yields an asker, the gate and the parts."""
    gate, entered = threading.Event(), threading.Semaphore(0)
    capacity = Capacity(workers=1, largest_batch=1, queue_items=3)
    async with serving(folder, capacity=capacity, **options) as (predictor, model, store):
        real = model.engine.run

        def slow(*arguments, **options):
            entered.release()
            assert gate.wait(30)
            return real(*arguments, **options)

        monkeypatch.setattr(model.engine, "run", slow)
        adjustment = predictor.adjustment_for(model)

        def ask(images=1, deadline_s=None):
            work = predictor.predict(
                IMAGES[:images], model=model, adjustment=adjustment, top_k=1, deadline_s=deadline_s
            )
            return asyncio.ensure_future(work)

        running = ask()
        await asyncio.to_thread(entered.acquire)
        try:
            yield ask, running, gate, model, store
        finally:
            gate.set()


def test_a_deadline_fires_while_a_batch_runs_and_takes_what_waits_out_of_the_queue(tmp_path, monkeypatch):
    async def main():
        heard = Heard()
        async with held_up(tmp_path, monkeypatch, observer=heard) as (ask, running, gate, model, store):
            late = ask(images=3, deadline_s=0.05)
            with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
                await late  # the batch before it still runs
            assert not running.done()
            assert (model.batcher.queued_items, model.batcher.queued_bytes) == (0, 0)
            assert heard.given_up == ["deadline"]
            gate.set()
            await running
            assert len(store.kept) == 1
            assert len(heard.answered) == 1

    asyncio.run(main())


def test_what_is_past_its_deadline_when_its_batch_ends_is_not_kept(tmp_path, monkeypatch):
    async def main():
        async with held_up(tmp_path, monkeypatch, deadline_s=0.05) as (ask, running, gate, _, store):
            with pytest.raises(DeadlineExceeded):
                await running
            gate.set()
            assert len(await ask(deadline_s=30)) == 1
            assert len(store.kept) == 1

    asyncio.run(main())


def test_a_client_that_leaves_takes_its_images_out_of_the_queue(tmp_path, monkeypatch):
    async def main():
        heard = Heard()
        async with held_up(tmp_path, monkeypatch, observer=heard) as (ask, running, gate, model, store):
            leaving = ask(images=3)
            while model.batcher.queued_items != 3:
                await asyncio.sleep(0.001)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert model.batcher.queued_items == 0
            assert heard.given_up == ["client-left"]
            gate.set()
            await running
            assert len(store.kept) == 1

    asyncio.run(main())


def test_a_full_queue_and_a_store_that_is_behind_are_refused_before_any_work(tmp_path, monkeypatch):
    async def main():
        heard = Heard()
        async with held_up(tmp_path, monkeypatch, observer=heard) as (ask, running, gate, model, store):
            waiting = ask(images=2)
            while model.batcher.queued_items != 2:
                await asyncio.sleep(0.001)
            with pytest.raises(Overloaded) as refused:
                await ask(images=2)
            assert refused.value.code == "queue-full"
            store.full = True
            with pytest.raises(Overloaded) as refused:
                await ask()
            assert refused.value.code == "store-behind"
            assert heard.refused == ["queue-full", "store-behind"]
            gate.set()
            await asyncio.gather(running, waiting)  # what was taken is answered, and kept
            assert len(store.kept) == 3

    asyncio.run(main())


def test_the_stages_of_a_request_make_up_its_time(tmp_path):
    async def main():
        async with serving(tmp_path) as (predictor, model, _):
            asked = {"model": model, "adjustment": predictor.adjustment_for(model), "top_k": 1}
            shaped, stages = await predictor.ask(IMAGES[:3], shape=len, **asked)
            assert shaped == 3
            *parts, total = stages
            assert min(parts) >= 0
            assert sum(parts) == pytest.approx(total)

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
