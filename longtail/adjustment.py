"""The one formula: from logits to scores under a target prior, and from scores to probabilities.

    s_y = f_y + b_y + tau * (log q_y - log p_y)        P(y) = softmax(s / T)

Everything else that applies it (the ONNX graph, the API, the monitor) is tested against this file.
"""

import numpy as np
import numpy.typing as npt

from longtail.priors import Floats, checked_prior, checked_source_prior


def adjustment(source_prior: npt.ArrayLike, target_prior: npt.ArrayLike, tau: float) -> Floats:
    """Return tau * (log target_prior - log source_prior), shape (L,), to be added to f + b.

    Menon et al. (2021), eq. 9; a uniform target gives the paper's -tau * log p up to a constant. A class
    with target 0 gets -inf for tau > 0: it is never ranked. tau = 0 is the unadjusted model, whatever the
    target says. Raises PriorError for a bad prior (a zero in the source among them) and ValueError for a tau
    that is negative, not finite, or so large that the product overflows.

    >>> adjustment([0.9, 0.1], [0.5, 0.5], tau=1).round(3)
    array([-0.588,  1.609])
    """
    source = checked_source_prior(source_prior)
    target = checked_prior(target_prior, n_classes=len(source))
    if not np.isfinite(tau) or tau < 0:
        raise ValueError(f"tau must be a finite number, zero or more, not {tau}.")
    if tau == 0:  # 0 times -inf would be NaN
        return np.zeros(len(source))
    with np.errstate(divide="ignore", over="ignore"):
        added = tau * (np.log(target) - np.log(source))
    if not np.isfinite(added[target > 0]).all():
        raise ValueError(f"tau = {tau:g} is too large: the adjustment is no longer a finite number.")
    return np.asarray(added, dtype=np.float64)


def scores(
    logits: npt.ArrayLike,
    logit_offset: npt.ArrayLike,
    source_prior: npt.ArrayLike,
    target_prior: npt.ArrayLike,
    tau: float,
) -> Floats:
    """Return s = f + b + adjustment, shape (..., L), for logits of that shape and an offset of shape (L,).

    f + b must be calibrated, up to temperature, to `source_prior`; a network trained with the logit-adjusted
    loss has b = tau_train * log p, and forgetting it adjusts twice. Computed in float64 whatever comes in.
    Raises ValueError for a NaN, an infinity or a length that does not fit.
    """
    added = adjustment(source_prior, target_prior, tau)
    offset = checked_logits(logit_offset)
    raw = checked_logits(logits)
    if offset.shape != added.shape or raw.shape[-1:] != added.shape:
        raise ValueError(
            f"The priors have {added.size} classes, the logit offset has shape {offset.shape} and the logits "
            f"{raw.shape}: the last axes must agree."
        )
    return raw + offset + added


def probabilities(scores: npt.ArrayLike, temperature: float) -> Floats:
    """Return softmax(scores / temperature) over the last axis, shape (..., L); a score of -inf gives 0.

    It is the posterior under the prior proportional to p * (q / p) ** (tau / T): under the target q only at
    tau = T, under the source p at tau = 0.
    """
    scaled, _ = _below_maximum(scores, temperature)
    mass = np.exp(scaled)
    return np.asarray(mass / mass.sum(axis=-1, keepdims=True), dtype=np.float64)


def log_partition(scores: npt.ArrayLike, temperature: float) -> Floats:
    """Return logsumexp(scores / temperature) over the last axis: log P(y) is s_y / T minus it."""
    scaled, maximum = _below_maximum(scores, temperature)
    return np.asarray(maximum / temperature + np.log(np.exp(scaled).sum(axis=-1)), dtype=np.float64)


def top_k(scores: npt.ArrayLike, k: int) -> npt.NDArray[np.intp]:
    """Return the indices (..., min(k, L)) of the largest scores, best first, ties to the lower index.

    A class at -inf comes last but is not left out: rows would differ in length. Cut it where it is shown.

    >>> top_k([0.5, 2.0, 2.0, -np.inf], k=3)
    array([1, 2, 0])
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}.")
    return np.argsort(-_checked_scores(scores), axis=-1, kind="stable")[..., :k]


def checked_logits(values: npt.ArrayLike) -> Floats:
    """Return `values` as float64 (..., L); ValueError for a NaN, an infinity or no class at all."""
    logits = np.asarray(values, dtype=np.float64)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"Logits need at least one class on their last axis, got shape {logits.shape}.")
    if not np.isfinite(logits).all():
        raise ValueError("Logits must be finite: there is a NaN or an infinity among them.")
    return logits


def _checked_scores(values: npt.ArrayLike) -> Floats:
    """Return `values` as float64 (..., L), finite but for -inf, with a possible class in each row."""
    raw = np.asarray(values, dtype=np.float64)
    if raw.ndim == 0 or raw.shape[-1] == 0:
        raise ValueError(f"Scores need at least one class on their last axis, got shape {raw.shape}.")
    maximum = raw.max(axis=-1)  # NaN and +inf come through here, and -inf if every class has it
    if not np.isfinite(maximum).all():
        raise ValueError("Scores must be numbers below infinity, with one class at least above -infinity.")
    return raw


def _below_maximum(values: npt.ArrayLike, temperature: float) -> tuple[Floats, Floats]:
    """Return (s - max) / T, which exp cannot overflow, and max, shape (...)."""
    if not np.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"The temperature must be a finite number above zero, not {temperature}.")
    raw = _checked_scores(values)
    maximum = raw.max(axis=-1)
    with np.errstate(over="ignore"):  # a tiny T sends the losers to -inf, which is their limit
        return (raw - maximum[..., None]) / temperature, maximum
