"""Priors: what a version may be made of, preconditions, rollback, and versions that exist exactly once."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from service.core.exceptions import Conflict, Invalid, NotFound, Refusal, Stale
from service.core.priors import Precondition, Priors, PriorSpec, etag, probabilities_of
from tests.contracts.calls import run
from tests.recorded import LABELS, TurnedClock, model
from tests.service.stores import opened

TINY = model()
UNIFORM = PriorSpec(uniform=True)


@pytest.fixture
def clock():
    return TurnedClock()


@pytest.fixture
def store(tmp_path, clock):
    with opened(tmp_path, clock) as store:
        yield store


def loaded(store, clock) -> Priors:
    priors = Priors(store, clock)
    run(priors.load({TINY.label_set: TINY.labels}))
    return priors


@pytest.fixture
def priors(store, clock):
    return loaded(store, clock)


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """Priors whose `default` nobody changes."""
    clock = TurnedClock()
    folder = tmp_path_factory.mktemp("steady")
    with opened(folder, clock) as store:
        yield loaded(store, clock)


def match(prior) -> Precondition:
    return Precondition(match=frozenset({etag(prior)}))


def test_default_begins_as_uniform_version_one_and_only_once(priors, store, clock):
    first = priors.current(TINY.label_set, "default")
    assert first.version == 1 and first.probabilities.tolist() == [0.25] * 4
    assert loaded(store, clock).current(TINY.label_set, "default").version == 1


def test_a_restart_finds_every_current_version(priors, store, clock):
    run(priors.put(TINY, "night", PriorSpec(counts=[1, 2, 3, 4], note="n", author="a")))
    run(priors.put(TINY, "default", PriorSpec(source=True)))
    again = loaded(store, clock)
    for name in ("night", "default"):
        before, after = priors.current(TINY.label_set, name), again.current(TINY.label_set, name)
        assert (after.version, after.note, after.author) == (before.version, before.note, before.author)
        assert after.probabilities.tobytes() == before.probabilities.tobytes()
        assert etag(after) == etag(before)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (PriorSpec(counts=[6, 2, 1, 1]), [0.6, 0.2, 0.1, 0.1]),
        (PriorSpec(counts=dict(zip(reversed(LABELS), (1, 1, 2, 6), strict=True))), [0.6, 0.2, 0.1, 0.1]),
        (PriorSpec(counts=[5, 1, 0, 0], smoothing=1.0), [0.6, 0.2, 0.1, 0.1]),
        (PriorSpec(counts=[3, 1, 0, 0]), [0.75, 0.25, 0, 0]),
        (PriorSpec(probabilities=[0.7, 0.3, 0, 0]), [0.7, 0.3, 0, 0]),
        (PriorSpec(probabilities=dict(zip(LABELS, (0.1, 0.2, 0.3, 0.4), strict=True))), [0.1, 0.2, 0.3, 0.4]),
        (PriorSpec(uniform=True), [0.25] * 4),
        (PriorSpec(source=True), TINY.source_prior.tolist()),
    ],
)
def test_a_version_is_made_of_one_of_four(steady, spec, expected):
    made = run(steady.put(TINY, "night", spec))
    np.testing.assert_allclose(made.probabilities, expected, rtol=1e-12)
    assert made is steady.current(TINY.label_set, "night")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("spec", "label", "says"),
    [
        (PriorSpec(), None, "exactly one"),
        (PriorSpec(uniform=True, source=True), None, "exactly one"),
        (PriorSpec(counts=[1] * 4, probabilities=[0.25] * 4), None, "exactly one"),
        (PriorSpec(uniform=True, smoothing=1.0), None, "smoothing"),
        (PriorSpec(probabilities=[0.25] * 4, smoothing=0.0), None, "smoothing"),
        (PriorSpec(counts=[1] * 4, smoothing=-1.0), None, "[Ss]moothing"),
        (PriorSpec(counts=[1] * 4, smoothing=NAN), None, "[Ss]moothing"),
        (PriorSpec(counts=[1, 2, NAN, 4]), "blue", "blue"),
        (PriorSpec(counts=[1, 2, 3, INF]), "grey", "grey"),
        (PriorSpec(counts=[1, -2, 3, 4]), "green", "green"),
        (PriorSpec(counts=[0, 0, 0, 0]), None, "zero"),
        (PriorSpec(counts=[1, 2, 3]), None, "3 for 4"),
        (PriorSpec(counts=[]), None, "0 for 4"),
        (PriorSpec(counts={"red": 1, "green": 1, "blue": 1}), "grey", "missing"),
        (PriorSpec(counts={**dict.fromkeys(LABELS, 1), "mauve": 1}), "mauve", "no label"),
        (PriorSpec(probabilities=[0.5, 0.5, 0.1, 0.0]), None, "sum"),
        (PriorSpec(probabilities=[0.25, 0.25, 0.25, 0.25 + 2e-6]), None, "sum"),
        (PriorSpec(probabilities=[0.0] * 4), None, "sum"),
        (PriorSpec(probabilities=[1.5, -0.5, 0, 0]), "green", "green"),
        (PriorSpec(probabilities=[0.5, 0.5, NAN, 0]), "blue", "blue"),
        (PriorSpec(probabilities=[0.5, 0.5]), None, "4 classes but 2"),
        (PriorSpec(probabilities={}), "red", "missing"),
    ],
)
def test_what_is_no_prior_is_refused_and_changes_nothing(steady, spec, label, says):
    with pytest.raises(Invalid, match=says) as refused:
        run(steady.put(TINY, "default", spec))
    assert refused.value.fields.get("label") == label
    assert steady.current(TINY.label_set, "default").version == 1


def test_huge_counts_do_not_overflow(priors):
    made = run(priors.put(TINY, "default", PriorSpec(counts=[1e308] * 4)))
    np.testing.assert_allclose(made.probabilities, 0.25)


def test_a_sum_within_one_in_a_million_is_taken_and_made_exact(priors):
    made = run(priors.put(TINY, "default", PriorSpec(probabilities=[0.25, 0.25, 0.25, 0.25 + 9e-7])))
    assert made.probabilities.sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "9", "x" * 64])
def test_a_good_name_is_taken(steady, name):
    assert run(steady.put(TINY, name, UNIFORM)).name == name


@pytest.mark.parametrize("name", ["", ".a", "-a", "_a", "a b", "a/b", "x" * 65, "a\n", "ä", "a\0"])
def test_a_bad_name_is_refused(steady, name):
    with pytest.raises(Invalid):
        run(steady.put(TINY, name, UNIFORM))


def test_what_is_not_there_is_not_found(steady):
    for work in (
        lambda: steady.current(TINY.label_set, "nobody"),
        lambda: steady.current("another set", "default"),
        lambda: run(steady.versions(TINY.label_set, "nobody")),
        lambda: run(steady.rollback(TINY.label_set, "nobody", 1)),
        lambda: run(steady.rollback(TINY.label_set, "default", 2)),
        lambda: run(steady.delete(TINY.label_set, "nobody")),
    ):
        with pytest.raises(NotFound):
            work()


def test_a_version_that_was_read_stays_as_it_was(priors):
    before = priors.current(TINY.label_set, "default")
    kept = before.probabilities.copy()
    run(priors.put(TINY, "default", PriorSpec(counts=[1, 2, 3, 4])))
    np.testing.assert_array_equal(before.probabilities, kept)


def test_rollback_makes_a_new_version_equal_to_the_old_one(priors, clock):
    run(priors.put(TINY, "default", PriorSpec(counts=[1, 2, 3, 4], note="mine")))
    run(priors.put(TINY, "default", UNIFORM))
    clock.turn(hours=1)
    made = run(priors.rollback(TINY.label_set, "default", 2))
    assert (made.version, made.note, made.created) == (4, "mine", clock.now)
    np.testing.assert_allclose(made.probabilities, [0.1, 0.2, 0.3, 0.4])
    assert [one.version for one in run(priors.versions(TINY.label_set, "default"))] == [4, 3, 2, 1]


def test_numbers_go_on_after_deletion_and_old_versions_do_not_come_back(priors):
    run(priors.put(TINY, "night", UNIFORM))
    run(priors.put(TINY, "night", UNIFORM))
    run(priors.delete(TINY.label_set, "night"))
    assert [one.name for one in priors.all(TINY.label_set)] == ["default"]
    assert run(priors.put(TINY, "night", UNIFORM)).version == 3
    with pytest.raises(NotFound):
        run(priors.rollback(TINY.label_set, "night", 1))


def test_the_default_cannot_be_deleted(priors):
    with pytest.raises(Conflict):
        run(priors.delete(TINY.label_set, "default"))


def test_every_version_has_an_entity_tag_of_its_own(priors):
    other = model("other", labels=("a", "b"))
    made = [
        run(priors.put(of, name, UNIFORM)) for of in (TINY, other) for name in ("x", "y") for _ in range(3)
    ]
    tags = {etag(one) for one in made}
    assert len(tags) == len(made)
    assert all(tag.startswith('"') and tag.endswith('"') for tag in tags)


def test_a_precondition_holds_for_the_current_version_only(priors):
    first = priors.current(TINY.label_set, "default")
    second = run(priors.put(TINY, "default", UNIFORM, match(first)))
    for stale in (
        match(first),
        Precondition(match=frozenset()),
        Precondition(none_match=frozenset({"*"})),
        Precondition(none_match=frozenset({etag(second)})),
    ):
        for work in (
            lambda stale=stale: priors.put(TINY, "default", UNIFORM, stale),
            lambda stale=stale: priors.rollback(TINY.label_set, "default", 1, stale),
        ):
            with pytest.raises(Stale):
                run(work())
    assert priors.current(TINY.label_set, "default") is second
    for fresh in (Precondition(match=frozenset({"*"})), Precondition(none_match=frozenset({etag(first)}))):
        run(priors.put(TINY, "default", UNIFORM, fresh))
    assert priors.current(TINY.label_set, "default").version == 4


def test_a_precondition_on_a_name_that_is_not_there_is_stale_and_none_match_makes_it(priors):
    anything = Precondition(match=frozenset({"*"}))
    for work in (
        lambda: priors.put(TINY, "night", UNIFORM, anything),
        lambda: priors.rollback(TINY.label_set, "night", 1, anything),
        lambda: priors.delete(TINY.label_set, "night", anything),
    ):
        with pytest.raises(Stale):
            run(work())
    none = Precondition(none_match=frozenset({"*"}))
    made = run(priors.put(TINY, "night", UNIFORM, none))
    assert made.version == 1
    with pytest.raises(Stale):
        run(priors.put(TINY, "night", UNIFORM, none))
    run(priors.put(TINY, "night", UNIFORM))
    with pytest.raises(Stale):
        run(priors.delete(TINY.label_set, "night", match(made)))
    run(priors.delete(TINY.label_set, "night", match(priors.current(TINY.label_set, "night"))))


def test_of_many_changes_at_once_each_acknowledged_version_exists_exactly_once(priors, store):
    async def all_at_once():
        changes = [priors.put(TINY, "default", PriorSpec(uniform=True, note=str(i))) for i in range(40)]
        return await asyncio.gather(*changes)

    made = run(all_at_once())
    assert sorted(one.version for one in made) == list(range(2, 42))
    kept = {one.version: one.note for one in run(store.prior_versions(TINY.label_set, "default"))}
    assert {one.version: one.note for one in made} == {v: n for v, n in kept.items() if v > 1}
    assert priors.current(TINY.label_set, "default").version == 41


def test_of_many_changes_with_the_same_precondition_one_wins(priors):
    asked = match(priors.current(TINY.label_set, "default"))

    async def race():
        changes = [priors.put(TINY, "default", UNIFORM, asked) for _ in range(10)]
        return await asyncio.gather(*changes, return_exceptions=True)

    outcomes = run(race())
    assert sum(isinstance(one, Stale) for one in outcomes) == 9
    assert [one.version for one in outcomes if not isinstance(one, Refusal)] == [2]


def test_a_change_made_elsewhere_is_found_and_followed(priors, store, clock):
    elsewhere = loaded(store, clock)
    run(elsewhere.put(TINY, "default", PriorSpec(counts=[1, 2, 3, 4])))
    made = run(priors.put(TINY, "default", UNIFORM))
    assert made.version == 3
    run(elsewhere.put(TINY, "night", UNIFORM))
    run(elsewhere.delete(TINY.label_set, "night"))
    assert run(priors.put(TINY, "night", UNIFORM)).version == 2


def test_models_with_the_same_labels_share_their_priors(priors):
    twin = replace(model("twin"), source_prior=np.array([0.4, 0.3, 0.2, 0.1]))
    run(priors.put(twin, "night", PriorSpec(source=True)))
    assert priors.current(TINY.label_set, "night").probabilities.tolist() == [0.4, 0.3, 0.2, 0.1]
    reordered = model("reordered", labels=tuple(reversed(LABELS)))
    with pytest.raises(NotFound):
        priors.current(reordered.label_set, "night")


def test_probabilities_of_a_request_are_read_by_label_or_by_index():
    by_label = dict(zip(reversed(LABELS), (0.4, 0.3, 0.2, 0.1), strict=True))
    for values in (by_label, [0.1, 0.2, 0.3, 0.4]):
        np.testing.assert_allclose(probabilities_of(values, LABELS, "target_prior"), [0.1, 0.2, 0.3, 0.4])
    with pytest.raises(Invalid, match="target_prior"):
        probabilities_of([0.5, 0.6, 0, 0], LABELS, "target_prior")
