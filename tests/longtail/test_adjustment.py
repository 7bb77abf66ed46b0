"""The formula: laws first, then a second definition of each part, then the edges."""

import math

import numpy as np
import pytest
from scipy import special

from longtail.adjustment import adjustment, log_partition, probabilities, scores, top_k
from longtail.priors import PriorError, prior_from_counts, uniform_prior

SIZES = [1, 2, 10_000]


def problem(n_classes, rows=5, seed=0):
    rng = np.random.default_rng(seed)
    source = prior_from_counts(rng.integers(1, 5_000, n_classes))
    target = prior_from_counts(rng.integers(1, 5_000, n_classes))
    return rng.normal(0, 4, (rows, n_classes)), rng.normal(size=n_classes), source, target


# The adjustment


@pytest.mark.parametrize("n_classes", SIZES)
def test_tau_zero_adds_nothing_whatever_the_target(n_classes):
    _, _, source, _ = problem(n_classes)
    certain = np.eye(1, n_classes)[0]
    np.testing.assert_array_equal(adjustment(source, certain, 0), np.zeros(n_classes))


@pytest.mark.parametrize("tau", [0, 0.3, 1, 10])
def test_a_target_equal_to_the_source_adds_nothing(tau):
    _, _, source, _ = problem(50)
    np.testing.assert_array_equal(adjustment(source, source, tau), np.zeros(50))


@pytest.mark.parametrize("tau", [1e-3, 1, 10])
@pytest.mark.parametrize("n_classes", SIZES)
def test_the_adjustment_is_the_formula_written_out_class_by_class(n_classes, tau):
    _, _, source, target = problem(n_classes)
    by_hand = [tau * (math.log(q) - math.log(p)) for p, q in zip(source, target, strict=True)]
    np.testing.assert_allclose(adjustment(source, target, tau), by_hand, rtol=1e-12, atol=1e-12)


def test_a_uniform_target_is_the_papers_rule_up_to_a_constant():
    _, _, source, _ = problem(100)
    difference = adjustment(source, uniform_prior(100), 1.7) - (-1.7 * np.log(source))
    assert np.ptp(difference) < 1e-12


def test_the_adjustment_adds_up_over_tau_and_over_a_prior_in_between():
    _, _, source, target = problem(20)
    middle = uniform_prior(20)
    np.testing.assert_allclose(
        adjustment(source, middle, 1.5) + adjustment(middle, target, 1.5), adjustment(source, target, 1.5)
    )
    np.testing.assert_allclose(
        adjustment(source, target, 0.5) + adjustment(source, target, 2), adjustment(source, target, 2.5)
    )


def test_a_class_of_one_in_a_million_is_lifted_by_the_log_of_a_million():
    lift = adjustment([1e-6, 1 - 1e-6], [0.5, 0.5], 10)
    assert lift[0] == pytest.approx(10 * math.log(0.5e6), rel=1e-9)


@pytest.mark.parametrize("tau", [1e-300, 1, 10])
def test_a_class_that_the_target_rules_out_gets_minus_infinity_for_tau_above_zero(tau):
    added = adjustment([0.6, 0.4], [0, 1], tau)
    assert added[0] == -np.inf
    assert np.isfinite(added[1])


def test_a_zero_in_the_source_is_refused_even_at_tau_zero():
    for tau in (0, 1):
        with pytest.raises(PriorError) as refusal:
            adjustment([1, 0], [0.5, 0.5], tau)
        assert refusal.value.index == 1


@pytest.mark.parametrize("tau", [-1e-9, np.nan, np.inf, -np.inf])
def test_a_tau_that_is_negative_or_not_finite_is_refused(tau):
    with pytest.raises(ValueError, match="tau must be"):
        adjustment([0.5, 0.5], [0.5, 0.5], tau)


def test_a_tau_whose_product_overflows_is_refused():
    with pytest.raises(ValueError, match="too large"):
        adjustment([0.9, 0.1], [1e-6, 1 - 1e-6], 1e308)


