"""Priors: what is accepted, what is refused, and that a refusal names the class."""

import numpy as np
import pytest

from longtail.priors import (
    PriorError,
    checked_prior,
    checked_source_prior,
    prior_from_counts,
    uniform_prior,
)


@pytest.mark.parametrize("n_classes", [1, 2, 10_000])
def test_the_uniform_prior_gives_equal_counts_their_prior(n_classes):
    np.testing.assert_allclose(uniform_prior(n_classes), prior_from_counts(np.full(n_classes, 7)), rtol=1e-12)
    assert uniform_prior(n_classes).sum() == pytest.approx(1, abs=1e-12)


def test_counts_become_their_shares():
    np.testing.assert_allclose(prior_from_counts([500, 300, 200]), [0.5, 0.3, 0.2], rtol=1e-15)


def test_a_prior_does_not_change_when_all_counts_are_multiplied():
    counts = np.random.default_rng(1).integers(1, 5_000, 50)
    np.testing.assert_allclose(prior_from_counts(counts), prior_from_counts(counts * 1e300), rtol=1e-12)


def test_smoothing_is_added_to_each_count():
    np.testing.assert_allclose(prior_from_counts([8, 0], smoothing=1), [0.9, 0.1], rtol=1e-15)
    np.testing.assert_allclose(prior_from_counts([0, 0], smoothing=2), [0.5, 0.5], rtol=1e-15)


def test_enormous_smoothing_is_uniform_and_not_an_overflow():
    np.testing.assert_allclose(prior_from_counts([3, 1], smoothing=1.7e308), [0.5, 0.5], rtol=1e-12)


def test_a_zero_count_is_a_target_prior_but_no_source_prior_unless_smoothed():
    prior = prior_from_counts([3, 0, 1])
    assert checked_prior(prior)[1] == 0
    with pytest.raises(PriorError, match="source prior of class 1 is zero") as refusal:
        checked_source_prior(prior)
    assert refusal.value.index == 1
    assert checked_source_prior(prior_from_counts([3, 0, 1], smoothing=0.1)).min() > 0


def test_a_prior_of_one_in_a_million_is_kept():
    assert checked_source_prior([1e-6, 1 - 1e-6])[0] == pytest.approx(1e-6, rel=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.1])
def test_the_class_with_a_bad_probability_or_count_is_named(bad):
    for check in (checked_prior, checked_source_prior, prior_from_counts):
        with pytest.raises(PriorError, match="class 2") as refusal:
            check([0.5, 0.5, bad])
        assert refusal.value.index == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "flat list"),
        (0.5, "flat list"),
        ([[0.5, 0.5]], "flat list"),
        ([[0.5], [0.2, 0.3]], "flat list"),
        (["0.5", "0.5"], "number"),
        ([None, 0.5], "number"),
        ([True, False], "number"),
        ([0.5, 0.499], "sum to one"),
        ([0.0, 0.0], "sum to one"),
        ([1e308, 1e308], "sum to one"),
    ],
)
def test_what_is_not_a_distribution_is_refused_without_blaming_a_class(values, message):
    with pytest.raises(PriorError, match=message) as refusal:
        checked_prior(values)
    assert refusal.value.index is None


def test_a_sum_off_by_less_than_a_millionth_is_renormalised_and_by_more_refused():
    assert checked_prior([0.5, 0.5 + 9e-7]).sum() == pytest.approx(1, abs=1e-15)
    with pytest.raises(PriorError, match="sum to one within 1e-06"):
        checked_prior([0.5, 0.5 + 1.1e-6])


def test_a_prior_of_another_length_is_refused():
    assert checked_prior([0.5, 0.5], n_classes=2).shape == (2,)
    with pytest.raises(PriorError, match="3 classes but 2 values"):
        checked_prior([0.5, 0.5], n_classes=3)


@pytest.mark.parametrize("smoothing", [-1, np.nan, np.inf])
def test_bad_smoothing_is_refused(smoothing):
    with pytest.raises(PriorError, match="Smoothing"):
        prior_from_counts([1, 2], smoothing=smoothing)


def test_counts_that_are_all_zero_are_refused():
    with pytest.raises(PriorError, match="All counts are zero"):
        prior_from_counts([0, 0])


def test_a_prior_without_classes_is_refused():
    with pytest.raises(PriorError, match="at least one class"):
        uniform_prior(0)


def test_the_values_handed_in_are_not_changed():
    values = np.array([0.5, 0.5 + 5e-7])
    before = values.copy()
    checked_prior(values)
    prior_from_counts(values)
    np.testing.assert_array_equal(values, before)
