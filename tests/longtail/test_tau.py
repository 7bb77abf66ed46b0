"""The tau curve and the choice of tau: against loops over scikit-learn, and where the truth is known."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import recall_score

from longtail.calibration import fit_temperature
from longtail.intervals import largest_variance
from longtail.metrics import (
    balanced_error,
    class_errors,
    expected_calibration_error,
    group_members,
    groups_by_count,
)
from longtail.priors import PriorError, prior_from_counts, uniform_prior
from longtail.tau import GRID, choose_normalisation_tau, choose_tau, normalisation_curve, tau_curve

N_CLASSES = 8
COUNTS = np.array([500, 250, 120, 60, 40, 20, 10, 6])
SOURCE = prior_from_counts(COUNTS)


def held_out(n=3_000, temperature=1.0, seed=0):
    """Return labels of a Gaussian problem under SOURCE and logits whose exact posterior is softmax(f / T)."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(0, 1.2, (N_CLASSES, 3))
    labels = rng.choice(N_CLASSES, n, p=SOURCE)
    labels[:N_CLASSES] = np.arange(N_CLASSES)
    x = centres[labels] + rng.normal(size=(n, 3))
    log_joint = np.log(SOURCE) - ((x[:, None] - centres) ** 2).sum(axis=2) / 2
    return temperature * log_softmax(log_joint, axis=1), labels


def test_every_point_is_scikit_learns_recall_at_the_adjusted_argmax():
    f, labels = held_out()
    target = prior_from_counts([1, 2, 3, 4, 5, 6, 7, 8])
    taus = [0, 0.5, 1, 10]
    curve = tau_curve(f, labels, SOURCE, target, taus)
    assert [point.tau for point in curve] == taus
    for point in curve:
        predicted = (f + point.tau * np.log(target / SOURCE)).argmax(axis=1)
        errors = 1 - recall_score(labels, predicted, labels=range(N_CLASSES), average=None, zero_division=0)
        np.testing.assert_allclose(point.by_class.errors, errors, atol=1e-12)
        assert point.balanced.error == pytest.approx(errors.mean(), abs=1e-12)
        assert point.balanced.interval == largest_variance(point.by_class.errors, np.bincount(labels))


def test_groups_are_the_means_over_their_own_classes():
    f, labels = held_out()
    groups = group_members(groups_by_count(COUNTS))
    for point in tau_curve(f, labels, SOURCE, uniform_prior(N_CLASSES), [0, 1], groups=groups):
        assert point.groups["many"].error == pytest.approx(point.by_class.errors[:3].mean())
        assert point.groups["medium"].error == pytest.approx(point.by_class.errors[3:5].mean())
        assert point.groups["few"].error == pytest.approx(point.by_class.errors[5:].mean())
        assert point.groups["few"].classes == 3


def test_adjusting_trades_errors_on_many_for_errors_on_few():
    f, labels = held_out()
    groups = group_members(groups_by_count(COUNTS))
    raw, adjusted = tau_curve(f, labels, SOURCE, uniform_prior(N_CLASSES), [0, 1], groups=groups)
    assert adjusted.groups["few"].error < raw.groups["few"].error - 0.1
    assert adjusted.groups["many"].error > raw.groups["many"].error
    assert adjusted.balanced.error < raw.balanced.error


def test_groups_may_overlap_and_leave_classes_out():
    f, labels = held_out()
    (point,) = tau_curve(
        f, labels, SOURCE, uniform_prior(N_CLASSES), [1], groups={"mine": [0, 7], "yours": [7]}
    )
    assert point.groups["mine"].error == pytest.approx(point.by_class.errors[[0, 7]].mean())
    assert point.groups["yours"].error == pytest.approx(point.by_class.errors[7])


def test_at_tau_zero_and_at_a_target_equal_to_the_source_nothing_moves():
    f, labels = held_out()
    unadjusted = class_errors(labels, f.argmax(axis=1), N_CLASSES).errors
    certain = np.eye(N_CLASSES)[0]
    for target, tau in ((certain, 0), (uniform_prior(N_CLASSES), 0), (SOURCE, 3)):
        (point,) = tau_curve(f, labels, SOURCE, target, [tau])
        np.testing.assert_array_equal(point.by_class.errors, unadjusted)


def test_a_class_that_the_target_rules_out_is_always_wrong_for_tau_above_zero():
    f, labels = held_out()
    target = prior_from_counts([0, 1, 1, 1, 1, 1, 1, 1])
    zero, one = tau_curve(f, labels, SOURCE, target, [0, 1])
    assert zero.by_class.errors[0] < 0.5
    assert one.by_class.errors[0] == 1