def test_priors_of_unequal_length_are_refused():
    with pytest.raises(PriorError, match="2 classes but 3 values"):
        adjustment([0.5, 0.5], [0.2, 0.3, 0.5], 1)


# Scores


@pytest.mark.parametrize("n_classes", SIZES)
def test_scores_at_tau_zero_are_logits_plus_offset(n_classes):
    f, b, source, target = problem(n_classes)
    np.testing.assert_array_equal(scores(f, b, source, target, 0), f + b)


@pytest.mark.parametrize("tau", [0, 1, 10])
def test_scores_are_the_formula_written_out(tau):
    f, b, source, target = problem(7)
    by_hand = [
        [f[i, y] + b[y] + tau * (math.log(target[y]) - math.log(source[y])) for y in range(7)]
        for i in range(5)
    ]
    np.testing.assert_allclose(scores(f, b, source, target, tau), by_hand, rtol=1e-12)


def test_one_row_scores_like_the_same_row_in_a_batch():
    f, b, source, target = problem(7)
    batch = scores(f, b, source, target, 1.3)
    for row, expected in zip(f, batch, strict=True):
        np.testing.assert_array_equal(scores(row, b, source, target, 1.3), expected)


def test_a_network_of_the_logit_adjusted_loss_is_not_adjusted_twice():
    f, _, source, _ = problem(30, rows=200)
    tau_train = 1.4
    served = scores(f, tau_train * np.log(source), source, uniform_prior(30), tau_train)
    assert np.ptp(served - f, axis=1).max() < 1e-12
    np.testing.assert_array_equal(served.argmax(axis=1), f.argmax(axis=1))


