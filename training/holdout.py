"""From held-out logits to what a manifest says of them: logit offset, temperature, tau* and the curve of tau."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from bundle.manifest import Calibration, Estimate, Group, GroupEstimate, Metrics, TauPoint
from longtail.calibration import fit_offset_and_temperature, fit_temperature
from longtail.metrics import group_members, groups_by_count
from longtail.tau import choose_tau

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from longtail import tau
    from longtail.metrics import MeanError

MANY, FEW = 100, 20  # training images; the bounds of Menon et al. (2021), section 6


@dataclass(frozen=True)
class Calibrated:
    """The manifest's fields that held-out logits decide, and what a reader should be told about them."""

    logit_offset: list[float]
    temperature: float
    tau: float | None
    tau_curve: list[TauPoint]
    metrics: Metrics
    calibration: Calibration
    notes: list[str]


def calibrated(
    logits: NDArray[np.floating],
    labels: NDArray[np.integer],
    source_prior: NDArray[np.float64],
    logit_offset: NDArray[np.float64],
    class_counts: NDArray[np.int64],
    *,
    offset_is: Literal["known", "fitted", "assumed"] = "known",
) -> Calibrated:
    """Fit T and choose tau* on logits f (N, L) and labels (N,) of images that the weights never saw.

    With `offset_is="fitted"` the offset is fitted too, starting at `logit_offset`. Held-out images need not
    come in the training set's mix: each weighs source_prior_y N / n_y in the fit of T, so that a balanced
    set calibrates to the source prior as well.
    """
    n_classes = len(source_prior)
    seen = np.bincount(labels, minlength=n_classes)
    weights = source_prior[labels] * len(labels) / seen[labels]
    values, notes = logits.astype(np.float64), []
    if offset_is == "fitted":
        fit = fit_offset_and_temperature(values, labels, logit_offset, weights=weights)
        logit_offset, temperature, converged = fit.logit_offset, fit.temperature, fit.converged
    else:
        alone = fit_temperature(values + logit_offset, labels, weights)
        temperature, converged = alone.temperature, alone.converged
    if not converged:
        temperature = 1.0
        notes.append("no finite temperature is best on the held-out images; it stays 1 (unfitted)")
    groups = groups_by_count(class_counts, MANY, FEW)
    chosen = choose_tau(values + logit_offset, labels, source_prior, groups=groups)
    if chosen.at_edge:
        notes.append(f"tau* = {chosen.tau:g} is the end of the grid: the best may lie beyond")
    if not seen.all():
        notes.append(f"{(seen == 0).sum()} of {n_classes} classes have no held-out image")
    curve = [
        tau_point(point, float(log_loss), float(best))
        for point, log_loss, best in zip(chosen.curve, chosen.log_losses, chosen.temperatures, strict=True)
    ]
    return Calibrated(
        logit_offset=logit_offset.tolist(),
        temperature=temperature,
        tau=chosen.tau,
        tau_curve=curve,
        metrics=Metrics(holdout=[point for point in curve if point.tau in (0.0, 1.0, chosen.tau)]),
        calibration=Calibration(
            logit_offset=offset_is,
            temperature="fitted" if converged else "unfitted",
            images=len(labels),
            classes=int((seen > 0).sum()),
            tau_rule="class-mean-log-loss",
            tau_by_error=chosen.tau_by_error,
            tau_at_edge=chosen.at_edge,
        ),
        notes=notes,
    )


def uncalibrated(
    logit_offset: NDArray[np.float64], *, offset_is: Literal["known", "assumed"] = "known"
) -> Calibrated:
    """Return what can be said without held-out images: T = 1, no tau*."""
    return Calibrated(
        logit_offset=logit_offset.tolist(),
        temperature=1.0,
        tau=None,
        tau_curve=[],
        metrics=Metrics(),
        calibration=Calibration(logit_offset=offset_is, temperature="unfitted", images=0, classes=0),
        notes=[],
    )


def groups_of(class_counts: NDArray[np.int64]) -> list[Group]:
    """Return the groups many, medium and few with their bounds; one without a class is left out."""
    bounds = {"many": (MANY, None), "medium": (FEW + 1, MANY - 1), "few": (None, FEW)}
    members = group_members(groups_by_count(class_counts, MANY, FEW))
    return [
        Group(name=name, at_least=low, at_most=high, indices=members[name].tolist())
        for name, (low, high) in bounds.items()
        if name in members
    ]


def tau_point(
    point: tau.TauPoint, log_loss: float | None = None, temperature: float | None = None
) -> TauPoint:
    """Return a point of the curve as the manifest writes it."""
    order: Sequence[str] = [name for name in ("many", "medium", "few") if name in point.groups]
    return TauPoint(
        tau=point.tau,
        balanced_error=Estimate(**_estimate(point.balanced)),
        groups=[GroupEstimate(group=name, **_estimate(point.groups[name])) for name in order],
        log_loss=log_loss,
        temperature=temperature,
    )


def _estimate(mean: MeanError) -> dict[str, float | int | None]:
    return {
        "error": None if math.isnan(mean.error) else mean.error,
        "low": mean.interval.low,
        "high": mean.interval.high,
        "low_all": mean.interval_all.low,
        "high_all": mean.interval_all.high,
        "labels": mean.labels,
        "classes": mean.classes,
        "classes_with_labels": mean.classes_with_labels,
    }
