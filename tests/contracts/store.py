"""What every store must do: one contract, inherited by the tests of each adapter."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from service.core.exceptions import Stale
from service.core.ports import Store
from service.core.records import WeightNormalisation
from tests.contracts.calls import Recorded, blocks, kept, run
from tests.contracts.feedback import FeedbackContract
from tests.recorded import START, TurnedClock, item, model, prediction, prior


class StoreContract(FeedbackContract):
    """`store` keeps predictions for 90 days by `clock`, and has as much space as it wants."""

    @pytest.fixture
    def clock(self) -> TurnedClock:
        return TurnedClock()

    @pytest.fixture
    def store(self, clock: TurnedClock) -> Store:
        raise NotImplementedError

    @pytest.fixture
    def tiny(self, store: Store) -> Any:
        tiny = model()
        run(store.register_model(tiny, START))
        return tiny

    # Models

    def test_a_model_version_is_read_back_whole(self, store, tiny):
        (found,) = run(store.model_versions("tiny"))
        for field in ("name", "version", "labels", "temperature", "tau", "groups", "label_set"):
            assert getattr(found, field) == getattr(tiny, field)
        for field in ("class_counts", "source_prior", "logit_offset"):
            np.testing.assert_array_equal(getattr(found, field), getattr(tiny, field))

    def test_registering_again_makes_a_version_the_latest_and_no_second_one(self, store, tiny):
        run(store.register_model(model(version="1" * 16), START + timedelta(hours=1)))
        assert [one.version[0] for one in run(store.model_versions("tiny"))] == ["0", "1"]
        run(store.register_model(tiny, START + timedelta(hours=2)))
        assert [one.version[0] for one in run(store.model_versions("tiny"))] == ["1", "0"]

    def test_weight_normalisation_is_kept_with_its_version(self, store):
        part = WeightNormalisation(np.array([0.5, 1, 2, 4]), np.array([0, -1, 0.25, 1]), "keep", 0.7)
        run(store.register_model(replace(model("normed"), weight_normalisation=part), START))
        (kept,) = run(store.model_versions("normed"))
        assert kept.methods == ("logit-adjustment", "weight-normalisation", "none")
        found = kept.weight_normalisation
        assert (found.norms.tolist(), found.biases.tolist()) == (part.norms.tolist(), part.biases.tolist())
        assert (found.bias, found.tau) == ("keep", 0.7)

    def test_an_unknown_model_has_no_versions(self, store):
        assert list(run(store.model_versions("nobody"))) == []

    # Predictions

    def test_a_prediction_is_read_back_as_it_was_served_to_the_last_bit(self, store, tiny):
        rng = np.random.default_rng(1)
        made = prediction(tiny, START + timedelta(microseconds=123_456), 2, rng.normal(size=4) * 9)
        run(store.record([made]))
        found = run(store.prediction(made.id))
        assert found is not None and found.labels == ()
        for field in (
            "id", "created", "model_name", "model_version", "method", "tau", "temperature", "prior_name",
            "prior_version",
        ):  # fmt: skip
            assert getattr(found.prediction, field) == getattr(made, field)
        assert found.prediction.decision.top == made.decision.top
        assert found.prediction.decision.unadjusted == made.decision.unadjusted
        half = made.decision.logits.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(found.prediction.decision.logits, half)

    def test_threads_that_keep_beside_callers_that_wait_lose_and_double_nothing(self, store, tiny):
        told: list[Exception | None] = []

        def keep_many(seed: int) -> None:
            for _ in range(20):
                done = threading.Event()
                recordings = [Recorded([prediction(tiny) for _ in range(1 + seed % 3)]) for _ in range(2)]
                store.keep(recordings, lambda failure, done=done: (told.append(failure), done.set()))
                assert done.wait(30)

        async def together() -> None:
            threads = [asyncio.to_thread(keep_many, seed) for seed in range(3)]
            callers = [store.record([prediction(tiny)]) for _ in range(50)]
            await asyncio.gather(*threads, *callers)

        run(together())
        assert told == [None] * 60
        assert run(store.traffic(tiny, None, None)).sum() == 50 + 20 * 2 * (1 + 2 + 3)

    def test_what_nobody_wants_any_more_is_not_kept(self, store, tiny):
        pairs = [[prediction(tiny), prediction(tiny)] for _ in range(2)]
        wanted, unwanted = Recorded(pairs[0]), Recorded(pairs[1], wanted=False)
        assert kept(store, [unwanted, wanted]) is None
        assert all(run(store.prediction(one.id)) is not None for one in wanted.predictions)
        assert all(run(store.prediction(one.id)) is None for one in unwanted.predictions)

    def test_predictions_of_a_model_that_was_never_registered_are_told_and_not_raised(self, store, tiny):
        strange = prediction(tiny)._replace(model_version="f" * 16)
        assert isinstance(kept(store, [Recorded([strange])]), KeyError)
        assert kept(store, [Recorded([prediction(tiny)])]) is None
        assert run(store.traffic(tiny, None, None)).sum() == 1

    def test_an_idle_store_has_room(self, store):
        store.check_room(64, 10_000)

    def test_logits_beyond_float16_are_kept_whole(self, store, tiny):
        for logits in (
            [1e30, -1e30, 70_000, 1],
            [1.9e6, 1.9e6 + 10, -3e6, 0],
            [3e38, -3e38, 2e38, 1e-30],
            [-7e4, -6.9e4, -9e4, -8e4],
        ):
            made = prediction(tiny, logits=np.array(logits))
            run(store.record([made]))
            kept = run(store.prediction(made.id)).prediction.decision.logits
            np.testing.assert_array_equal(kept, np.array(logits, dtype=np.float32))

    def test_one_row_beyond_float16_leaves_the_others_of_its_block_as_they_are(self, store, tiny):
        small, large = np.array([0.1, 2.5, -3, 9]), np.array([1e5, 1, 2, 3])
        made = [
            prediction(tiny, START + timedelta(seconds=i), logits=logits)
            for i, logits in enumerate([small, large, small])
        ]
        run(store.record(made))
        run(store.learn([item(one, 0) for one in made], START))
        expected = np.stack([small.astype(np.float16), large, small.astype(np.float16)]).astype(np.float32)
        (block,) = run(blocks(store.recorded_logits(tiny, None, None)))
        np.testing.assert_array_equal(block, expected)
        (labelled,) = run(blocks(store.labelled(tiny, None, None, with_logits=True)))
        np.testing.assert_array_equal(labelled.logits, expected)

    def test_scores_that_stand_for_no_probability_are_read_back_without_one(self, store, tiny):
        made = prediction(tiny)
        top = tuple(ranked._replace(probability=None) for ranked in made.decision.top)
        decision = made.decision._replace(top=top)
        made = made._replace(method="weight-normalisation", decision=decision, prior_name=None)
        run(store.record([made]))
        assert run(store.prediction(made.id)).prediction.decision.top == top

    def test_recording_the_same_prediction_again_changes_nothing(self, store, tiny):
        made = prediction(tiny)
        run(store.record([made]))
        run(store.record([made, made]))
        assert run(store.traffic(tiny, None, None)).sum() == 1

    def test_recording_nothing_is_allowed(self, store):
        run(store.record([]))

    def test_an_unknown_prediction_is_none(self, store):
        assert run(store.prediction(uuid4())) is None

    def test_traffic_counts_what_was_decided_in_a_half_open_window_of_one_version(self, store, tiny):
        other = model(version="1" * 16)
        run(store.register_model(other, START))
        hours = [START + timedelta(hours=hour) for hour in range(4)]
        made = [prediction(tiny, hour, decided) for hour, decided in zip(hours, (0, 1, 1, 3), strict=True)]
        run(store.record([*made, prediction(other, hours[1], 2)]))
        assert run(store.traffic(tiny, None, None)).tolist() == [1, 2, 0, 1]
        window = run(store.traffic(tiny, hours[1], hours[3]))
        assert window.tolist() == [0, 2, 0, 0]
        assert run(store.traffic(tiny, hours[2], hours[2])).sum() == 0
        assert run(store.traffic(other, None, None)).tolist() == [0, 0, 1, 0]

    def test_recorded_logits_are_those_of_the_window_in_order_of_time(self, store, tiny):
        hours = [START + timedelta(hours=hour) for hour in range(3)]
        run(store.record([prediction(tiny, hours[h], logits=np.full(4, h)) for h in (2, 0, 1)]))
        (block,) = run(blocks(store.recorded_logits(tiny, hours[0], hours[2])))
        assert block.dtype == np.float16 and block.tolist() == [[0] * 4, [1] * 4]

    def test_a_window_larger_than_a_block_is_read_whole_and_once(self, store):
        wide = model(labels=tuple(f"class-{i}" for i in range(2000)))
        run(store.register_model(wide, START))
        made = [
            prediction(wide, START + timedelta(seconds=i // 7), logits=np.full(2000, i)) for i in range(2200)
        ]
        for start in range(0, len(made), 500):
            run(store.record(made[start : start + 500]))
        run(store.learn([item(one, i % 2000) for i, one in enumerate(made)], START))
        logits = run(blocks(store.recorded_logits(wide, None, None)))
        assert len(logits) > 1
        assert sorted(np.concatenate(logits)[:, 0].tolist()) == sorted(
            np.arange(2200, dtype=np.float16).tolist()
        )
        labelled = run(blocks(store.labelled(wide, None, None, with_logits=True)))
        assert len(labelled) > 1
        truth = np.concatenate([block.labels for block in labelled])
        assert sorted(truth.tolist()) == sorted(i % 2000 for i in range(2200))

    # Priors

    def test_versions_count_from_one_and_the_newest_is_current(self, store):
        first = run(store.add_prior(prior(note="a", author="b"), None))
        second = run(store.add_prior(prior(probabilities=np.array([0.7, 0.1, 0.1, 0.1])), 1))
        assert (first.version, second.version) == (1, 2)
        (current,) = run(store.current_priors())
        assert current.version == 2 and current.created == START
        np.testing.assert_array_equal(current.probabilities, [0.7, 0.1, 0.1, 0.1])
        versions = run(store.prior_versions(first.label_set, "default"))
        assert [(one.version, one.note, one.author) for one in versions] == [(2, None, None), (1, "a", "b")]
        assert run(store.prior_version(first.label_set, "default", 1)).note == "a"
        assert run(store.prior_version(first.label_set, "default", 3)) is None

    @pytest.mark.parametrize("replaces", [None, 2])
    def test_a_version_that_replaces_another_than_the_current_one_is_stale(self, store, replaces):
        run(store.add_prior(prior(), None))
        with pytest.raises(Stale):
            run(store.add_prior(prior(), replaces))
        assert [one.version for one in run(store.current_priors())] == [1]

    def test_names_of_two_label_sets_are_apart(self, store):
        run(store.add_prior(prior(), None))
        run(store.add_prior(prior(labels=("a", "b")), None))
        assert [one.version for one in run(store.current_priors())] == [1, 1]

    def test_numbers_go_on_after_a_name_was_deleted_and_its_old_versions_stay_gone(self, store):
        added = run(store.add_prior(prior("night"), None))
        run(store.add_prior(prior("night"), 1))
        with pytest.raises(Stale):
            run(store.delete_prior(added.label_set, "night", 1))
        run(store.delete_prior(added.label_set, "night", 2))
        assert list(run(store.current_priors())) == []
        assert list(run(store.prior_versions(added.label_set, "night"))) == []
        assert run(store.prior_version(added.label_set, "night", 1)) is None
        with pytest.raises(Stale):
            run(store.add_prior(prior("night"), 2))
        assert run(store.add_prior(prior("night"), None)).version == 3
        assert [one.version for one in run(store.prior_versions(added.label_set, "night"))] == [3]

    def test_many_at_once_that_replace_the_same_version_make_one(self, store):
        run(store.add_prior(prior(), None))

        async def race() -> list[Any]:
            return await asyncio.gather(
                *(store.add_prior(prior(note=str(i)), 1) for i in range(20)), return_exceptions=True
            )

        outcomes = run(race())
        won = [one for one in outcomes if not isinstance(one, Stale)]
        assert [one.version for one in won] == [2]
        assert [one.note for one in run(store.current_priors())] == [won[0].note]

    # Writing

    def test_a_store_that_writes_says_so(self, store):
        run(store.check_writable())

    def test_a_prediction_of_a_model_that_was_never_registered_is_a_fault_and_harms_no_neighbour(
        self, store, tiny
    ):
        good = [prediction(tiny) for _ in range(50)]
        bad = prediction(tiny)._replace(model_version="f" * 16)

        async def together() -> list[Any]:
            work = [store.record([one]) for one in (*good[:25], bad, *good[25:])]
            return await asyncio.gather(*work, return_exceptions=True)

        outcomes = run(together())
        assert isinstance(outcomes.pop(25), LookupError)
        assert outcomes == [None] * 50
        assert run(store.traffic(tiny, None, None)).sum() == 50
