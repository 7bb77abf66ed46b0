"""Makes probabilities true on held-out labels: one temperature, or a bias for each class with it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longtail.adjustment import checked_logits, log_partition
from longtail.metrics import Ints, checked_labels, checked_weights
from longtail.priors import Floats

_NEWTON_STEPS = 100
_NEWTON_TOLERANCE = 1e-9  # relative, of 1 / T
_GRADIENT_TOLERANCE = 1e-5  # of the mean log loss; far below what any held-out set can tell apart


@dataclass(frozen=True)
class FittedTemperature:
    """The temperature of least log loss."""

    temperature: float
    log_loss: float  # the least over temperatures, nats per label; its limit where not converged
    converged: bool  # False: the least is only reached in the limit, and the temperature was left at 1


@dataclass(frozen=True)
class FittedOffset:
    """The logit offset and temperature of least penalised log loss: softmax((f + b) / T) is calibrated."""

    logit_offset: Floats  # b, shape (L,)
    temperature: float
    log_loss: float  # without the penalty, nats per label
    converged: bool


def log_loss(
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    temperature: float = 1.0,
    weights: npt.ArrayLike | None = None,
) -> float:
    """Return the weighted mean of -log softmax(scores / temperature)_y in nats, scores (N, L), labels (N,).

    Infinite if a label has score -inf. `weights` (N,) need not sum to one.
    """
    values = np.asarray(scores, dtype=np.float64)
    truth = _truth_of(values, labels)
    losses = log_partition(values, temperature) - values[np.arange(len(truth)), truth] / temperature
    return float(_shares(weights, len(truth)) @ losses)


def squared_error(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> float:
    """Return the weighted mean of sum_y (P(y) - [y is the label])^2, probabilities (N, L), labels (N,).

    Brier's score, proper as the log loss is, and bounded: no single label can outweigh the others.
    """
    values = np.array(probabilities, dtype=np.float64)
    truth = _truth_of(values, labels)
    values[np.arange(len(truth)), truth] -= 1
    return float(_shares(weights, len(truth)) @ (values**2).sum(axis=1))


def class_mean_log_loss(scores: npt.ArrayLike, labels: npt.ArrayLike, temperature: float = 1.0) -> float:
    """Return the log loss averaged within each class, then over the classes that have labels.

    The smooth companion of the balanced error: every class counts alike, however rare in the sample.

    >>> scores = [[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 0.0]]
    >>> round(log_loss(scores, [0, 0, 0, 1]), 3), round(class_mean_log_loss(scores, [0, 0, 0, 1]), 3)
    (0.268, 0.41)
    """
    return log_loss(scores, labels, temperature, class_mean_weights(labels))


def class_mean_weights(labels: npt.ArrayLike) -> Floats:
    """Return the weights (N,) that turn a mean over labels into a mean over the classes that have labels."""
    _, place, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    return 1 / counts[place]


def fit_temperature(
    logits: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> FittedTemperature:
    """Return the T > 0 with the least log loss of softmax(logits / T), for logits f + b of shape (N, L).

    Labels must come from the distribution that f + b is calibrated to (held-out training data), else T makes
    good for the shift of the prior too. The loss is convex in 1 / T, and has its least at a finite T unless
    each label is its row's maximum (T would be 0) or the logits tell no better than chance (T would be
    infinite): then T = 1 is returned, not converged. Guo et al. (2017), section 4.2.
    """
    values = checked_logits(logits)
    truth = _truth_of(values, labels)
    shares = _shares(weights, len(truth))
    return _least_log_loss(values, truth, shares)


def fit_offset_and_temperature(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    start: npt.ArrayLike,
    strength: float = 1.0,
    weights: npt.ArrayLike | None = None,
) -> FittedOffset:
    """Return the b (L,) and T with the least log loss of softmax((logits + b) / T), b held near `start`.

    For losses whose offset is not known (adaptive, equalised, LDAM); never where it is known, for a rare
    class has one or two held-out labels. Minimised, jointly convex in 1 / T and d = (b - start) / T:

        weighted mean log loss + strength / (2 N) * sum d^2

    so `strength` counts in labels. Raises ValueError for a strength that is not above zero: without it a
    class that has no label would go to -inf. Where the temperature alone has no finite best, `start` and
    T = 1 are returned, not converged.
    """
    # scipy.optimize takes 0.2 s to import, and a service that never fits imports this module at its start.
    from scipy.optimize import minimize  # noqa: PLC0415

    if not np.isfinite(strength) or strength <= 0:
        raise ValueError(f"The strength must be a finite number above zero, not {strength}.")
    begun = checked_logits(start)
    values = checked_logits(logits)
    truth = _truth_of(values, labels)
    if begun.shape != values.shape[1:]:
        raise ValueError(f"The start has shape {begun.shape} but the logits have {values.shape[1]} classes.")
    values = values + begun
    shares = _shares(weights, len(truth))
    alone = _least_log_loss(values, truth, shares)
    if not alone.converged:
        return FittedOffset(begun, 1.0, alone.log_loss, converged=False)
    values = values / alone.temperature  # so that the sought inverse temperature starts at 1
    penalty = strength / len(truth)
    rows = np.arange(len(truth))

    def objective(parameters: Floats) -> tuple[float, Floats]:
        inverse, d = parameters[0], parameters[1:]
        z = inverse * values + d
        log_z = log_partition(z, 1.0)
        residual = np.exp(z - log_z[:, None])
        residual[rows, truth] -= 1
        residual *= shares[:, None]
        loss = shares @ (log_z - z[rows, truth]) + penalty / 2 * (d @ d)
        return float(loss), np.concatenate([[(residual * values).sum()], residual.sum(axis=0) + penalty * d])

    least = minimize(
        objective,
        np.concatenate([[1.0], np.zeros(len(begun))]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(1e-6, None)] + [(None, None)] * len(begun),
        options={"maxiter": 1000, "maxfun": 2000, "ftol": 1e-14, "gtol": _GRADIENT_TOLERANCE / 10},
    )
    temperature = float(alone.temperature / least.x[0])
    d = least.x[1:]
    loss, gradient = objective(least.x)
    return FittedOffset(
        logit_offset=begun + d * temperature,
        temperature=temperature,
        log_loss=float(loss - penalty / 2 * (d @ d)),
        converged=bool(np.abs(gradient).max() <= _GRADIENT_TOLERANCE),
    )


def _least_log_loss(values: Floats, truth: Ints, shares: Floats) -> FittedTemperature:
    """Minimise over T by Newton's method in 1 / T, kept inside a bracket that each slope narrows."""
    gaps = values - values.max(axis=1, keepdims=True)  # constants of a row change no probability
    own = gaps[np.arange(len(truth)), truth]
    own_mean = float(shares @ own)
    if not gaps.any():  # all classes equal in each row, as with a single class: any T is as good
        return FittedTemperature(1.0, float(np.log(gaps.shape[1])), converged=True)
    if own_mean == 0:  # every label is a maximum of its row
        return FittedTemperature(1.0, float(shares @ np.log((gaps == 0).sum(axis=1))), converged=False)
    if own_mean <= shares @ gaps.mean(axis=1):  # at 1 / T = 0 the loss no longer falls
        return FittedTemperature(1.0, float(np.log(gaps.shape[1])), converged=False)
    low, high, inverse, converged = 0.0, np.inf, 1.0, False
    for _ in range(_NEWTON_STEPS):
        mass = np.exp(inverse * gaps)
        total = mass.sum(axis=1)
        mass *= gaps
        first = mass.sum(axis=1) / total
        second = np.einsum("ij,ij->i", mass, gaps) / total
        slope = float(shares @ first) - own_mean
        curvature = float(shares @ (second - first**2))
        step = slope / curvature if curvature > 0 else np.inf
        converged = abs(step) <= _NEWTON_TOLERANCE * inverse
        if converged:
            break
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        inverse = inverse - step
        if not low < inverse < high:
            inverse = low * 4 if high == np.inf else (low + high) / 2 if low > 0 else high / 4
    loss = float(shares @ np.log(np.exp(inverse * gaps).sum(axis=1))) - inverse * own_mean
    return FittedTemperature(1 / inverse, loss, converged)


def _truth_of(values: Floats, labels: npt.ArrayLike) -> Ints:
    """Return checked labels for rows of logits or scores."""
    if values.ndim != 2 or not len(values):
        raise ValueError(f"Rows of shape (N, L) are needed, N at least 1, not {values.shape}.")
    truth = checked_labels(labels, values.shape[1])
    if len(truth) != len(values):
        raise ValueError(f"There are {len(truth)} labels but {len(values)} rows.")
    return truth


def _shares(weights: npt.ArrayLike | None, n: int) -> Floats:
    """Return weights (N,) that sum to one."""
    if weights is None:
        return np.full(n, 1 / n)
    w = checked_weights(weights, n)
    w = w / w.max()  # so that the sum cannot overflow
    return np.asarray(w / w.sum(), dtype=np.float64)
