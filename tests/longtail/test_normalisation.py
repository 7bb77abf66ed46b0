"""Weight normalisation against a linear head whose weights are rescaled, and where it must do nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtail.metrics import balanced_error
from longtail.normalisation import weight_normalisation

RNG = np.random.default_rng(4)


def head(n_classes=7, n_features=5):
    """Weights (L, D), biases (L,) and features (N, D)."""
    spread = np.geomspace(3, 0.2, n_classes)[:, None]
    return (
        RNG.normal(0, 1, (n_classes, n_features)) * spread,
        RNG.normal(0, 1, n_classes),
        RNG.normal(0, 2, (50, n_features)),
    )


@pytest.mark.parametrize("tau", [0, 0.3, 1, 2.5])
@pytest.mark.parametrize("nu", ["norm", "prior"])
@pytest.mark.parametrize("bias", ["divide", "keep", "drop"])
def test_scores_are_those_of_the_head_with_its_weights_rescaled(bias, nu, tau):
    weights, biases, features = head()
    counts = np.array([900, 400, 100, 50, 20, 8, 2])
    divisor = np.sqrt((weights**2).sum(axis=1)) if nu == "norm" else counts / counts.sum()
    rescaled = np.stack([row / d**tau for row, d in zip(weights, divisor, strict=True)])
    constant = {"divide": biases / divisor**tau, "keep": biases, "drop": 0 * biases}[bias]
    expected = features @ rescaled.T + constant
    scaling = weight_normalisation(divisor, tau, biases=biases, bias=bias)
    np.testing.assert_allclose(scaling.scores(features @ weights.T + biases), expected, rtol=1e-9, atol=1e-9)


@given(tau=st.floats(0, 20), norm=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_a_symmetric_model_of_two_classes_is_not_changed_by_dividing_weights_and_bias(tau, norm, seed):
    f = np.random.default_rng(seed).normal(0, 3, 20)
    logits = np.stack([f, -f], axis=1)  # w and -w have one norm
    scaling = weight_normalisation([norm, norm], tau)
    assert scaling.scores(logits).argmax(axis=1).tolist() == logits.argmax(axis=1).tolist()


def test_dividing_by_the_prior_changes_no_decision_of_the_symmetric_model_of_the_paper():
    """x ~ N(y (1, 1), I), P(+1) = 0.05, logits +- f / 2 of the Bayes rule: every tau has ERM's error."""
    truth = (RNG.random(20_000) < 0.05).astype(int)
    points = RNG.normal(0, 1, (20_000, 2)) + (2 * truth - 1)[:, None]
    f = 2 * points.sum(axis=1) + np.log(0.05 / 0.95)
    logits = np.stack([-f, f], axis=1) / 2
    errors = {
        tau: balanced_error(truth, weight_normalisation([0.95, 0.05], tau).scores(logits).argmax(axis=1), 2)
        for tau in (0, 0.5, 1, 2)
    }
    assert len(set(errors.values())) == 1
    kept = weight_normalisation([0.95, 0.05], 1, biases=np.log([0.95, 0.05]) / 2, bias="keep")
    assert balanced_error(truth, kept.scores(logits).argmax(axis=1), 2) != errors[1]


def test_at_tau_0_the_logits_stand_less_a_bias_that_is_dropped():
    weights, biases, features = head()
    logits = features @ weights.T + biases
    norms = np.linalg.norm(weights, axis=1)
    for bias in ("divide", "keep"):
        scaling = weight_normalisation(norms, 0, biases=biases, bias=bias)
        np.testing.assert_array_equal(scaling.scores(logits), logits)
    np.testing.assert_allclose(
        weight_normalisation(norms, 0, biases=biases, bias="drop").scores(logits), logits - biases
    )


def test_a_negative_logit_of_a_small_norm_falls_further():
    scaling = weight_normalisation([1.0, 0.1], 1)
    assert scaling.scores([-1.0, -0.5]).argmax() == 0
    assert scaling.scores([1.0, 0.5]).argmax() == 1


def test_any_float32_has_a_finite_score_where_the_factor_is_taken():
    largest = float(np.finfo(np.float32).max)
    for norm in (1e-2, 1e2):
        scaling = weight_normalisation([norm, 1.0], 100, biases=[largest, -largest], bias="keep")
        assert np.isfinite(scaling.scores([largest, -largest])).all()


@pytest.mark.parametrize(
    ("norms", "tau", "more", "reason"),
    [
        ([1.0, 0.0], 1, {}, "above zero"),
        ([1.0, np.nan], 1, {}, "above zero"),
        ([], 1, {}, "One norm for each class"),
        ([[1.0]], 1, {}, "One norm for each class"),
        ([1.0, 2.0], -1, {}, "zero or more"),
        ([1.0, 2.0], np.inf, {}, "zero or more"),
        ([1.0, 1e-4], 100, {}, "too large"),
        ([1.0, 1e4], 100, {}, "too large"),
        ([1.0, 2.0], 1, {"bias": "keep"}, "biases are needed"),
        ([1.0, 2.0], 1, {"bias": "drop", "biases": [1.0]}, "2 norms but biases"),
        ([1.0, 2.0], 1, {"bias": "double"}, "not 'double'"),
    ],
)
def test_what_cannot_be_normalised_is_refused(norms, tau, more, reason):
    with pytest.raises(ValueError, match=reason):
        weight_normalisation(norms, tau, **more)


def test_logits_of_another_length_are_refused():
    with pytest.raises(ValueError, match="2 classes but the logits have 3"):
        weight_normalisation([1.0, 2.0], 1).scores([1.0, 2.0, 3.0])
