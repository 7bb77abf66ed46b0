"""What another tau would have given, on labels already there; and which tau to take."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longtail.adjustment import adjustment, checked_logits
from longtail.calibration import class_mean_weights, fit_temperature
from longtail.metrics import ClassErrors, MeanError, class_errors, mean_error
from longtail.priors import Floats, uniform_prior

GRID = tuple(step / 10 for step in range(41))  # 0, 0.1 ... 4


@dataclass(frozen=True)
class TauPoint:
    """The errors that one tau makes."""

    tau: float
    by_class: ClassErrors
    balanced: MeanError
    groups: dict[str, MeanError]


@dataclass(frozen=True)
class ChosenTau:
    """The tau of least class-mean log loss, and beside it the tau of least balanced error."""

    tau: float
    at_edge: bool  # the pick is the grid's first or last: the best may lie beyond
    converged: bool  # of the temperature that was fitted at `tau`
    tau_by_error: float  # the alternative: noisier on few labels
    tau_by_error_at_edge: bool
    log_losses: Floats  # by tau: class-mean log loss at the temperature that suits this tau best
    temperatures: Floats  # by tau: that temperature; not the one to serve with
    curve: list[TauPoint]


def tau_curve(
    logits_plus_offset: npt.ArrayLike,
    labels: npt.ArrayLike,
    source_prior: npt.ArrayLike,
    target_prior: npt.ArrayLike,
    taus: Sequence[float],
    *,
    groups: Mapping[str, npt.ArrayLike] | None = None,
    weights: npt.ArrayLike | None = None,
) -> list[TauPoint]:
    """Return the errors of argmax s at each tau, from f + b of shape (N, L) and labels (N,).

    `groups` holds the indices of each group's classes (as `group_members` gives them; they may overlap),
    `weights` are 1 / sampling_probability (see `class_errors`). Each interval holds at a tau fixed
    beforehand; at the tau picked for its error it is too hopeful.
    """
    points = []
    for tau, ranked in _ranked_at(logits_plus_offset, source_prior, target_prior, taus):
        by_class = class_errors(labels, ranked.argmax(axis=1), ranked.shape[1], weights)
        points.append(
            TauPoint(
                tau=tau,
                by_class=by_class,
                balanced=mean_error(by_class),
                groups={name: mean_error(by_class, classes) for name, classes in (groups or {}).items()},
            )
        )
    return points


def choose_tau(
    logits_plus_offset: npt.ArrayLike,
    labels: npt.ArrayLike,
    source_prior: npt.ArrayLike,
    grid: Sequence[float] = GRID,
    groups: Mapping[str, npt.ArrayLike] | None = None,
) -> ChosenTau:
    """Choose tau on held-out labels, for a uniform target prior.

    For each tau of the grid, softmax((f + b + tau * (log q - log p)) / T) with q uniform gets the T that
    makes its class-mean log loss least; the tau with the least of these is chosen, the smaller one of two
    equals. On few labels this wanders less than the least 0-1 error, which is returned beside it. T is
    nuisance here: what is served is fitted at tau = 0 by `fit_temperature(f + b)`.
    """
    if not len(grid) or not (np.diff(grid) > 0).all():
        raise ValueError("The grid of tau must rise, and hold at least one value.")
    source = np.asarray(source_prior, dtype=np.float64)
    target = uniform_prior(len(source))
    curve = tau_curve(logits_plus_offset, labels, source, target, grid, groups=groups)
    weights = class_mean_weights(labels)
    fits = [
        fit_temperature(ranked, labels, weights)
        for _, ranked in _ranked_at(logits_plus_offset, source, target, grid)
    ]
    log_losses = np.array([fit.log_loss for fit in fits])
    best = int(log_losses.argmin())
    by_error = int(np.argmin([point.balanced.error for point in curve]))
    ends = (0, len(grid) - 1)
    return ChosenTau(
        tau=float(grid[best]),
        at_edge=best in ends,
        converged=fits[best].converged,
        tau_by_error=float(grid[by_error]),
        tau_by_error_at_edge=by_error in ends,
        log_losses=log_losses,
        temperatures=np.array([fit.temperature for fit in fits]),
        curve=curve,
    )


def _ranked_at(
    logits_plus_offset: npt.ArrayLike,
    source_prior: npt.ArrayLike,
    target_prior: npt.ArrayLike,
    taus: Sequence[float],
) -> Iterator[tuple[float, Floats]]:
    """Yield each tau with its scores (N, L); the logits are checked once, not once for each tau."""
    values = checked_logits(logits_plus_offset)
    if values.ndim != 2:
        raise ValueError(f"Rows of shape (N, L) are needed, not {values.shape}.")
    for tau in taus:
        added = adjustment(source_prior, target_prior, tau)
        if added.shape != values.shape[1:]:
            raise ValueError(f"The priors have {added.size} classes but the logits have {values.shape[1]}.")
        yield float(tau), values + added
