"""Metrics: identities, then scikit-learn or a loop as the second definition, then the edges."""

import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, recall_score, top_k_accuracy_score

from longtail.intervals import Interval, largest_variance, widened, wilson
from longtail.metrics import (
    balanced_error,
    class_errors,
    expected_calibration_error,
    group_members,
    groups_by_count,
    mean_error,
    top_k_balanced_error,
    traffic_error,
)
from longtail.priors import PriorError, prior_from_counts, uniform_prior


def labels_and_predictions(n_classes=20, n=600, seed=0):
    """Return long-tailed labels that hold every class, and predictions that are right about half the time."""
    rng = np.random.default_rng(seed)
    share = prior_from_counts(100.0 ** (-np.arange(n_classes) / max(n_classes - 1, 1)))
    labels = np.concatenate([np.arange(n_classes), rng.choice(n_classes, n, p=share)])
    predicted = np.where(rng.random(len(labels)) < 0.5, labels, rng.integers(0, n_classes, len(labels)))
    return labels, predicted


# Errors by class


def test_class_errors_are_one_minus_scikit_learns_recall():
    labels, predicted = labels_and_predictions()
    found = class_errors(labels, predicted, 20)
    np.testing.assert_allclose(found.errors, 1 - recall_score(labels, predicted, average=None), atol=1e-12)
    np.testing.assert_array_equal(found.labels, confusion_matrix(labels, predicted).sum(axis=1))


def test_balanced_error_is_one_minus_scikit_learns_balanced_accuracy():
    labels, predicted = labels_and_predictions()
    expected = 1 - balanced_accuracy_score(labels, predicted)
    assert balanced_error(labels, predicted, 20) == pytest.approx(expected, abs=1e-12)


def test_with_as_many_labels_in_each_class_balanced_error_is_the_plain_error():
    labels = np.tile(np.arange(7), 30)
    predicted = np.random.default_rng(1).integers(0, 7, len(labels))
    assert balanced_error(labels, predicted, 7) == pytest.approx(np.mean(labels != predicted))


def test_balanced_error_does_not_change_when_a_class_is_seen_more_often():
    labels, predicted = labels_and_predictions()
    times = np.where(labels == 3, 10, 1)
    assert balanced_error(np.repeat(labels, times), np.repeat(predicted, times), 20) == pytest.approx(
        balanced_error(labels, predicted, 20)
    )


def test_a_class_without_labels_is_left_out_of_the_mean_and_not_counted_as_right():
    found = class_errors([0, 0, 2], [0, 1, 0], 4)
    np.testing.assert_array_equal(found.errors, [0.5, np.nan, 1, np.nan])
    np.testing.assert_array_equal(found.labels, [2, 0, 1, 0])
    np.testing.assert_array_equal(found.effective, [2, 0, 1, 0])
    assert balanced_error([0, 0, 2], [0, 1, 0], 4) == 0.75


def test_without_labels_there_is_no_error_and_no_knowledge():
    mean = mean_error(class_errors([], [], 3))
    assert math.isnan(mean.error)
    assert mean.interval == mean.interval_all == Interval(0.0, 1.0)
    assert (mean.labels, mean.classes, mean.classes_with_labels) == (0, 3, 0)
    assert math.isnan(balanced_error([], [], 3))
    assert math.isnan(traffic_error([], [], 3).error)


@pytest.mark.parametrize("n_classes", [1, 2, 10_000])
def test_all_right_is_no_error_for_any_number_of_classes(n_classes):
    labels = np.arange(n_classes)
    assert balanced_error(labels, labels, n_classes) == 0
    assert mean_error(class_errors(labels, labels, n_classes)).interval.low == 0


def test_the_mean_over_a_group_is_that_of_its_classes_with_both_intervals():
    labels, predicted = [0, 0, 0, 1, 1, 3], [0, 1, 1, 1, 0, 3]
    by_class = class_errors(labels, predicted, 5)
    group = mean_error(by_class, [1, 3, 4])
    assert group.error == pytest.approx((1 / 2 + 0) / 2)
    assert group.interval == largest_variance([0.5, 0], [2, 1])
    assert group.interval_all == widened(group.interval, 2, 3)
    assert (group.labels, group.classes, group.classes_with_labels) == (3, 3, 2)


@pytest.mark.parametrize("members", [[], [0, 0], [2], [-1], [0.0], [True, False]])
def test_a_mean_over_no_class_or_one_class_twice_or_an_unknown_class_is_refused(members):
    with pytest.raises(ValueError, match=r"class|abel"):
        mean_error(class_errors([0], [0], 2), members)


# Weighted labels