def test_weights_reach_the_class_errors():
    f, labels = held_out(n=500)
    weights = 1 / np.random.default_rng(2).uniform(0.1, 1, 500)
    (point,) = tau_curve(f, labels, SOURCE, uniform_prior(N_CLASSES), [0], weights=weights)
    expected = class_errors(labels, f.argmax(axis=1), N_CLASSES, weights)
    np.testing.assert_array_equal(point.by_class.effective, expected.effective)
    assert point.balanced.interval == largest_variance(expected.errors, expected.effective)


def test_float32_logits_of_sixty_thousand_stay_finite_on_the_whole_grid():
    rng = np.random.default_rng(3)
    f = rng.uniform(-60_000, 60_000, (300, N_CLASSES)).astype(np.float32)
    labels = np.where(rng.random(300) < 0.7, f.argmax(axis=1), rng.integers(0, N_CLASSES, 300))
    chosen = choose_tau(f, labels, SOURCE)
    assert chosen.converged
    assert np.isfinite(chosen.log_losses).all()
    assert np.isfinite(chosen.temperatures).all()


@pytest.mark.parametrize("n_classes", [1, 2, 10_000])
def test_any_number_of_classes_has_a_curve_and_a_choice(n_classes):
    rng = np.random.default_rng(4)
    source = prior_from_counts(rng.integers(1, 500, n_classes))
    f, labels = rng.normal(size=(30, n_classes)), rng.integers(0, n_classes, 30)
    f[np.arange(30), labels] += 2
    chosen = choose_tau(f, labels, source, [0, 1, 2])
    assert len(chosen.curve) == 3
    assert chosen.tau in (0, 1, 2)


def test_the_choice_is_the_least_class_mean_log_loss_over_tau_and_a_temperature_of_its_own():
    f, labels = held_out(n=400, temperature=1.7)

    def least(tau):
        def loss(log_t):
            lost = -log_softmax((f - tau * np.log(SOURCE)) / np.exp(log_t), axis=1)[np.arange(400), labels]
            return np.mean([lost[labels == y].mean() for y in np.unique(labels)])

        return minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9}).fun

    chosen = choose_tau(f, labels, SOURCE)
    by_search = [least(tau) for tau in GRID]
    np.testing.assert_allclose(chosen.log_losses, by_search, atol=1e-8)
    assert chosen.tau == GRID[int(np.argmin(by_search))]
    assert chosen.temperatures.shape == (41,)


