"""Label distributions: made and checked here, so that nothing downstream meets a bad one."""

import numpy as np
import numpy.typing as npt

SUM_TOLERANCE = 1e-6  # how far from one a distribution written by hand or rounded for JSON may sum

Floats = npt.NDArray[np.float64]


class PriorError(ValueError):
    """A label distribution that cannot be used; `index` is the class at fault, None if no single one is."""

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


def uniform_prior(n_classes: int) -> Floats:
    """Return the prior (L,) that gives every class 1 / L.

    As target prior it makes the adjusted decision minimise the balanced error (Menon et al. 2021, eq. 7).
    """
    if n_classes < 1:
        raise PriorError(f"A prior needs at least one class, not {n_classes}.")
    return np.full(n_classes, 1 / n_classes)


def prior_from_counts(counts: npt.ArrayLike, smoothing: float = 0.0) -> Floats:
    """Return (counts + smoothing) / sum, shape (L,).

    A count of zero gives a prior of zero, which a target prior may hold and a source prior may not:
    `checked_source_prior` refuses it, unless smoothing (additive, Laplace's at 1) lifted it first.
    Raises PriorError for counts that are negative, not finite or all zero, and for such a smoothing.

    >>> prior_from_counts([98, 1, 0], smoothing=0.5).round(3)
    array([0.98 , 0.015, 0.005])
    """
    raw = _checked_masses(counts, "count")
    if not np.isfinite(smoothing) or smoothing < 0:
        raise PriorError(f"Smoothing must be a finite number, zero or more, not {smoothing}.")
    largest = max(raw.max(), smoothing)
    if largest == 0:
        raise PriorError("All counts are zero: give at least one class a count, or ask for smoothing.")
    masses = raw / largest + smoothing / largest  # scaled first, so that no sum overflows
    return np.asarray(masses / masses.sum(), dtype=np.float64)


def checked_prior(values: npt.ArrayLike, n_classes: int | None = None) -> Floats:
    """Return `values` as a prior, shape (L,), renormalised to sum to one.

    Raises PriorError unless they are finite, not negative, sum to one within 1e-6 and, where `n_classes` is
    given, are that many. Zeros are allowed: a target prior may rule a class out.
    """
    prior = _checked_masses(values, "probability", n_classes)
    with np.errstate(over="ignore"):  # a sum that overflows is not one either
        total = prior.sum()
    if not abs(total - 1) <= SUM_TOLERANCE:
        raise PriorError(f"Probabilities must sum to one within {SUM_TOLERANCE:g}, these sum to {total:.9g}.")
    return np.asarray(prior / total, dtype=np.float64)


def checked_source_prior(values: npt.ArrayLike, n_classes: int | None = None) -> Floats:
    """Return `values` as a source prior: `checked_prior` that also refuses zeros, whose log is infinite."""
    prior = checked_prior(values, n_classes)
    if not prior.all():
        index = int(np.flatnonzero(prior == 0)[0])
        raise PriorError(
            f"The source prior of class {index} is zero: leave the class out, or smooth the counts.", index
        )
    return prior


def _checked_masses(values: npt.ArrayLike, what: str, n_classes: int | None = None) -> Floats:
    """Return `values` as float64 (L,), finite and not negative; `what` names one of them in a refusal."""
    try:
        raw = np.asarray(values)
    except ValueError as error:  # a ragged list
        raise PriorError(f"One {what} for each class is needed, in one flat list.") from error
    if raw.ndim != 1 or not raw.size:
        raise PriorError(f"One {what} for each class is needed, in one flat list; got shape {raw.shape}.")
    if raw.dtype.kind not in "fiu":
        raise PriorError(f"Each {what} must be a number.")
    if n_classes is not None and raw.size != n_classes:
        raise PriorError(f"There are {n_classes} classes but {raw.size} values: give one {what} for each.")
    masses = raw.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(masses) | (masses < 0))
    if bad.size:
        index = int(bad[0])
        raise PriorError(
            f"The {what} of class {index} is {masses[index]:g}: it must be finite and not negative.", index
        )
    return masses