def test_on_a_finite_table_the_adjusted_argmax_has_the_least_balanced_error_of_all_rules():
    rng = np.random.default_rng(3)
    source = np.array([0.7, 0.25, 0.05])
    x_given_y = rng.dirichlet(np.ones(5), size=3)  # (class, x)
    joint = source[:, None] * x_given_y
    f = np.log(joint / joint.sum(axis=0)).T + rng.normal(
        size=(5, 1)
    )  # a logit is known up to a constant of x
    chosen = scores(f, np.zeros(3), source, uniform_prior(3), 1).argmax(axis=1)
    every_rule = np.stack(np.meshgrid(*[range(3)] * 5, indexing="ij"), axis=-1).reshape(-1, 5)
    correct = np.array([sum(x_given_y[y, x] for x, y in enumerate(rule)) for rule in every_rule])
    assert sum(x_given_y[y, x] for x, y in enumerate(chosen)) == pytest.approx(correct.max(), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_logits_of_sixty_thousand_stay_finite_under_a_prior_of_a_billionth(dtype):
    f = np.array([[60_000, -60_000, 0], [-60_000, -60_000, 60_000]], dtype=dtype)
    source = np.array([1 - 2e-9, 1e-9, 1e-9])
    for tau in (0, 1, 10):
        s = scores(f, np.zeros(3), source, uniform_prior(3), tau)
        for temperature in (1e-3, 1, 1e3):
            assert np.isfinite(s).all()
            assert np.isfinite(log_partition(s, temperature)).all()
            np.testing.assert_allclose(probabilities(s, temperature).sum(axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_and_offsets_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        scores([[0, bad]], [0, 0], [0.5, 0.5], [0.5, 0.5], 1)
    with pytest.raises(ValueError, match="finite"):
        scores([[0, 1]], [bad, 0], [0.5, 0.5], [0.5, 0.5], 1)


@pytest.mark.parametrize(
    ("logits", "offset"), [([[0, 1, 2]], [0, 0]), ([[0, 1]], [0, 0, 0]), ([[0, 1]], [0]), (3.0, [0, 0])]
)
def test_logits_or_offsets_of_another_length_are_refused(logits, offset):
    with pytest.raises(ValueError, match="class"):
        scores(logits, offset, [0.5, 0.5], [0.5, 0.5], 1)


# Probabilities


@pytest.mark.parametrize("temperature", [0.1, 1, 1.585, 50])
@pytest.mark.parametrize("n_classes", SIZES)
def test_probabilities_and_log_partition_are_scipys(n_classes, temperature):
    s = problem(n_classes)[0]
    np.testing.assert_allclose(
        probabilities(s, temperature), special.softmax(s / temperature, axis=-1), rtol=1e-10, atol=1e-300
    )
    np.testing.assert_allclose(
        log_partition(s, temperature), special.logsumexp(s / temperature, axis=-1), rtol=1e-12, atol=1e-12
    )


def test_the_log_of_a_probability_is_its_score_over_t_minus_the_log_partition():
    s = problem(12)[0]
    np.testing.assert_allclose(
        np.log(probabilities(s, 1.7)), s / 1.7 - log_partition(s, 1.7)[:, None], rtol=1e-10, atol=1e-12
    )


def test_a_constant_added_to_all_scores_changes_no_probability():
    s = problem(12)[0]
    np.testing.assert_allclose(probabilities(s + 1234.5, 1.7), probabilities(s, 1.7), rtol=1e-10)


def test_probabilities_are_the_posterior_under_the_tilted_prior_and_under_the_target_only_at_tau_equal_t():
    rng = np.random.default_rng(8)
    temperature = 1.6
    source, target = rng.dirichlet(np.full(6, 2.0), size=2)
    x_given_y = rng.dirichlet(np.ones(9), size=6)  # (class, x)

    def posterior(prior):
        joint = prior[:, None] * x_given_y
        return (joint / joint.sum(axis=0)).T

    f = temperature * np.log(posterior(source))  # calibrated under the source after dividing by T
    for tau in (0, 0.7, 1, temperature, 3):
        tilted = source * (target / source) ** (tau / temperature)
        served = probabilities(scores(f, np.zeros(6), source, target, tau), temperature)
        np.testing.assert_allclose(served, posterior(tilted / tilted.sum()), rtol=1e-9)
        assert np.allclose(served, posterior(target), rtol=1e-3) == (tau == temperature)


def test_a_class_that_is_ruled_out_has_probability_zero_and_the_others_sum_to_one():
    p = probabilities(scores([[9.0, 1, 2]], np.zeros(3), [0.5, 0.3, 0.2], [0, 0.5, 0.5], 1), 1.3)[0]
    assert p[0] == 0
    assert p[1:].sum() == pytest.approx(1, rel=1e-12)


def test_a_tiny_temperature_gives_all_to_the_largest_score():
    np.testing.assert_array_equal(probabilities([1.0, 3, 2], 1e-308), [0, 1, 0])


@pytest.mark.parametrize("temperature", [0, -1, np.nan, np.inf])
def test_a_temperature_that_is_not_a_finite_positive_number_is_refused(temperature):
    for function in (probabilities, log_partition):
        with pytest.raises(ValueError, match="temperature"):
            function([0.0, 1], temperature)


@pytest.mark.parametrize("bad", [[np.nan, 0], [np.inf, 0], [-np.inf, -np.inf], [], 1.0])
def test_scores_that_rank_nothing_are_refused(bad):
    for function in (probabilities, log_partition, top_k):
        with pytest.raises(ValueError, match="Scores"):
            function(bad, 1)


# Ranking


@pytest.mark.parametrize("n_classes", SIZES)
def test_top_k_is_pythons_stable_sort(n_classes):
    s = np.round(problem(n_classes)[0])  # rounded: many ties
    for k in (1, 3, n_classes + 5):
        by_hand = [sorted(range(n_classes), key=lambda y: -row[y])[:k] for row in s]
        np.testing.assert_array_equal(top_k(s, k), by_hand)


def test_the_first_of_top_k_is_the_argmax():
    s = np.round(problem(40, rows=300)[0])
    np.testing.assert_array_equal(top_k(s, 1)[:, 0], s.argmax(axis=1))


def test_a_class_at_minus_infinity_is_ranked_last():
    assert top_k([-np.inf, 1.0, -5.0], 3).tolist() == [1, 2, 0]


def test_k_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        top_k([0.0, 1], 0)
