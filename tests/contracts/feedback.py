"""What every store must do with labels that arrive later: the part of its contract that is feedback's."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from tests.contracts.calls import blocks, labels_of, run
from tests.recorded import LABELS, START, item, model, prediction, uuid7


class FeedbackContract:
    """`store` and `tiny`, a model registered in it, are those of the whole contract."""

    def test_any_mixture_of_requests_ends_as_the_rules_say(self, store, tiny):
        """A second definition of the rules, over many random requests with repeats and old labels."""
        rng = np.random.default_rng(11)
        made = [prediction(tiny, START + timedelta(seconds=i), i % 4) for i in range(12)]
        run(store.record(made))
        counted: dict[Any, list[Any]] = {}  # id -> [label, probability, time, history]
        for _ in range(60):
            items, expected = [], {"accepted": 0, "corrected": 0, "unchanged": 0}
            for _ in range(int(rng.integers(1, 8))):
                one = made[rng.integers(len(made))]
                label = int(rng.integers(4))
                at = None if rng.random() < 0.3 else START + timedelta(hours=int(rng.integers(50)))
                probability = None if rng.random() < 0.5 else float(rng.uniform(0.1, 1))
                items.append(item(one, label, labelled_at=at, sampling_probability=probability))
                entry = counted.get(one.id)
                if entry is None:
                    counted[one.id] = [label, probability, at, [label]]
                    outcome = "accepted"
                elif (at is not None and entry[2] is not None and at < entry[2]) or label == entry[0]:
                    if label == entry[0] and at is not None:
                        entry[2] = at if entry[2] is None else max(at, entry[2])
                    outcome = "unchanged"
                else:
                    entry[0], entry[2] = label, at
                    entry[3].append(label)
                    outcome = "corrected"
                expected[outcome] += 1
            receipt = run(store.learn(items, START))
            assert {name: getattr(receipt, name) for name in expected} == expected
        (block,) = run(blocks(store.labelled(tiny, None, None, with_logits=False)))
        in_order = [counted[one.id] for one in made if one.id in counted]
        assert block.labels.tolist() == [entry[0] for entry in in_order]
        assert block.sampling_probability.tolist() == [entry[1] or 1.0 for entry in in_order]
        for one in made:
            assert labels_of(store, one) == counted[one.id][3]

    def test_labels_are_counted_once_however_often_they_come(self, store, tiny):
        made = [prediction(tiny, decided=i % 4) for i in range(8)]
        run(store.record(made))
        items = [item(one, LABELS[i % 3]) for i, one in enumerate(made)]
        assert run(store.learn(items, START)).accepted == 8
        again = run(store.learn(items, START))
        assert (again.accepted, again.corrected, again.unchanged, again.rejected) == (0, 0, 8, ())
        (block,) = run(blocks(store.labelled(tiny, None, None, with_logits=False)))
        assert len(block.labels) == 8 and block.logits is None
        assert labels_of(store, made[0]) == [0]

    def test_another_label_corrects_and_the_history_keeps_both(self, store, tiny):
        made = prediction(tiny)
        run(store.record([made]))
        run(store.learn([item(made, "red")], START))
        later = START + timedelta(hours=1)
        seen = START - timedelta(days=1)
        assert run(store.learn([item(made, 2, labelled_at=seen)], later)).corrected == 1
        found = run(store.prediction(made.id))
        assert [(one.index, one.received, one.labelled_at) for one in found.labels] == [
            (0, START, None),
            (2, later, seen),
        ]
        (block,) = run(blocks(store.labelled(tiny, None, None, with_logits=False)))
        assert block.labels.tolist() == [2]

    def test_items_of_one_request_apply_in_order(self, store, tiny):
        made = prediction(tiny)
        run(store.record([made]))
        receipt = run(store.learn([item(made, name) for name in ("red", "red", "green", "red")], START))
        assert (receipt.accepted, receipt.corrected, receipt.unchanged) == (1, 2, 1)
        assert labels_of(store, made) == [0, 1, 0]

    def test_rejections_name_their_place_and_do_not_stop_the_others(self, store, tiny, clock):
        made = prediction(tiny)
        old = uuid7(START - timedelta(days=91))
        nobody = uuid7(START)
        random_id = uuid4()
        run(store.record([made]))
        items = [
            item(made, "mauve"), item(made, 4), item(made, -1), item(nobody, "red"), item(old, "red"),
            item(random_id, "red"), item(made, "red"),
        ]  # fmt: skip
        receipt = run(store.learn(items, START))
        assert receipt.accepted == 1
        assert [(one.position, one.prediction_id, one.code) for one in receipt.rejected] == [
            (0, made.id, "unknown-label"),
            (1, made.id, "unknown-label"),
            (2, made.id, "unknown-label"),
            (3, nobody, "prediction-not-found"),
            (4, old, "prediction-expired"),
            (5, random_id, "prediction-not-found"),
        ]

    def test_a_label_is_of_the_predictions_own_model(self, store, tiny):
        other = model("other", labels=("cat", "dog"))
        run(store.register_model(other, START))
        made = prediction(other)
        run(store.record([made]))
        receipt = run(store.learn([item(made, "red"), item(made, 3), item(made, "dog")], START))
        assert [one.code for one in receipt.rejected] == ["unknown-label"] * 2
        assert labels_of(store, made) == [1]

    def test_a_prediction_at_the_end_of_its_time_still_takes_a_label(self, store, tiny, clock):
        made = prediction(tiny)
        run(store.record([made]))
        assert run(store.learn([item(made, 0)], START + timedelta(days=90))).accepted == 1
        late = run(store.learn([item(made, 1)], START + timedelta(days=90, milliseconds=1)))
        assert [one.code for one in late.rejected] == ["prediction-expired"]

    def test_the_sampling_probability_is_the_first_labels(self, store, tiny):
        made = [prediction(tiny, START + timedelta(seconds=i)) for i in range(2)]
        run(store.record(made))
        run(store.learn([item(made[0], 0, sampling_probability=0.25), item(made[1], 0)], START))
        run(store.learn([item(made[0], 1, sampling_probability=0.5)], START))
        (block,) = run(blocks(store.labelled(tiny, None, None, with_logits=False)))
        assert block.sampling_probability.tolist() == [0.25, 1.0]

    def test_labelled_predictions_are_chosen_by_time_of_prediction(self, store, tiny):
        hours = [START + timedelta(hours=hour) for hour in range(4)]
        made = [prediction(tiny, hour, decided=h, logits=np.eye(4)[h]) for h, hour in enumerate(hours)]
        run(store.record(made))
        run(store.learn([item(one, 0) for one in made[:3]], START + timedelta(days=1)))
        (block,) = run(blocks(store.labelled(tiny, hours[1], hours[3], with_logits=True)))
        assert block.decided.tolist() == [1, 2]
        assert block.logits.dtype == np.float16 and block.logits.argmax(axis=1).tolist() == [1, 2]

    def test_an_empty_window_is_empty_columns(self, store, tiny):
        (block,) = run(blocks(store.labelled(tiny, None, None, with_logits=True)))
        assert len(block.decided) == len(block.labels) == len(block.sampling_probability) == 0
        assert block.logits.shape == (0, 4)
        (logits,) = run(blocks(store.recorded_logits(tiny, None, None)))
        assert logits.shape == (0, 4)

    @pytest.mark.slow
    def test_ten_thousand_labels_go_in_at_once(self, store, tiny):
        made = [prediction(tiny) for _ in range(10_000)]
        run(store.record(made))
        receipt = run(store.learn([item(one, i % 4) for i, one in enumerate(made)], START))
        assert receipt.accepted == 10_000

    def test_times_keep_their_microseconds_and_come_back_in_utc(self, store, tiny):
        made = prediction(tiny)
        run(store.record([made]))
        elsewhere = datetime.fromisoformat("2026-05-02T03:04:05.678901+05:30")
        run(store.learn([item(made, 0, labelled_at=elsewhere)], START))
        (label,) = run(store.prediction(made.id)).labels
        assert label.labelled_at == elsewhere and label.labelled_at.tzinfo is UTC
