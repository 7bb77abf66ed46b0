"""Calibration: losses against scikit-learn, fits against SciPy's optimisers and known truths."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import log_loss as sklearn_log_loss

from longtail.adjustment import probabilities
from longtail.calibration import (
    class_mean_log_loss,
    fit_offset_and_temperature,
    fit_temperature,
    log_loss,
    squared_error,
)
from longtail.metrics import expected_calibration_error


def held_out(n=2_000, n_classes=6, temperature=1.6, seed=0, offset=None):
    """Return logits f, labels and their prior such that softmax((f + offset) / temperature) is calibrated."""
    rng = np.random.default_rng(seed)
    falling = -np.log(100) * np.arange(n_classes) / max(n_classes - 1, 1)
    log_posterior = log_softmax(rng.normal(0, 2, (n, n_classes)) + falling, axis=1)
    labels = (np.exp(log_posterior).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    labels = np.minimum(labels, n_classes - 1)
    source = np.exp(log_posterior).mean(axis=0)
    return temperature * log_posterior - (0 if offset is None else offset), labels, source


# Losses


def test_the_squared_error_is_brier_s_and_weights_count_as_copies():
    rng = np.random.default_rng(6)
    p, y = rng.dirichlet(np.ones(4), 30), rng.integers(0, 4, 30)
    assert squared_error(p, y) == pytest.approx(((p - np.eye(4)[y]) ** 2).sum(axis=1).mean())
    copies = rng.integers(1, 4, 30)
    assert squared_error(p, y, copies) == pytest.approx(
        squared_error(np.repeat(p, copies, axis=0), np.repeat(y, copies))
    )
    assert squared_error(np.eye(3), [0, 1, 2]) == 0


def test_log_loss_is_scikit_learns_weighted_or_not():
    f, labels, _ = held_out()
    weights = np.random.default_rng(1).uniform(0.1, 5, len(labels))
    for w in (None, weights, 1e306 * weights):
        expected = sklearn_log_loss(
            labels, softmax(f / 1.3, axis=1), labels=range(6), sample_weight=None if w is None else weights
        )
        assert log_loss(f, labels, 1.3, w) == pytest.approx(expected, rel=1e-9)


def test_equal_logits_lose_the_log_of_the_number_of_classes():
    for n_classes in (1, 2, 10_000):
        assert log_loss(np.zeros((3, n_classes)), [0, 0, n_classes - 1]) == pytest.approx(math.log(n_classes))


def test_class_mean_log_loss_is_the_mean_over_classes_of_the_mean_within_each():
    f, labels, _ = held_out(n=300)
    lost = -log_softmax(f / 0.8, axis=1)[np.arange(len(labels)), labels]
    by_hand = np.mean([lost[labels == y].mean() for y in range(6) if (labels == y).any()])
    assert class_mean_log_loss(f, labels, 0.8) == pytest.approx(by_hand, rel=1e-12)


def test_with_as_many_labels_in_each_class_both_losses_are_one():
    f = np.random.default_rng(2).normal(size=(60, 3))
    labels = np.tile([0, 1, 2], 20)
    assert class_mean_log_loss(f, labels) == pytest.approx(log_loss(f, labels), rel=1e-12)


def test_a_label_that_is_ruled_out_costs_infinitely_much():
    assert log_loss([[-np.inf, 0.0]], [0]) == np.inf
    assert log_loss([[-np.inf, 0.0]], [1]) == 0


# Temperature


@pytest.mark.parametrize("seed", range(5))
def test_the_fitted_temperature_is_the_one_that_scipys_search_finds(seed):
    f, labels, _ = held_out(n=400, n_classes=9, temperature=10 ** np.random.default_rng(seed).uniform(-1, 1))
    weights = np.random.default_rng(seed).uniform(0.1, 5, len(labels))
    for w in (None, weights):
        search = minimize_scalar(
            lambda log_t, w=w: log_loss(f, labels, math.exp(log_t), w),
            bounds=(-5, 5),
            method="bounded",
            options={"xatol": 1e-9},
        )
        found = fit_temperature(f, labels, w)
        assert found.converged
        assert math.log(found.temperature) == pytest.approx(search.x, abs=1e-5)
        assert found.log_loss == pytest.approx(search.fun, abs=1e-10)
        assert found.log_loss == pytest.approx(log_loss(f, labels, found.temperature, w), rel=1e-12)


def test_many_labels_bring_the_true_temperature_back():
    f, labels, _ = held_out(n=50_000, temperature=1.6)
    assert fit_temperature(f, labels).temperature == pytest.approx(1.6, rel=0.03)  # standard error 0.8 %


def test_after_the_fit_probabilities_are_calibrated_under_the_source_prior_and_were_not_before():
    f, labels, source = held_out(n=20_000, temperature=2.5)
    found = fit_temperature(f, labels)
    fresh, fresh_labels, _ = held_out(n=20_000, temperature=2.5, seed=9)
    before = expected_calibration_error(probabilities(fresh, 1), fresh_labels, source)
    after = expected_calibration_error(probabilities(fresh, found.temperature), fresh_labels, source)
    assert after < 0.02 < 0.1 < before


def test_logits_twice_as_large_need_twice_the_temperature_and_a_constant_of_a_row_none():
    f, labels, _ = held_out()
    found = fit_temperature(f, labels)
    assert fit_temperature(2 * f, labels).temperature == pytest.approx(2 * found.temperature, rel=1e-8)
    shifted = f + np.random.default_rng(3).normal(0, 50, (len(f), 1))
    assert fit_temperature(shifted, labels).temperature == pytest.approx(found.temperature, rel=1e-7)


def test_a_weight_of_three_is_the_row_three_times():
    f, labels, _ = held_out(n=200)
    weights = np.random.default_rng(4).integers(1, 4, 200)
    repeated = fit_temperature(np.repeat(f, weights, axis=0), np.repeat(labels, weights))
    assert fit_temperature(f, labels, weights).temperature == pytest.approx(repeated.temperature, rel=1e-8)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e3, 2e4])
def test_the_fit_converges_at_any_size_of_logits(size):
    f, labels, _ = held_out(temperature=1.0)
    found = fit_temperature(f * size, labels)
    assert found.converged
    assert found.temperature == pytest.approx(size * fit_temperature(f, labels).temperature, rel=1e-7)


def test_float32_logits_of_sixty_thousand_give_a_finite_fit():
    rng = np.random.default_rng(5)
    f = rng.choice([-60_000, 60_000], (200, 4)).astype(np.float32)
    labels = np.where(rng.random(200) < 0.6, f.argmax(axis=1), rng.integers(0, 4, 200))
    found = fit_temperature(f, labels)
    assert found.converged
    assert 1e3 < found.temperature < 1e7
    assert np.isfinite(found.log_loss)


def test_labels_that_are_always_the_maximum_have_no_best_temperature_and_say_so():
    f = np.random.default_rng(6).normal(size=(20, 3))
    found = fit_temperature(f, f.argmax(axis=1))
    assert (found.temperature, found.converged) == (1.0, False)
    assert found.log_loss == 0  # in the limit
    tied = fit_temperature([[1.0, 1.0, 0.0], [2.0, 0.0, 0.0]], [0, 0])
    assert tied.log_loss == pytest.approx(math.log(2) / 2)


def test_logits_that_tell_no_better_than_chance_have_no_best_temperature_and_say_so():
    f = np.random.default_rng(7).normal(size=(20, 3))
    found = fit_temperature(f, f.argmin(axis=1))
    assert (found.temperature, found.converged) == (1.0, False)
    assert found.log_loss == pytest.approx(math.log(3))


def test_with_one_class_any_temperature_is_as_good_and_one_is_taken():
    found = fit_temperature([[3.0], [-1.0]], [0, 0])
    assert (found.temperature, found.log_loss, found.converged) == (1.0, 0.0, True)


def test_ten_thousand_classes_are_fitted():
    f, labels, _ = held_out(n=200, n_classes=10_000, temperature=3.0)
    found = fit_temperature(f, labels)
    assert found.converged
    assert 1.5 < found.temperature < 6


# Offset and temperature


@pytest.mark.parametrize("weighted", [False, True])
def test_the_fitted_offset_is_the_one_that_another_optimiser_finds(weighted):
    f, labels, source = held_out(n=150, n_classes=4, offset=np.array([0.5, -1.0, 0.3, 0.2]))
    start = np.log(source)
    weights = np.random.default_rng(8).uniform(0.2, 3, 150) if weighted else np.ones(150)

    def objective(parameters):
        temperature, offset = math.exp(parameters[0]), parameters[1:]
        lost = -log_softmax((f + offset) / temperature, axis=1)[np.arange(150), labels]
        d = (offset - start) / temperature
        return np.average(lost, weights=weights) + 2.0 / (2 * 150) * (d @ d)

    search = minimize(objective, np.concatenate([[0.0], start]), method="BFGS", options={"gtol": 1e-7})
    found = fit_offset_and_temperature(f, labels, start, strength=2.0, weights=weights)
    assert found.converged
    assert found.temperature == pytest.approx(math.exp(search.x[0]), rel=1e-3)
    np.testing.assert_allclose(found.logit_offset, search.x[1:], atol=3e-3)
    assert found.log_loss == pytest.approx(
        log_loss(f + found.logit_offset, labels, found.temperature, weights), rel=1e-9
    )


def test_many_labels_bring_the_true_offset_back_up_to_a_constant():
    offset = np.array([0.0, 1.0, -0.5, 0.8, -1.2, 0.4])
    f, labels, _ = held_out(n=60_000, temperature=1.4, offset=offset)
    found = fit_offset_and_temperature(f, labels, np.zeros(6))
    assert found.converged
    assert found.temperature == pytest.approx(1.4, rel=0.03)
    difference = found.logit_offset - offset
    assert np.ptp(difference) < 0.4  # the rarest class has 500 labels: standard error about 0.08
    assert fit_temperature(f, labels).log_loss > found.log_loss + 0.01


def test_where_the_start_is_right_the_fit_stays_near_it():
    offset = np.array([0.0, 1.0, -0.5, 0.8, -1.2, 0.4])
    f, labels, _ = held_out(n=20_000, offset=offset)
    found = fit_offset_and_temperature(f, labels, offset)
    assert np.abs(found.logit_offset - offset).max() < 0.3


def test_great_strength_keeps_the_start_and_fits_the_temperature_alone():
    f, labels, source = held_out()
    start = 0.5 * np.log(source)
    found = fit_offset_and_temperature(f, labels, start, strength=1e12)
    np.testing.assert_allclose(found.logit_offset, start, atol=1e-6)
    assert found.temperature == pytest.approx(fit_temperature(f + start, labels).temperature, rel=1e-4)


def test_the_shrinkage_is_blind_to_the_scale_of_the_logits():
    f, labels, source = held_out(n=400)
    small = fit_offset_and_temperature(f, labels, np.log(source))
    large = fit_offset_and_temperature(100 * f, labels, 100 * np.log(source))
    assert large.temperature == pytest.approx(100 * small.temperature, rel=1e-4)
    np.testing.assert_allclose(large.logit_offset, 100 * small.logit_offset, atol=0.1)


def test_a_class_without_held_out_labels_gets_a_finite_offset():
    f, labels, _ = held_out(n=300)
    kept = labels != 5
    found = fit_offset_and_temperature(f[kept], labels[kept], np.zeros(6))
    assert found.converged
    assert np.isfinite(found.logit_offset).all()
    assert found.logit_offset[5] < 0


def test_where_no_temperature_is_best_the_start_is_returned_unconverged():
    f = np.random.default_rng(6).normal(size=(20, 3))
    found = fit_offset_and_temperature(f, f.argmax(axis=1), np.zeros(3))
    assert (found.temperature, found.converged) == (1.0, False)
    np.testing.assert_array_equal(found.logit_offset, np.zeros(3))


def test_one_class_has_nothing_to_fit():
    found = fit_offset_and_temperature([[3.0], [-1.0]], [0, 0], [0.7])
    assert (found.temperature, found.converged) == (1.0, True)
    np.testing.assert_allclose(found.logit_offset, [0.7])


@pytest.mark.parametrize("strength", [0, -1, np.nan, np.inf])
def test_a_strength_that_is_not_a_finite_positive_number_is_refused(strength):
    with pytest.raises(ValueError, match="strength"):
        fit_offset_and_temperature([[0.0, 1], [1, 0]], [0, 1], [0, 0], strength=strength)


# Refusals that all share


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([[0.0, np.nan]], [0], r"finite|infinity"),
        ([[0.0, np.inf]], [0], r"finite|infinity"),
        ([[0.0, 1.0]], [2], "label lies outside"),
        ([[0.0, 1.0]], [0.0], "whole numbers"),
        ([[0.0, 1.0]], [0, 1], "2 labels but 1 rows"),
        ([0.0, 1.0], [0, 1], "shape"),
        (np.empty((0, 2)), [], "at least 1"),
    ],
)
def test_logits_and_labels_that_do_not_fit_are_refused(logits, labels, message):
    for call in (log_loss, class_mean_log_loss, fit_temperature):
        with pytest.raises(ValueError, match=message):
            call(logits, labels)
    with pytest.raises(ValueError, match=message):
        fit_offset_and_temperature(logits, labels, [0, 0])


def test_weights_and_starts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="weight"):
        fit_temperature([[0.0, 1.0]], [0], [0.0])
    with pytest.raises(ValueError, match="start"):
        fit_offset_and_temperature([[0.0, 1.0]], [0], [0, 0, 0])
    with pytest.raises(ValueError, match="finite"):
        fit_offset_and_temperature([[0.0, 1.0]], [0], [0, np.nan])
