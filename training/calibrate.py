"""From held-out logits to what a manifest says about them: temperature, tau*, the tau curve and the errors.

No torch here: a network that came from elsewhere is calibrated the same way.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from bundle.manifest import Calibration, Estimate, Group, GroupEstimate, TauPoint
from longtail import metrics, tau
from longtail.calibration import fit_offset_and_temperature, fit_temperature
from longtail.priors import uniform_prior

MANY, FEW = 100, 20  # Menon et al. (2021), section 6: >= 100 training images, <= 20


@dataclass(frozen=True)
class Calibrated:
    """What held-out images decide. `tau` is tau*, None where nothing was held out."""

    temperature: float
    tau: float | None
    tau_curve: list[TauPoint]
    calibration: Calibration


def calibrate(
    logits: npt.NDArray[np.floating],
    labels: npt.NDArray[np.integer],
    *,
    logit_offset: npt.NDArray[np.float64],
    source_prior: npt.NDArray[np.float64],
    groups: Sequence[Group],
    offset_origin: Literal["known", "fitted", "assumed"] = "known",
    weights: npt.NDArray[np.float64] | None = None,
    tau_rule: tau.TauRule = "class-mean-log-loss",
) -> Calibrated:
    """Fit T and choose tau* on held-out images of the training distribution: logits f (n, L), labels (n,).

    Images of another mix of labels need `weights` (n,) that make up for it in the fit of T.

    T has the least log loss of softmax((f + b) / T); tau* is chosen by the rule over 0, 0.1 ... 4. Without
    images T is 1 and there is no tau*.
    """
    covered = len(np.unique(labels))
    if not len(labels):
        unknown = Calibration(logit_offset=offset_origin, temperature="unfitted", images=0, classes=0)
        return Calibrated(1.0, None, [], unknown)
    calibrated_logits = logits.astype(np.float64) + logit_offset
    fitted = fit_temperature(calibrated_logits, labels, weights)
    chosen = tau.choose_tau(
        calibrated_logits,
        labels,
        source_prior,
        groups=class_lists(groups),
        rule=tau_rule,
        weights=weights,
    )
    calibration = Calibration(
        logit_offset=offset_origin,
        temperature="fitted" if fitted.converged else "unfitted",
        images=len(labels),
        classes=covered,
        tau_rule=chosen.rule,
        tau_by_error=chosen.tau_by_error,
        tau_at_edge=chosen.at_edge,
    )
    return Calibrated(fitted.temperature, chosen.tau, manifest_curve(chosen), calibration)


def offset_of(
    logit_offset: npt.NDArray[np.float64],
    status: Literal["known", "fitted"],
    logits: npt.NDArray[np.floating],
    labels: npt.NDArray[np.integer],
    weights: npt.NDArray[np.float64] | None = None,
) -> tuple[npt.NDArray[np.float64], Literal["known", "fitted", "assumed"]]:
    """Return the offset b (L,) that a bundle carries, and where it comes from.

    A known one is kept. One to be fitted starts from `logit_offset` and is held near it, on held-out logits
    f (n, L) and labels (n,) of the training distribution, or with `weights` (n,) that make up for another
    mix; without images, or where no finite temperature is the best, it keeps its start: assumed.
    """
    if status == "known":
        return logit_offset, "known"
    if not len(labels):
        return logit_offset, "assumed"
    fit = fit_offset_and_temperature(logits, labels, logit_offset, weights=weights)
    return (fit.logit_offset, "fitted") if fit.converged else (logit_offset, "assumed")


def prior_weights(
    labels: npt.NDArray[np.integer], source_prior: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return what each held-out image (n,) weighs for their labels to come in the training set's mix.

    Labelled images set aside by hand are often balanced, and logits are calibrated to the source prior only.
    """
    seen = np.bincount(labels, minlength=len(source_prior))
    return np.asarray((source_prior * len(labels) / np.maximum(seen, 1))[labels])


def errors_at(
    taus: Sequence[float],
    logits: npt.NDArray[np.floating],
    labels: npt.NDArray[np.integer],
    *,
    logit_offset: npt.NDArray[np.float64],
    source_prior: npt.NDArray[np.float64],
    groups: Sequence[Group],
) -> list[TauPoint]:
    """Return the errors at each tau for a uniform target prior, nothing where there are no images."""
    if not len(labels):
        return []
    n_classes = len(source_prior)
    return manifest_points(
        tau.tau_curve(
            logits.astype(np.float64) + logit_offset,
            labels,
            source_prior,
            uniform_prior(n_classes),
            taus,
            groups=class_lists(groups),
        )
    )


def groups_of(class_counts: npt.NDArray[np.integer]) -> list[Group]:
    """Return many, medium and few with their bounds and classes; a group without a class is left out."""
    members = metrics.group_members(metrics.groups_by_count(class_counts, MANY, FEW))
    bounds = {"many": (MANY, None), "medium": (FEW + 1, MANY - 1), "few": (None, FEW)}
    return [
        Group(name=name, at_least=low, at_most=high, indices=members[name].tolist())
        for name, (low, high) in bounds.items()
        if name in members
    ]


def class_lists(groups: Sequence[Group]) -> dict[str, list[int]]:
    """Return the indices of each group's classes, by name."""
    return {group.name: group.indices for group in groups}


def manifest_curve(chosen: tau.ChosenTau) -> list[TauPoint]:
    """Return the curve that tau* was chosen on, with the log loss at each tau's own best temperature."""
    return [
        point.model_copy(update={"log_loss": float(loss), "temperature": float(temperature)})
        for point, loss, temperature in zip(
            manifest_points(chosen.curve), chosen.log_losses, chosen.temperatures, strict=True
        )
    ]


def manifest_points(curve: Sequence[tau.TauPoint]) -> list[TauPoint]:
    """Return the errors at each tau as a manifest says them."""
    return [
        TauPoint(
            tau=point.tau,
            balanced_error=Estimate.model_validate(_estimate(point.balanced)),
            groups=[
                GroupEstimate.model_validate({"group": name, **_estimate(mean)})
                for name, mean in point.groups.items()
            ],
        )
        for point in curve
    ]


def _estimate(mean: metrics.MeanError) -> dict[str, float | int | None]:
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
