"""The rules of feedback, one row a rule."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import permutations
from uuid import UUID, uuid4

import pytest

from service.core.exceptions import Invalid
from service.core.feedback import CurrentLabel, applied, index_of, is_expired, refuse_if_nothing_was_taken
from service.core.records import Receipt, Rejection
from tests.recorded import START, item, uuid7

ID = uuid4()


def at(hour: int) -> datetime:
    return START + timedelta(hours=hour)


@pytest.mark.parametrize(
    ("known", "label", "given", "outcome", "then", "then_at"),
    [
        (None, 2, None, "accepted", 2, None),
        (None, 2, at(1), "accepted", 2, at(1)),
        ((1, None), 2, None, "corrected", 2, None),
        ((1, None), 2, at(1), "corrected", 2, at(1)),
        ((1, at(2)), 2, None, "corrected", 2, None),  # no time: it cannot be older
        ((1, at(2)), 2, at(3), "corrected", 2, at(3)),
        ((1, at(2)), 2, at(2), "corrected", 2, at(2)),  # as old: the last to arrive wins
        ((1, at(2)), 2, at(1), "unchanged", 1, at(2)),
        ((1, None), 1, None, "unchanged", 1, None),
        ((1, at(2)), 1, at(1), "unchanged", 1, at(2)),
        ((1, at(2)), 1, at(3), "unchanged", 1, at(3)),  # seen again: what is older than that loses
        ((1, at(2)), 1, None, "unchanged", 1, at(2)),
    ],
)
def test_the_last_to_arrive_wins_unless_it_is_the_older_one(known, label, given, outcome, then, then_at):
    current = None if known is None else CurrentLabel(known[0], 0.5, known[1])
    probability = 0.5 if known else 0.25
    done, label_then = applied(current, label, item(ID, label, labelled_at=given, sampling_probability=0.25))
    assert done == outcome
    assert label_then == CurrentLabel(then, probability, then_at)


def test_labels_with_times_end_alike_in_whatever_order_they_arrive():
    log = [item(ID, label, labelled_at=at(hour)) for hour, label in enumerate((0, 1, 0, 2, 1))]
    ends = set()
    for order in permutations(log):
        current = None
        for one in order:
            _, current = applied(current, one.index, one)
        ends.add((current.index, current.labelled_at))
    assert ends == {(1, at(4))}


def test_sending_a_log_again_changes_nothing():
    log = [item(ID, label, labelled_at=at(hour)) for hour, label in enumerate((0, 1, 0, 2, 1))]
    current = None
    for one in log:
        _, current = applied(current, one.index, one)
    for one in log:
        outcome, again = applied(current, one.index, one)
        assert (outcome, again) == ("unchanged", current)


@pytest.mark.parametrize(
    ("label", "index"), [("b", 1), (0, 0), (1, 1), ("c", None), ("", None), (2, None), (-1, None)]
)
def test_a_label_is_found_by_name_or_by_place(label, index):
    assert index_of(item(ID, label), {"a": 0, "b": 1}) == index


def test_only_an_id_that_holds_a_time_expires():
    keep = timedelta(days=90)
    made = uuid7(START)
    assert not is_expired(made, keep, START + keep)
    assert is_expired(made, keep, START + keep + timedelta(milliseconds=1))
    assert not is_expired(uuid4(), keep, START)
    assert is_expired(UUID(int=7 << 76 | 2 << 62), keep, START)  # 1970
    assert not is_expired(UUID(int=(1 << 128) - (1 << 80) | 7 << 76 | 2 << 62), keep, START)  # beyond 9999


def test_only_a_request_of_which_nothing_was_taken_is_refused():
    rejection = Rejection(0, ID, "unknown-label")
    refuse_if_nothing_was_taken(Receipt(0, 0, 1, (rejection,)))
    refuse_if_nothing_was_taken(Receipt(1, 0, 0, ()))
    with pytest.raises(Invalid) as refused:
        refuse_if_nothing_was_taken(Receipt(0, 0, 0, (rejection,)))
    assert refused.value.fields == {
        "rejected": [{"position": 0, "prediction_id": str(ID), "code": "unknown-label"}]
    }
