"""Two Gaussians: fits held to another minimiser, errors to the exact error of a line."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import norm

from longtail import binary
from training.paper import synthetic
from training.paper.synthetic_figures import TAUS, figure2


@pytest.fixture(scope="module")
def train():
    return synthetic.draw(np.random.default_rng(1), 12, 10_000, 0.05)


@pytest.fixture(scope="module")
def test_draws():
    return synthetic.draw(np.random.default_rng(2), 12, 10_000, 0.05)


def exact_error(w, b):
    """The balanced error of a line: w . x + b given y is normal with mean y (w1 + w2) + b."""
    length, reach = np.linalg.norm(w), w.sum()
    return (norm.cdf(-(reach + b) / length) + norm.cdf((-reach + b) / length)) / 2


@pytest.mark.parametrize("choice", binary.CHOICES, ids=lambda choice: choice.name)
def test_a_fitted_line_has_the_least_loss_that_another_minimiser_finds(choice):
    sample = synthetic.draw(np.random.default_rng(3), 1, 2_000, 0.1)
    loss = choice.loss(float(sample.positive_priors[0]), 1.0)
    x, y = sample.inputs[0], sample.labels[0]

    def mean_loss(parameters):
        return float(loss.of(y, x @ parameters[:2] + parameters[2]).mean())

    found = minimize(mean_loss, np.zeros(3), method="BFGS", options={"gtol": 1e-7})
    lines = synthetic.fit(choice, sample)
    assert lines.converged.all()
    fitted = np.array([*lines.weights[0], lines.biases[0]])
    assert mean_loss(fitted) <= found.fun + 1e-9
    np.testing.assert_allclose(fitted, found.x, atol=2e-3)


def test_erm_finds_the_line_of_the_posterior_and_logit_adjustment_the_same_through_the_origin(train):
    erm, adjusted = (synthetic.fit(choice, train) for choice in (binary.ERM, binary.LOGIT_ADJUSTED))
    for lines, bias in ((erm, math.log(0.05 / 0.95)), (adjusted, 0.0)):
        assert lines.weights.mean(axis=0) == pytest.approx([2, 2], abs=0.15)
        assert lines.biases.mean() == pytest.approx(bias, abs=0.15)


def test_errors_on_draws_agree_with_the_exact_error_of_the_line(train, test_draws):
    lines = synthetic.fit(binary.ERM, train)
    drawn = synthetic.balanced_errors(lines.scores(test_draws.inputs), test_draws.labels)
    exact = [exact_error(w, b) for w, b in zip(lines.weights, lines.biases, strict=True)]
    # about 500 positives a trial, 12 trials: the mean wanders by sqrt(0.3 0.7 / 6,000) / 2
    assert abs(drawn.mean() - np.mean(exact)) < 4 * 0.003


def test_the_bayes_rule_errs_by_7_87_percent(test_draws):
    assert pytest.approx(norm.cdf(-math.sqrt(2))) == synthetic.BAYES
    assert exact_error(np.array([2.0, 2.0]), 0.0) == pytest.approx(synthetic.BAYES)
    drawn = synthetic.balanced_errors(synthetic.bayes_scores(test_draws.inputs), test_draws.labels)
    assert abs(drawn.mean() - synthetic.BAYES) < 4 * math.sqrt(0.0787 * 0.9213 / 6_000) / 2


def test_methods_are_ranked_as_their_thresholds_are(train):
    names = (binary.LOGIT_ADJUSTED, binary.EQUALISED, binary.ADAPTIVE, binary.ERM)
    lines = [synthetic.fit(choice, train) for choice in names]
    errors = [
        np.mean([exact_error(w, b) for w, b in zip(found.weights, found.biases, strict=True)])
        for found in lines
    ]
    assert errors == sorted(errors)
    assert errors[0] < synthetic.BAYES + 0.001
    # the limits of fits to millions of draws: 7.87, 8.72, 16.27, 18.14 %
    assert errors == pytest.approx([0.0787, 0.0872, 0.1627, 0.1814], abs=0.01)


def test_post_hoc_adjustment_at_tau_1_comes_as_near_to_bayes_as_the_loss_does(train, test_draws):
    erm = synthetic.fit(binary.ERM, train)
    scores = synthetic.logit_adjusted_scores(erm, test_draws.inputs, train.positive_priors, 1.0)
    errors = synthetic.balanced_errors(scores, test_draws.labels)
    bayes = synthetic.balanced_errors(synthetic.bayes_scores(test_draws.inputs), test_draws.labels)
    assert abs((errors - bayes).mean()) < 0.004


@pytest.mark.parametrize("form", ["two scorers, norm, bias divided", "two scorers, prior, bias divided"])
def test_weight_normalisation_that_divides_the_bias_too_changes_no_decision(form, train, test_draws):
    erm = synthetic.fit(binary.ERM, train)
    plain = erm.scores(test_draws.inputs) > 0
    for tau in (0.5, 1.0, 2.0):
        scores = synthetic.weight_normalised_scores(form, erm, test_draws.inputs, train.positive_priors, tau)
        assert ((scores > 0) == plain).all()


def test_the_drawn_form_of_weight_normalisation_ends_at_one_half(train, test_draws):
    erm = synthetic.fit(binary.ERM, train)
    by_tau = [
        synthetic.balanced_errors(
            synthetic.weight_normalised_scores(
                "one scorer, norm, bias kept", erm, test_draws.inputs, train.positive_priors, tau
            ),
            test_draws.labels,
        ).mean()
        for tau in (0.0, 0.5, 1.0, 2.0)
    ]
    assert by_tau == pytest.approx([0.181, 0.316, 0.469, 0.5], abs=0.015)


def test_an_unknown_form_is_refused(train):
    lines = synthetic.fit(binary.ERM, synthetic.Sample(train.inputs[:1], train.labels[:1]))
    with pytest.raises(ValueError, match="unknown form"):
        synthetic.weight_normalised_scores("cube", lines, train.inputs[:1], train.positive_priors[:1], 1.0)


@pytest.mark.slow
def test_figure_2_shows_logit_adjustment_within_a_tenth_of_bayes_and_holds_every_form():
    report = figure2(quick=False)
    spread = {row["method"]: row for row in report.rows if row["panel"] == "spread"}
    assert spread["Logit adjusted"]["trials"] == 100
    assert abs(spread["Logit adjusted"]["above_bayes"]) < 0.1
    assert spread["ERM"]["above_bayes"] > 9
    forms = {row["form"] for row in report.rows if row["panel"] == "post hoc"}
    assert forms == {"eq. 9", *synthetic.WEIGHT_NORMALISATIONS}
    assert {row["tau"] for row in report.rows if row["panel"] == "post hoc"} == set(TAUS)
