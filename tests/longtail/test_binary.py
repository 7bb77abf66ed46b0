"""Binary losses: which are consistent, held to slopes and minima found without the formulas under test."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from longtail import binary
from longtail.binary import (
    CHOICES,
    BinaryLoss,
    inverse_link,
    is_consistent,
    least_risk,
    link,
    threshold,
    threshold_ratio,
)

RNG = np.random.default_rng(11)
RANDOM = [
    BinaryLoss(*np.exp(RNG.normal(0, 1, 2)), *RNG.normal(0, 2, 2), temperature=float(np.exp(RNG.normal())))
    for _ in range(40)
]

# The reference's table at p = 0.05 (the ratio that is wanted is 19): ratio, threshold, consistent; at g = 1.
TABLE = [
    ("balanced", 19, 0.05, True),
    ("balanced without a margin", 19, 0.05, True),
    ("logit adjusted", 19, 0.05, True),
    ("logit adjusted without 1/g", 19, 0.05, True),
    ("balanced weights and logit-adjusted margins", 361, 0.003, False),
    ("margins by the other class's prior", 1.41, 0.415, False),
    ("balanced + margin", 27.1, 0.036, False),
    ("adaptive", 1.22, 0.451, False),
    ("equalised", 10.2, 0.089, False),
    ("logit adjusted + adaptive", 7.85, 0.113, False),
    ("ERM", 1, 0.5, False),
]


def named(name):
    return next(choice for choice in CHOICES if choice.name == name)


def slope(loss, y, at, step=1e-6):
    return float(loss.of(y, at + step) - loss.of(y, at - step)) / (2 * step)


@pytest.mark.parametrize(("name", "ratio", "cut", "consistent"), TABLE, ids=[row[0] for row in TABLE])
def test_each_line_of_the_table_of_choices_holds(name, ratio, cut, consistent):
    loss = named(name).loss(0.05, 1.0)
    assert threshold_ratio(loss) == pytest.approx(ratio, rel=4e-3)
    assert threshold(loss) == pytest.approx(cut, abs=6e-4)
    assert is_consistent(loss, 0.05) is consistent


def test_the_table_has_a_line_for_every_choice():
    assert [choice.name for choice in CHOICES] == [row[0] for row in TABLE]


@pytest.mark.parametrize("g", [0.2, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.7])
def test_balanced_and_logit_adjusted_are_consistent_at_every_temperature(p, g):
    for name in ("balanced", "balanced without a margin", "logit adjusted"):
        assert is_consistent(named(name).loss(p, g), p)


def test_logit_adjusted_margins_need_the_temperature():
    loss = named("logit adjusted without 1/g").loss
    assert is_consistent(loss(0.05, 1.0), 0.05)
    assert not is_consistent(loss(0.05, 8.0), 0.05)
    assert not is_consistent(loss(0.05, 0.5), 0.05)


def test_balanced_weights_with_one_sided_margins_are_consistent_only_in_the_limit():
    ratios = [threshold_ratio(binary.BALANCED_AND_MARGIN.loss(0.05, g)) for g in (1.0, 8.0, 50.0, 400.0)]
    assert ratios[1] == pytest.approx(31.5, abs=0.05)
    gaps = [abs(ratio - 19) for ratio in ratios[1:]]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-5
    assert not is_consistent(binary.BALANCED_AND_MARGIN.loss(0.05, 50.0), 0.05)


def test_the_ratio_is_that_of_the_slopes_at_zero():
    for loss in RANDOM:
        assert threshold_ratio(loss) == pytest.approx(-slope(loss, 1, 0.0) / slope(loss, -1, 0.0), rel=1e-4)


def test_the_link_is_where_a_search_finds_the_least_risk():
    for loss in RANDOM:
        for eta in (0.03, 0.4, 0.9):
            found = minimize_scalar(
                lambda f, loss=loss, eta=eta: eta * loss.of(1, f) + (1 - eta) * loss.of(-1, f),
                bounds=(-60, 60),
                method="bounded",
                options={"xatol": 1e-9},
            )
            assert float(link(loss, eta)) == pytest.approx(found.x, abs=2e-4)
            assert float(least_risk(loss, eta)) == pytest.approx(found.fun, rel=1e-8)


def test_the_link_is_the_root_that_the_lemma_prints():
    for loss in RANDOM:
        u = np.linspace(0.02, 0.98, 49)
        g = loss.temperature
        a = (
            loss.positive_weight
            / loss.negative_weight
            * np.exp(g * (loss.positive_margin - loss.negative_margin))
        )
        b, c, q = np.exp(g * loss.negative_margin), np.exp(g * loss.positive_margin), u / (1 - u)
        inner = a * b * q - c
        printed = np.log((inner + np.sqrt(inner**2 + 4 * a * q)) / 2) / g
        np.testing.assert_allclose(link(loss, u), printed, rtol=1e-6, atol=1e-6)


def test_the_inverse_link_undoes_the_link_and_gives_the_threshold_at_zero():
    for loss in RANDOM:
        u = np.linspace(0.001, 0.999, 101)
        np.testing.assert_allclose(inverse_link(loss, link(loss, u)), u, rtol=1e-9)
        assert float(inverse_link(loss, 0.0)) == pytest.approx(threshold(loss))


def test_the_link_rises_from_minus_to_plus_infinity_even_at_extreme_temperatures():
    for g in (1e-3, 1.0, 300.0):
        values = link(BinaryLoss(2.0, 1.0, 1.5, -0.5, g), [0.0, 1e-12, 0.3, 0.7, 1 - 1e-12, 1.0])
        assert values[0] == -np.inf
        assert values[-1] == np.inf
        assert (np.diff(values[1:-1]) > 0).all()
        assert np.isfinite(values[1:-1]).all()


def test_the_least_risk_of_logit_adjusted_margins_is_the_binary_entropy_at_every_temperature():
    u = np.linspace(0, 1, 41)[1:-1]
    entropy = -(u * np.log(u) + (1 - u) * np.log(1 - u)) / np.log(2)
    for g in (1.0, 8.0):
        risk = least_risk(binary.LOGIT_ADJUSTED.loss(0.2, g), u)
        np.testing.assert_allclose(risk / risk.max(), entropy / entropy.max(), atol=1e-9)


@pytest.mark.parametrize(
    ("choice", "g", "at_zero", "highest_at"),
    [
        (binary.BALANCED, 1.0, 0.200, 0.34),
        (binary.LOGIT_ADJUSTED, 1.0, 0.200, 0.50),
        (binary.BALANCED_AND_MARGIN, 1.0, 0.161, 0.36),
        (binary.BALANCED, 8.0, 0.200, 0.21),
        (binary.LOGIT_ADJUSTED, 8.0, 0.200, 0.50),
        (binary.BALANCED_AND_MARGIN, 8.0, 0.181, 0.22),
    ],
)
def test_the_values_that_the_papers_figures_show_at_p_one_fifth(choice, g, at_zero, highest_at):
    loss = choice.loss(0.2, g)
    assert float(inverse_link(loss, 0.0)) == pytest.approx(at_zero, abs=5e-4)
    u = np.linspace(0, 1, 2001)
    assert u[least_risk(loss, u).argmax()] == pytest.approx(highest_at, abs=5e-3)


@pytest.mark.parametrize("bad", [(0, 1, 0, 0, 1), (1, -1, 0, 0, 1), (1, 1, np.nan, 0, 1), (1, 1, 0, 0, 0)])
def test_weights_and_temperatures_that_are_not_above_zero_are_refused(bad):
    with pytest.raises(ValueError, match="binary loss"):
        BinaryLoss(*bad)


def test_probabilities_outside_their_range_are_refused():
    loss = BinaryLoss(1, 1, 0, 0)
    for call in (link, least_risk):
        with pytest.raises(ValueError, match="outside 0 to 1"):
            call(loss, [0.5, 1.1])
    with pytest.raises(ValueError, match="between 0 and 1"):
        is_consistent(loss, 0.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        binary.ERM.loss(1.0, 1.0)