def test_weighted_errors_are_hajeks_and_kishs_written_as_loops():
    labels, predicted = labels_and_predictions(8, 200)
    weights = 1 / np.random.default_rng(2).uniform(0.05, 1, len(labels))
    found = class_errors(labels, predicted, 8, weights)
    for y in range(8):
        mine = [(w, p != y) for w, p, label in zip(weights, predicted, labels, strict=True) if label == y]
        total = sum(w for w, _ in mine)
        assert found.errors[y] == pytest.approx(sum(w for w, wrong in mine if wrong) / total)
        assert found.effective[y] == pytest.approx(total**2 / sum(w * w for w, _ in mine))
        assert found.labels[y] == len(mine)


def test_equal_weights_change_nothing_whatever_their_size():
    labels, predicted = labels_and_predictions()
    plain = class_errors(labels, predicted, 20)
    for weight in (1e-200, 3.0, 1e200):
        weighted = class_errors(labels, predicted, 20, np.full(len(labels), weight))
        np.testing.assert_array_equal(weighted.errors, plain.errors)
        np.testing.assert_allclose(weighted.effective, plain.effective, rtol=1e-12)


def test_kishs_number_is_never_more_than_the_labels_and_falls_with_one_heavy_weight():
    found = class_errors([0] * 10, [0] * 10, 1, [1] * 9 + [100])
    assert 1 < found.effective[0] < 1.2
    assert class_errors([0] * 10, [0] * 10, 1, [2] * 10).effective[0] == 10


def test_weights_correct_a_sample_that_preferred_errors():
    rng = np.random.default_rng(3)
    wrong = rng.random(200_000) < 0.2
    probability = np.where(wrong, 0.5, 0.1)
    kept = rng.random(len(wrong)) < probability
    labels, predicted = np.zeros(kept.sum(), dtype=int), wrong[kept].astype(int)
    naive = class_errors(labels, predicted, 2).errors[0]
    weighted = class_errors(labels, predicted, 2, 1 / probability[kept]).errors[0]
    assert naive > 0.5
    assert weighted == pytest.approx(wrong.mean(), abs=0.01)  # standard error 0.003


@pytest.mark.parametrize("bad", [[1, 0], [1, -1], [1, np.nan], [1, np.inf], [1], 1.0])
def test_weights_that_are_not_one_finite_positive_number_for_each_label_are_refused(bad):
    with pytest.raises(ValueError, match="weight"):
        class_errors([0, 1], [0, 1], 2, bad)


def test_the_traffic_error_is_the_weighted_mean_with_wilsons_interval_at_kishs_number():
    labels, predicted = labels_and_predictions()
    weights = 1 / np.random.default_rng(4).uniform(0.1, 1, len(labels))
    found = traffic_error(labels, predicted, 20, weights)
    assert found.error == pytest.approx(np.average(labels != predicted, weights=weights))
    expected = wilson(found.error, weights.sum() ** 2 / (weights**2).sum())
    assert (found.interval.low, found.interval.high) == pytest.approx((expected.low, expected.high))
    assert found.labels == len(labels)


# Top-k


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_balanced_error_is_scikit_learns_with_classes_weighted_alike(k):
    labels, _ = labels_and_predictions()
    scores = np.random.default_rng(5).normal(size=(len(labels), 20))
    scores[np.arange(len(labels)), labels] += 1
    expected = 1 - top_k_accuracy_score(labels, scores, k=k, sample_weight=1 / np.bincount(labels)[labels])
    assert top_k_balanced_error(labels, scores, k) == pytest.approx(expected, abs=1e-12)


def test_the_first_place_is_the_balanced_error_of_the_argmax_and_all_places_hold_every_label():
    labels, _ = labels_and_predictions()
    scores = np.round(np.random.default_rng(6).normal(size=(len(labels), 20)))  # many ties
    assert top_k_balanced_error(labels, scores, 1) == balanced_error(labels, scores.argmax(axis=1), 20)
    assert top_k_balanced_error(labels, scores, 20) == 0
    assert top_k_balanced_error(labels, scores, 1_000) == 0


def test_a_label_that_is_ruled_out_is_wrong_at_any_k():
    assert top_k_balanced_error([0, 1], [[-np.inf, 1.0], [-np.inf, 1.0]], 2) == 0.5


# Calibration


def test_probabilities_equal_to_the_shares_of_the_labels_have_no_calibration_error():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    shares = np.tile([0.5, 0.3, 0.2], (100, 1))
    assert expected_calibration_error(shares, labels, [0.5, 0.3, 0.2]) == pytest.approx(0, abs=1e-12)


