"""What each method of ranking takes and makes of it: one place for predictions, /adjust and replays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from longtail.adjustment import adjustment
from longtail.normalisation import weight_normalisation
from service.core.exceptions import Invalid

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from service.core.records import Method, ModelVersion

    Row = tuple[NDArray[np.float64] | None, NDArray[np.float64]]

LARGEST_TAU: Final = 100.0
_FALLBACK_TAU: Final = 1.0  # the exact rule where the network is calibrated (Menon et al. 2021, eq. 8)


def knows_priors(method: Method) -> bool:
    """Whether the method ranks for a target prior."""
    return method == "logit-adjustment"


def checked_tau(
    model: ModelVersion, method: Method, tau: float | None, *, by_default: float | None, prior: str | None
) -> float:
    """Return the tau of a request that asks for `tau`, by this method of this model.

    None is the service's default where it has one, else the method's tau*, else 1. `prior` names the
    parameter that gives a target prior, if any does. Raises Invalid for a method that the model's bundle does
    not have, a prior beside one that knows none, and a tau that the method does not take.
    """
    if method not in model.methods:
        has = " or ".join(model.methods)
        raise Invalid(
            "method-not-offered",
            f"method: this model's bundle has no {method.replace('-', ' ')}; use {has}.",
            parameter="method",
        )
    if method == "none":
        if tau:
            raise Invalid("tau-not-allowed", "Method none has tau 0; leave tau out.", parameter="tau")
        return 0.0
    if method == "weight-normalisation" and prior is not None:
        raise Invalid(
            "conflicting-parameters",
            f"Weight normalisation knows no target prior; leave {prior} out.",
            parameter=prior,
        )
    if tau is None:
        return tau_by_default(model, method, by_default)
    if not 0 <= tau <= LARGEST_TAU:  # NaN is not either
        raise Invalid(
            "invalid-parameter", f"tau must be a number from 0 to {LARGEST_TAU:g}.", parameter="tau"
        )
    return float(tau)


def tau_by_default(model: ModelVersion, method: Method, of_service: float | None) -> float:
    """Return the tau of whoever names none: the service's own, else the method's tau*, else 1."""
    normalised = model.weight_normalisation if method == "weight-normalisation" else None
    best = model.tau if normalised is None else normalised.tau
    return next(tau for tau in (of_service, best, _FALLBACK_TAU) if tau is not None)


def ranking_row(model: ModelVersion, method: Method, tau: float, target_prior: ArrayLike | None) -> Row:
    """Return what scores f: s = f * factor + offset, both float64 (L,), factor None for 1.

    The target prior is looked at by a method that knows one, and None is for the others. Raises Invalid for a
    tau that the norms of weight normalisation do not bear; `checked_tau` has seen that the model has them.
    """
    normalised = model.weight_normalisation
    if method == "weight-normalisation" and normalised is not None:
        try:
            scaling = weight_normalisation(
                normalised.norms, tau, biases=normalised.biases, bias=normalised.bias
            )
        except ValueError as failure:  # norms and biases were checked when the bundle was read
            raise Invalid("invalid-parameter", f"tau: {failure}", parameter="tau") from failure
        return scaling.factor, scaling.offset
    if target_prior is None:
        return None, model.logit_offset
    return None, model.logit_offset + adjustment(model.source_prior, target_prior, tau)
