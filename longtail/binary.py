"""Binary losses with weights, margins and a temperature: which of them are consistent, and where they cut.

Menon et al. (2021), section 5.2 and appendix B, for two classes y = +1, -1 and one scalar score f:

    l(y, f) = (w_y / g) log(1 + exp(g (d_y - y f)))                         (eq. 13)

With p = P(y = +1) and eta = P(y = +1 | x), the balanced error is least where f is positive for eta > p. So a
loss is consistent if its minimiser over all functions, f* = Psi(eta), changes its sign at eta = p. Two signs
are misprinted in the paper, and set right here: sigma is 1 / (1 + exp(-z)), and the risk's second term is
that of the label -1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longtail.priors import Floats

_TOLERANCE = 1e-9  # of the ratio that is to be met, against rounding


@dataclass(frozen=True)
class BinaryLoss:
    """The weights w, margins d and temperature g of one loss; weights and g are above zero."""

    positive_weight: float
    negative_weight: float
    positive_margin: float
    negative_margin: float
    temperature: float = 1.0

    def __post_init__(self) -> None:
        values = (self.positive_weight, self.negative_weight, self.temperature)
        if not all(np.isfinite(value) and value > 0 for value in values):
            raise ValueError(
                "The weights and the temperature of a binary loss must be finite and above zero."
            )
        if not (np.isfinite(self.positive_margin) and np.isfinite(self.negative_margin)):
            raise ValueError("The margins of a binary loss must be finite.")

    def of(self, y: npt.ArrayLike, f: npt.ArrayLike) -> Floats:
        """Return the loss of scores f for labels y, each +1 or -1, in the shape they broadcast to."""
        positive = np.asarray(y) > 0
        weight = np.where(positive, self.positive_weight, self.negative_weight)
        margin = np.where(positive, self.positive_margin, self.negative_margin)
        excess = margin - np.where(positive, 1.0, -1.0) * np.asarray(f, dtype=np.float64)
        return np.asarray(weight / self.temperature * np.logaddexp(0, self.temperature * excess))


def threshold_ratio(loss: BinaryLoss) -> float:
    """Return w_+ S(g d_+) / (w_- S(g d_-)), S(z) = 1 / (1 + exp(-z)): the slopes of the loss at f = 0."""
    g = loss.temperature
    log_ratio = _log_sigmoid(g * loss.positive_margin) - _log_sigmoid(g * loss.negative_margin)
    return float(loss.positive_weight / loss.negative_weight * np.exp(log_ratio))


def threshold(loss: BinaryLoss) -> float:
    """Return the eta above which the minimiser says +1: Psi^-1(0) = 1 / (1 + ratio)."""
    return 1 / (1 + threshold_ratio(loss))


def is_consistent(loss: BinaryLoss, positive_prior: float) -> bool:
    """Say whether the loss is consistent for the balanced error at p = P(y = +1): theorem 2 and lemma 3.

    It is so if and only if the ratio is (1 - p) / p, which puts the threshold at p.

    >>> p = 0.05
    >>> is_consistent(BinaryLoss(1 / p, 1 / (1 - p), 1, 1), p), is_consistent(BinaryLoss(1, 1, 0, 0), p)
    (True, False)
    """
    wanted = (1 - _checked_prior(positive_prior)) / positive_prior
    return abs(threshold_ratio(loss) - wanted) <= _TOLERANCE * wanted


def link(loss: BinaryLoss, eta: npt.ArrayLike) -> Floats:
    """Return Psi(eta), the score that minimises eta l(+1, .) + (1 - eta) l(-1, .): lemma 4.

    It increases from -inf at eta = 0 to +inf at 1. The lemma's root of a quadratic, written without its
    cancellation: with r = log(a q) / 2, a q = (w_+ / w_-) exp(g (d_+ - d_-)) eta / (1 - eta),

        g Psi = r + asinh((exp(g d_- + r) - exp(g d_+ - r)) / 2)
    """
    u = _checked_shares(eta)
    g = loss.temperature
    with np.errstate(divide="ignore", over="ignore"):  # 0 and 1 go to their limits
        odds = np.log(u) - np.log1p(-u)
        weights = np.log(loss.positive_weight / loss.negative_weight)
        r = (weights + g * (loss.positive_margin - loss.negative_margin) + odds) / 2
        gap = np.exp(g * loss.negative_margin + r) - np.exp(g * loss.positive_margin - r)
        return np.asarray((r + np.arcsinh(gap / 2)) / g, dtype=np.float64)


def inverse_link(loss: BinaryLoss, score: npt.ArrayLike) -> Floats:
    """Return Psi^-1(v), the eta for which the score v is the best.

    w_- S(g (d_- + v)) / (w_- S(g (d_- + v)) + w_+ S(g (d_+ - v)))
    """
    v = np.asarray(score, dtype=np.float64)
    g = loss.temperature
    negative = np.log(loss.negative_weight) + _log_sigmoid(g * (loss.negative_margin + v))
    positive = np.log(loss.positive_weight) + _log_sigmoid(g * (loss.positive_margin - v))
    return np.asarray(np.exp(negative - np.logaddexp(negative, positive)), dtype=np.float64)


def least_risk(loss: BinaryLoss, eta: npt.ArrayLike) -> Floats:
    """Return L(eta) = eta l(+1, Psi(eta)) + (1 - eta) l(-1, Psi(eta)); 0 at eta = 0 and 1, its limits."""
    u = _checked_shares(eta)
    inside = (u > 0) & (u < 1)
    within = np.where(inside, u, 0.5)
    best = link(loss, within)
    risk = within * loss.of(1, best) + (1 - within) * loss.of(-1, best)
    return np.where(inside, risk, 0.0)


@dataclass(frozen=True)
class Choice:
    """A way to set weights and margins from p = P(y = +1) and g, with what one would write for each."""

    name: str
    weights: str  # pi is the class's own prior: p for +1, 1 - p for -1
    margins: str
    make: Callable[[float, float], BinaryLoss]

    def loss(self, positive_prior: float, temperature: float) -> BinaryLoss:
        """Return the loss at p and g; ValueError for a p that is not between 0 and 1."""
        return self.make(_checked_prior(positive_prior), temperature)


def _checked_prior(positive_prior: float) -> float:
    if not 0 < positive_prior < 1:
        raise ValueError(f"P(y = +1) must lie between 0 and 1, both excluded, not {positive_prior}.")
    return positive_prior


def _checked_shares(eta: npt.ArrayLike) -> Floats:
    u = np.asarray(eta, dtype=np.float64)
    if not ((u >= 0) & (u <= 1)).all():
        raise ValueError("A probability lies outside 0 to 1.")
    return u


def _log_sigmoid(z: npt.ArrayLike) -> Floats:
    return np.asarray(-np.logaddexp(0, -np.asarray(z, dtype=np.float64)))


def _log_odds(p: float) -> float:
    """Return log((1 - p) / p): the logit-adjusted margin of positives; that of negatives is its opposite."""
    return math.log((1 - p) / p)


BALANCED = Choice("balanced", "1/pi", "1", lambda p, g: BinaryLoss(1 / p, 1 / (1 - p), 1, 1, g))
LOGIT_ADJUSTED = Choice(
    "logit adjusted",
    "1",
    "log((1-pi)/pi)/g",
    lambda p, g: BinaryLoss(1, 1, _log_odds(p) / g, -_log_odds(p) / g, g),
)
BALANCED_AND_MARGIN = Choice(
    "balanced + margin",
    "1/pi",
    "1 and p/(1-p)",
    lambda p, g: BinaryLoss(1 / p, 1 / (1 - p), 1, p / (1 - p), g),
)
BALANCED_AND_SMALL_MARGIN = Choice(
    "balanced + margin p", "1/pi", "1 and p", lambda p, g: BinaryLoss(1 / p, 1 / (1 - p), 1, p, g)
)
BALANCED_AND_LOGIT_ADJUSTED = Choice(
    "balanced weights and logit-adjusted margins",
    "1/pi",
    "log((1-pi)/pi)/g",
    lambda p, g: BinaryLoss(1 / p, 1 / (1 - p), _log_odds(p) / g, -_log_odds(p) / g, g),
)
ADAPTIVE = Choice("adaptive", "1", "pi^(-1/4)", lambda p, g: BinaryLoss(1, 1, p**-0.25, (1 - p) ** -0.25, g))
EQUALISED = Choice(
    "equalised", "1", "log(1-pi)", lambda p, g: BinaryLoss(1, 1, math.log(1 - p), math.log(p), g)
)
LOGIT_ADJUSTED_AND_ADAPTIVE = Choice(
    "logit adjusted + adaptive",
    "1",
    "log((1-pi)/pi) + pi^(-1/4)",
    lambda p, g: BinaryLoss(1, 1, _log_odds(p) + p**-0.25, -_log_odds(p) + (1 - p) ** -0.25, g),
)
ERM = Choice("ERM", "1", "0", lambda _p, g: BinaryLoss(1, 1, 0, 0, g))

# What theorem 2 is tried on.
CHOICES: tuple[Choice, ...] = (
    BALANCED,
    Choice("balanced without a margin", "1/pi", "0", lambda p, g: BinaryLoss(1 / p, 1 / (1 - p), 0, 0, g)),
    LOGIT_ADJUSTED,
    Choice(
        "logit adjusted without 1/g",
        "1",
        "log((1-pi)/pi)",
        lambda p, g: BinaryLoss(1, 1, _log_odds(p), -_log_odds(p), g),
    ),
    BALANCED_AND_LOGIT_ADJUSTED,
    Choice(
        "margins by the other class's prior",
        "1",
        "(1-pi)/g",
        lambda p, g: BinaryLoss(1, 1, (1 - p) / g, p / g, g),
    ),
    BALANCED_AND_MARGIN,
    ADAPTIVE,
    EQUALISED,
    LOGIT_ADJUSTED_AND_ADAPTIVE,
    ERM,
)