def test_a_calibrated_posterior_looks_wrong_on_a_balanced_sample_until_the_prior_is_stated():
    rng = np.random.default_rng(7)
    source = np.array([0.9, 0.1])
    labels = np.repeat([0, 1], 100_000)  # balanced, as a test set is
    x = rng.normal(np.where(labels == 1, 1.0, -1.0))
    odds = source[1] / source[0] * np.exp(2 * x)
    posterior = np.stack([1 / (1 + odds), odds / (1 + odds)], axis=1)
    assert expected_calibration_error(posterior, labels, source) < 0.01
    assert expected_calibration_error(posterior, labels, uniform_prior(2)) > 0.1


def test_weighting_to_a_prior_is_repeating_the_items_until_they_have_its_mix():
    rng = np.random.default_rng(8)
    labels = rng.permutation(np.repeat([0, 1, 2], 40))
    probabilities = rng.dirichlet(np.full(3, 0.7), size=120)
    times = np.array([5, 3, 2])[labels]
    rows, right = np.repeat(probabilities, times, axis=0), np.repeat(labels, times)
    confidence, hit = rows.max(axis=1), rows.argmax(axis=1) == right
    by_loop = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            by_loop += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    found = expected_calibration_error(probabilities, labels, [0.5, 0.3, 0.2])
    assert found == pytest.approx(by_loop, abs=1e-12)


def test_a_confidence_on_the_edge_of_two_bins_belongs_to_the_lower():
    probabilities = [[0.6, 0.4], [0.65, 0.35]]  # with 5 bins: the fourth alone, or the third and the fourth
    assert expected_calibration_error(probabilities, [0, 1], [0.5, 0.5], bins=5) == pytest.approx(
        0.5 * 0.4 + 0.5 * 0.65
    )


def test_one_class_is_always_calibrated():
    assert expected_calibration_error([[1.0], [1.0]], [0, 0], [1.0]) == 0


@pytest.mark.parametrize("bad", [[[np.nan, 1]], [[-0.5, 1.5]], [[0.5, 0.4]], [0.5, 0.5], []])
def test_what_are_no_probabilities_is_refused(bad):
    with pytest.raises(ValueError, match="robabilities"):
        expected_calibration_error(bad, [0], [0.5, 0.5])


def test_calibration_under_a_prior_that_no_label_can_have_is_refused():
    with pytest.raises(ValueError, match="nothing to measure"):
        expected_calibration_error([[0.5, 0.5]], [0], [0, 1])
    with pytest.raises(PriorError):
        expected_calibration_error([[0.5, 0.5]], [0], [0.5, 0.6])
    with pytest.raises(ValueError, match="bin"):
        expected_calibration_error([[0.5, 0.5]], [0], [0.5, 0.5], bins=0)


# Groups and labels


def test_groups_are_cut_as_the_paper_cuts_them():
    assert groups_by_count([500, 100, 99, 21, 20, 0]) == ["many", "many", "medium", "medium", "few", "few"]


def test_the_long_tail_of_cifar_100_has_groups_of_35_34_and_31():
    counts = [int(500 * 0.01 ** (c / 99)) for c in range(100)]
    members = group_members(groups_by_count(counts))
    assert {name: len(classes) for name, classes in members.items()} == {"many": 35, "medium": 34, "few": 31}


def test_group_members_are_every_class_once_in_order_of_first_appearance():
    members = group_members(["b", "a", "b", "c", "a"])
    assert list(members) == ["b", "a", "c"]
    assert [classes.tolist() for classes in members.values()] == [[0, 2], [1, 4], [3]]


def test_bounds_that_overlap_and_counts_that_are_none_are_refused():
    with pytest.raises(ValueError, match="below"):
        groups_by_count([1], many=20, few=20)
    for bad in ([-1], [np.nan], [[1]]):
        with pytest.raises(ValueError, match="count"):
            groups_by_count(bad)


@pytest.mark.parametrize("bad", [[0.0, 1.0], [-1, 0], [0, 2], [[0, 1]], ["0", "1"], [True, False]])
def test_labels_that_are_not_indices_are_refused(bad):
    for labels, predicted in ((bad, [0, 1]), ([0, 1], bad)):
        with pytest.raises(ValueError, match=r"[Ll]abel"):
            class_errors(labels, predicted, 2)


def test_labels_without_as_many_predictions_are_refused():
    with pytest.raises(ValueError, match="2 labels but 1"):
        class_errors([0, 1], [0], 2)
    with pytest.raises(ValueError, match="2 labels but 1"):
        top_k_balanced_error([0, 1], [[0.1, 0.9]], 1)
    with pytest.raises(ValueError, match="2 labels but 1"):
        expected_calibration_error([[0.1, 0.9]], [0, 1], [0.5, 0.5])
