"""What another tau would have given, on labels already there; and which tau to take."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from longtail.adjustment import adjustment, checked_logits, probabilities
from longtail.calibration import class_mean_weights, fit_temperature, log_loss, squared_error
from longtail.metrics import (
    ClassErrors,
    MeanError,
    class_errors,
    expected_calibration_error,
    mean_error,
)
from longtail.normalisation import BiasRule, weight_normalisation
from longtail.priors import Floats, uniform_prior

GRID = tuple(step / 10 for step in range(41))  # 0, 0.1 ... 4

RankingRule = Literal["class-mean-log-loss", "balanced-error"]
CalibrationRule = Literal["calibration-log-loss", "calibration-squared-error", "calibration-ece"]
TauRule = RankingRule | CalibrationRule
"""How tau* is chosen on held-out labels: by what is ranked at each tau, or as the temperature."""

RANKING_RULES: tuple[RankingRule, ...] = get_args(RankingRule)
TAU_RULES: tuple[TauRule, ...] = (*RANKING_RULES, *get_args(CalibrationRule))


@dataclass(frozen=True)
class TauPoint:
    """The errors that one tau makes."""

    tau: float
    by_class: ClassErrors
    balanced: MeanError
    groups: dict[str, MeanError]


@dataclass(frozen=True)
class ChosenTau:
    """The tau that a rule picks, and beside it the tau of least balanced error."""

    tau: float
    rule: TauRule
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
    ranked = _adjusted(logits_plus_offset, source_prior, target_prior, taus)
    return [_point(tau, scores, labels, groups, weights) for tau, scores in ranked]


def normalisation_curve(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    norms: npt.ArrayLike,
    taus: Sequence[float],
    *,
    biases: npt.ArrayLike | None = None,
    bias: BiasRule = "divide",
    groups: Mapping[str, npt.ArrayLike] | None = None,
) -> list[TauPoint]:
    """Return the errors of weight normalisation at each tau, from f (N, L), (N,): see `tau_curve`."""
    ranked = _normalised(logits, norms, taus, biases, bias)
    return [_point(tau, scores, labels, groups) for tau, scores in ranked]


def choose_tau(
    logits_plus_offset: npt.ArrayLike,
    labels: npt.ArrayLike,
    source_prior: npt.ArrayLike,
    grid: Sequence[float] = GRID,
    *,
    groups: Mapping[str, npt.ArrayLike] | None = None,
    rule: TauRule = "class-mean-log-loss",
    weights: npt.ArrayLike | None = None,
) -> ChosenTau:
    """Choose tau on held-out labels, for a uniform target prior; the smaller one of two equals.

    `class-mean-log-loss`: for each tau softmax((f + b + tau * (log q - log p)) / T) with q uniform gets the T
    that makes its class-mean log loss least, and the tau with the least of these is chosen. On few labels it
    wanders less than the least 0-1 error, which is the rule `balanced-error`. T is nuisance here: what is
    served is fitted at tau = 0 by `fit_temperature(f + b)`.

    `calibration-*` reads tau as the temperature, tau = T being Bayes' rule (Menon et al., 2021, section 4.1):
    the tau at which softmax((f + b) / tau) has the least log loss, squared error or expected calibration
    error under the source prior. The labels must come from that prior, or `weights` (N,) make up for it. At
    tau = 0 there is no such softmax: it is never chosen by these.
    """
    source = np.asarray(source_prior, dtype=np.float64)
    ranked = _adjusted(logits_plus_offset, source, uniform_prior(len(source)), _checked_grid(grid))
    measured = None
    if rule not in RANKING_RULES:
        calibrated = checked_logits(logits_plus_offset)
        measure = partial(_miscalibration, rule, calibrated, labels, source_prior=source, weights=weights)
        measured = [np.inf if tau == 0 else measure(temperature=tau) for tau in grid]
    return _choose(ranked, labels, groups, rule, measured)


def choose_normalisation_tau(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    norms: npt.ArrayLike,
    grid: Sequence[float] = GRID,
    *,
    biases: npt.ArrayLike | None = None,
    bias: BiasRule = "divide",
    groups: Mapping[str, npt.ArrayLike] | None = None,
    rule: RankingRule = "class-mean-log-loss",
) -> ChosenTau:
    """Choose the tau of weight normalisation on held-out labels f (N, L), (N,): see `choose_tau`.

    The class-mean log loss is of softmax(s / T): s stands for no posterior, but how far the right class is
    ahead tells more of a label than whether it is.
    """
    ranked = _normalised(logits, norms, _checked_grid(grid), biases, bias)
    return _choose(ranked, labels, groups, rule, None)


def _choose(
    ranked: Iterable[tuple[float, Floats]],
    labels: npt.ArrayLike,
    groups: Mapping[str, npt.ArrayLike] | None,
    rule: TauRule,
    measured: Sequence[float] | None,
) -> ChosenTau:
    """Choose among the scores at each tau; `measured` are the values of a rule that is not of the ranking."""
    if rule not in TAU_RULES:
        raise ValueError(f"There is no rule '{rule}' for tau; there are {', '.join(TAU_RULES)}.")
    weights = class_mean_weights(labels)
    curve, fits = [], []
    for tau, scores in ranked:  # one at a time: 41 of these do not fit into memory for thousands of classes
        curve.append(_point(tau, scores, labels, groups))
        fits.append(fit_temperature(scores, labels, weights))
    log_losses = np.array([fit.log_loss for fit in fits])
    errors = [point.balanced.error for point in curve]
    by_error = int(np.argmin(errors))
    if measured is None:
        measured = errors if rule == "balanced-error" else log_losses.tolist()
    best = int(np.argmin(measured))
    ends = (0, len(curve) - 1)
    return ChosenTau(
        tau=curve[best].tau,
        rule=rule,
        at_edge=best in ends,
        converged=fits[best].converged,
        tau_by_error=curve[by_error].tau,
        tau_by_error_at_edge=by_error in ends,
        log_losses=log_losses,
        temperatures=np.array([fit.temperature for fit in fits]),
        curve=curve,
    )


def _miscalibration(
    rule: TauRule,
    calibrated: Floats,
    labels: npt.ArrayLike,
    *,
    source_prior: Floats,
    temperature: float,
    weights: npt.ArrayLike | None,
) -> float:
    if rule == "calibration-log-loss":
        return log_loss(calibrated, labels, temperature, weights)
    posterior = probabilities(calibrated, temperature)
    if rule == "calibration-squared-error":
        return squared_error(posterior, labels, weights)
    return expected_calibration_error(posterior, labels, source_prior)


def _point(
    tau: float,
    scores: Floats,
    labels: npt.ArrayLike,
    groups: Mapping[str, npt.ArrayLike] | None,
    weights: npt.ArrayLike | None = None,
) -> TauPoint:
    by_class = class_errors(labels, scores.argmax(axis=1), scores.shape[1], weights)
    return TauPoint(
        tau=tau,
        by_class=by_class,
        balanced=mean_error(by_class),
        groups={name: mean_error(by_class, classes) for name, classes in (groups or {}).items()},
    )


def _adjusted(
    logits_plus_offset: npt.ArrayLike,
    source_prior: npt.ArrayLike,
    target_prior: npt.ArrayLike,
    taus: Sequence[float],
) -> Iterator[tuple[float, Floats]]:
    """Yield each tau with its scores (N, L); the logits are checked once, not once for each tau."""
    values = _checked_rows(logits_plus_offset)
    for tau in taus:
        added = adjustment(source_prior, target_prior, tau)
        if added.shape != values.shape[1:]:
            raise ValueError(f"The priors have {added.size} classes but the logits have {values.shape[1]}.")
        yield float(tau), values + added


def _normalised(
    logits: npt.ArrayLike,
    norms: npt.ArrayLike,
    taus: Sequence[float],
    biases: npt.ArrayLike | None,
    bias: BiasRule,
) -> Iterator[tuple[float, Floats]]:
    values = _checked_rows(logits)
    for tau in taus:
        yield float(tau), weight_normalisation(norms, tau, biases=biases, bias=bias).scores(values)


def _checked_rows(logits: npt.ArrayLike) -> Floats:
    values = checked_logits(logits)
    if values.ndim != 2:
        raise ValueError(f"Rows of shape (N, L) are needed, not {values.shape}.")
    return values


def _checked_grid(grid: Sequence[float]) -> Sequence[float]:
    if not len(grid) or not (np.diff(grid) > 0).all():
        raise ValueError("The grid of tau must rise, and hold at least one value.")
    return grid
