"""The two Gaussians of Menon et al. (2021), section 6.1: draws, fitted lines, and every method's errors.

x ~ N(y (1, 1), I) for y = +1, -1, scored by an affine f(x) = w . x + b. The paper does not give the variance;
with the identity the least balanced error is Phi(-sqrt 2) = 7.87 %, which its axes agree with. Many trials
are fitted at once: trials are the first axis of every array.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from longtail.binary import BinaryLoss, Choice

Floats = NDArray[np.float64]

BAYES = 0.5 * math.erfc(1.0)  # Phi(-sqrt 2), the least balanced error
N_TRAIN = N_TEST = 10_000

_AT_ONCE = 10  # trials whose arrays stay in the processor's cache
_STEPS = 60
_TOLERANCE = 1e-9  # of a gradient, in mean loss per unit of weight


@dataclass(frozen=True)
class Sample:
    """Draws of many trials: inputs (T, N, 2) and labels (T, N), +1 or -1."""

    inputs: Floats
    labels: Floats

    @property
    def positive_priors(self) -> Floats:
        """The share of positives in each trial, (T,)."""
        shares: Floats = (self.labels > 0).mean(axis=1)
        return shares


@dataclass(frozen=True)
class Lines:
    """The fitted scorer of each trial: w (T, 2), b (T,), and whether each fit reached its minimum."""

    weights: Floats
    biases: Floats
    converged: NDArray[np.bool_]

    def scores(self, inputs: Floats) -> Floats:
        """Return f (T, N) for inputs (T, N, 2)."""
        found: Floats = np.einsum("tni,ti->tn", inputs, self.weights) + self.biases[:, None]
        return found


def draw(rng: np.random.Generator, n_trials: int, n: int, positive_prior: float) -> Sample:
    """Draw the trials; each label is +1 with the chance `positive_prior`."""
    labels = np.where(rng.random((n_trials, n)) < positive_prior, 1.0, -1.0)
    inputs = rng.standard_normal((n_trials, n, 2)) + labels[:, :, None]
    return Sample(inputs, labels)


def fit(choice: Choice, sample: Sample) -> Lines:
    """Fit each trial's line to the mean loss that the choice makes of its share of positives, at g = 1.

    By Newton's method, halving steps that overshoot.
    """
    losses = [choice.loss(float(p), 1.0) for p in sample.positive_priors]
    parts = [
        _newton(
            losses[at : at + _AT_ONCE], sample.inputs[at : at + _AT_ONCE], sample.labels[at : at + _AT_ONCE]
        )
        for at in range(0, len(losses), _AT_ONCE)
    ]
    parameters = np.concatenate([part for part, _ in parts])
    return Lines(parameters[:, :2], parameters[:, 2], np.concatenate([done for _, done in parts]))


def balanced_errors(scores: Floats, labels: Floats) -> Floats:
    """Return each trial's balanced error (T,): +1 is decided where the score is above zero."""
    wrong = (scores > 0) != (labels > 0)
    positive = labels > 0
    of_positives = (wrong & positive).sum(axis=1) / positive.sum(axis=1)
    of_negatives = (wrong & ~positive).sum(axis=1) / (~positive).sum(axis=1)
    errors: Floats = (of_positives + of_negatives) / 2
    return errors


def bayes_scores(inputs: Floats) -> Floats:
    """Return the scores (T, N) of the rule with the least balanced error: log P(x | +1) / P(x | -1)."""
    scores: Floats = 2 * inputs.sum(axis=2)
    return scores


def logit_adjusted_scores(lines: Lines, inputs: Floats, positive_priors: Floats, tau: float) -> Floats:
    """Return f - tau log(pi_+ / pi_-), (T, N): eq. 9 for f = f_+ - f_-."""
    log_odds = np.log(positive_priors / (1 - positive_priors))
    return lines.scores(inputs) - tau * log_odds[:, None]


WEIGHT_NORMALISATIONS = (
    "one scorer, norm, bias kept",
    "two scorers w/2, norm, bias kept",
    "two scorers, norm, bias divided",
    "two scorers, prior, bias divided",
    "two scorers, prior, bias kept",
    "two scorers, prior, bias dropped",
)


def weight_normalised_scores(
    form: str, lines: Lines, inputs: Floats, positive_priors: Floats, tau: float
) -> Floats:
    """Return the scores (T, N) of weight normalisation (eq. 3) in one of its readings.

    The paper does not say how it writes a binary scorer. One scorer w . x + b has one norm; two scorers are
    f_+ = f / 2 and f_- = -f / 2, with equal norms (so that dividing f_y by norm^tau changes no decision), or
    divided by their priors: with the biases divided too, the sign of f decides at every tau.
    """
    w_x: Floats = np.einsum("tni,ti->tn", inputs, lines.weights)
    b: Floats = lines.biases[:, None]
    norms: Floats = np.linalg.norm(lines.weights, axis=1)[:, None] ** tau
    halves = norms / 2**tau
    # (f / 2) / pi_+^tau - (-f / 2) / pi_-^tau is f times this
    by_prior: Floats = (positive_priors[:, None] ** -tau + (1 - positive_priors[:, None]) ** -tau) / 2
    match form:
        case "one scorer, norm, bias kept":
            return w_x / norms + b
        case "two scorers w/2, norm, bias kept":
            return w_x / halves + b
        case "two scorers, norm, bias divided":
            return (w_x + b) / halves
        case "two scorers, prior, bias divided":
            return (w_x + b) * by_prior
        case "two scorers, prior, bias kept":
            return w_x * by_prior + b
        case "two scorers, prior, bias dropped":
            return w_x * by_prior
    raise ValueError(f"unknown form '{form}'")


def _newton(losses: Sequence[BinaryLoss], inputs: Floats, labels: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the parameters (T, 3) of the least mean loss, and whether the gradient vanished there."""
    positive = labels > 0

    def by_label(of_positives: str, of_negatives: str) -> Floats:
        pairs = np.array([(getattr(loss, of_positives), getattr(loss, of_negatives)) for loss in losses])
        values: Floats = np.where(positive, pairs[:, :1], pairs[:, 1:])
        return values

    weights = by_label("positive_weight", "negative_weight") / labels.shape[1]
    margins = by_label("positive_margin", "negative_margin")
    design = np.concatenate([inputs, np.ones((*labels.shape, 1))], axis=2)

    def mean_loss(at: Floats) -> Floats:
        z = margins - labels * np.einsum("tni,ti->tn", design, at)
        total: Floats = (weights * np.logaddexp(0, z)).sum(axis=1)
        return total

    now = np.zeros((len(losses), 3))
    least = mean_loss(now)
    gradient = np.zeros_like(now)
    for _ in range(_STEPS):
        slope = expit(margins - labels * np.einsum("tni,ti->tn", design, now))
        gradient = -np.einsum("tni,tn->ti", design, weights * labels * slope)
        if np.abs(gradient).max() <= _TOLERANCE:
            break
        curvature = weights * slope * (1 - slope)
        hessian = (design * curvature[:, :, None]).transpose(0, 2, 1) @ design
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        size = np.ones(len(losses))
        for _ in range(30):
            tried = now - size[:, None] * step
            value = mean_loss(tried)
            worse = value > least + 1e-15
            if not worse.any():
                break
            size[worse] /= 2
        now, least = np.where(worse[:, None], now, tried), np.where(worse, least, value)
    return now, np.abs(gradient).max(axis=1) <= _TOLERANCE