def test_the_alternative_is_the_least_balanced_error_on_the_same_grid():
    f, labels = held_out(n=400, temperature=1.7)
    chosen = choose_tau(f, labels, SOURCE)
    errors = [point.balanced.error for point in chosen.curve]
    assert chosen.tau_by_error == GRID[int(np.argmin(errors))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_with_exact_logits_the_choice_finds_tau_equal_to_t(temperature):
    f, labels = held_out(n=8_000, temperature=temperature)
    chosen = choose_tau(f, labels, SOURCE)
    assert chosen.tau == pytest.approx(temperature, rel=0.2)
    assert not chosen.at_edge
    assert chosen.converged
    assert fit_temperature(f, labels).temperature == pytest.approx(temperature, rel=0.05)


def test_over_resamplings_the_choice_by_log_loss_wanders_less_than_by_error():
    picks = np.array([(c.tau, c.tau_by_error) for c in map(_chosen, range(60))])
    assert picks[:, 0].std() < 0.5 * picks[:, 1].std()  # at most a sixth in ten runs with other seeds


def _chosen(seed):
    f, labels = held_out(n=300, temperature=1.5, seed=seed)
    return choose_tau(f, labels, SOURCE, np.arange(0, 4.01, 0.25).tolist())


def test_a_pick_at_either_end_of_the_grid_is_flagged_and_inside_is_not():
    f, labels = held_out(temperature=2.0)
    assert choose_tau(f, labels, SOURCE, [0, 0.5, 1]).at_edge
    assert choose_tau(f, labels, SOURCE, [3, 3.5, 4]).at_edge
    assert not choose_tau(f, labels, SOURCE, [0, 1, 2, 3]).at_edge
    assert choose_tau(f, labels, SOURCE, [0, 0.5, 1]).tau_by_error_at_edge


def test_under_a_uniform_source_all_tau_are_equal_and_the_smallest_is_taken():
    f, labels = held_out()
    chosen = choose_tau(f, labels, uniform_prior(N_CLASSES))
    assert np.ptp(chosen.log_losses) < 1e-12
    assert (chosen.tau, chosen.at_edge) == (0, True)


def test_a_choice_on_labels_without_a_best_temperature_says_so():
    f, _ = held_out(n=50)
    assert not choose_tau(f, f.argmax(axis=1), SOURCE, [0, 1]).converged


def test_the_rule_balanced_error_takes_the_least_error_on_the_grid():
    f, labels = held_out(n=400, temperature=1.7)
    chosen = choose_tau(f, labels, SOURCE, rule="balanced-error")
    assert chosen.tau == chosen.tau_by_error != choose_tau(f, labels, SOURCE).tau
    assert chosen.rule == "balanced-error"


@pytest.mark.parametrize("rule", ["calibration-log-loss", "calibration-squared-error", "calibration-ece"])
def test_a_rule_of_calibration_finds_the_temperature_of_exact_logits(rule):
    f, labels = held_out(n=8_000, temperature=1.5)
    chosen = choose_tau(f, labels, SOURCE, rule=rule)
    assert chosen.tau == pytest.approx(1.5, rel=0.1)
    assert chosen.rule == rule


def test_rules_of_calibration_measure_the_posterior_under_the_source_prior():
    f, labels = held_out(n=300, temperature=1.5)
    truth = np.eye(N_CLASSES)[labels]
    measures = {
        "calibration-log-loss": lambda p: -np.log(p[np.arange(300), labels]).mean(),
        "calibration-squared-error": lambda p: ((p - truth) ** 2).sum(axis=1).mean(),
        "calibration-ece": lambda p: expected_calibration_error(p, labels, SOURCE),
    }
    for rule, measure in measures.items():
        values = [measure(softmax(f / tau, axis=1)) for tau in GRID[1:]]
        assert choose_tau(f, labels, SOURCE, rule=rule).tau == GRID[1 + int(np.argmin(values))]


def test_weights_make_up_for_another_mix_of_labels_in_calibration():
    f, labels = held_out(n=8_000, temperature=1.5)
    few = np.flatnonzero((labels != 0) | (np.arange(8_000) % 4 == 0))  # class 0 thinned out
    weights = np.where(labels[few] == 0, 4.0, 1.0)
    right = choose_tau(f[few], labels[few], SOURCE, rule="calibration-log-loss", weights=weights)
    assert right.tau == pytest.approx(1.5, rel=0.1)


def test_tau_of_weight_normalisation_is_chosen_by_what_it_ranks():
    f, labels = held_out(n=2_000)
    norms, biases = np.linspace(2, 0.7, N_CLASSES), np.linspace(-1, 1, N_CLASSES)
    for bias in ("divide", "keep", "drop"):
        curve = normalisation_curve(f, labels, norms, GRID, biases=biases, bias=bias)
        errors = []
        for tau in GRID:
            scaled = f / norms**tau if bias == "divide" else (f - biases) / norms**tau
            scores = scaled + biases if bias == "keep" else scaled
            errors.append(balanced_error(labels, scores.argmax(axis=1), N_CLASSES))
        np.testing.assert_allclose([point.balanced.error for point in curve], errors, atol=1e-12)
        chosen = choose_normalisation_tau(
            f, labels, norms, biases=biases, bias=bias, rule="balanced-error", groups={"all": [0, 1]}
        )
        assert chosen.tau == GRID[int(np.argmin(errors))]
        assert set(chosen.curve[0].groups) == {"all"}
        by_loss = choose_normalisation_tau(f, labels, norms, biases=biases, bias=bias)
        assert by_loss.tau == GRID[int(by_loss.log_losses.argmin())]


def test_an_unknown_rule_lists_those_there_are():
    f, labels = held_out(n=50)
    with pytest.raises(ValueError, match=r"'luck'.*class-mean-log-loss.*calibration-ece"):
        choose_tau(f, labels, SOURCE, rule="luck")


@pytest.mark.parametrize("grid", [[], [1, 0], [0, 0]])
def test_a_grid_that_does_not_rise_is_refused(grid):
    f, labels = held_out(n=50)
    with pytest.raises(ValueError, match="grid"):
        choose_tau(f, labels, SOURCE, grid)


@pytest.mark.parametrize("tau", [-1, np.nan, np.inf])
def test_a_bad_tau_in_the_grid_is_refused(tau):
    f, labels = held_out(n=50)
    with pytest.raises(ValueError, match="tau"):
        tau_curve(f, labels, SOURCE, SOURCE, [0, tau])


def test_logits_and_priors_that_do_not_fit_are_refused():
    f, labels = held_out(n=50)
    with pytest.raises(ValueError, match="3 classes but the logits have 8"):
        tau_curve(f, labels, uniform_prior(3), uniform_prior(3), [1])
    with pytest.raises(PriorError):
        tau_curve(f, labels, [1] + [0] * 7, uniform_prior(8), [1])
    with pytest.raises(ValueError, match="shape"):
        tau_curve(f[0], labels[:1], SOURCE, SOURCE, [1])
    with pytest.raises(ValueError, match="finite"):
        tau_curve(np.full((1, 8), np.nan), [0], SOURCE, SOURCE, [1])
    with pytest.raises(ValueError, match="50 labels but 49"):
        tau_curve(f[:-1], labels, SOURCE, SOURCE, [1])
