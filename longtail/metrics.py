"""How wrong a classifier is: by class, by group, on average over classes, and in its probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longtail.adjustment import top_k
from longtail.intervals import Interval, largest_variance, widened, wilson
from longtail.priors import Floats, checked_prior

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassErrors:
    """The error of each class, shape (L,) each."""

    errors: Floats  # NaN where a class has no label
    labels: Ints  # how many labels it rests on
    effective: Floats  # the same for weighted labels: Kish's number, at most `labels`


@dataclass(frozen=True)
class MeanError:
    """The mean of per-class errors over some classes, and how well it is known."""

    error: float  # over the classes with labels; NaN if there is none
    interval: Interval  # for that same mean
    interval_all: Interval  # for the mean over all the classes: wider, as some have no label
    labels: int
    classes: int
    classes_with_labels: int


@dataclass(frozen=True)
class TrafficError:
    """The share of the traffic that is decided wrongly, each label weighted by the items it stands for."""

    error: float  # NaN without labels
    interval: Interval
    labels: int


def class_errors(
    labels: npt.ArrayLike,
    predicted: npt.ArrayLike,
    n_classes: int,
    weights: npt.ArrayLike | None = None,
) -> ClassErrors:
    """Return each class's error, P(predicted != y | y), from labels and predictions of shape (N,).

    `weights` are 1 / sampling_probability where labels were sampled unevenly: the error is then Hájek's,
    sum w wrong / sum w, and the effective number of labels Kish's, (sum w)^2 / sum w^2. Kish's is too
    optimistic where a heavy weight is rare: keep sampling probabilities above half the uniform rate.
    """
    truth = checked_labels(labels, n_classes)
    wrong = _wrong(truth, predicted, n_classes)
    return _weighted_errors(truth, wrong, n_classes, weights)


def mean_error(by_class: ClassErrors, members: npt.ArrayLike | None = None) -> MeanError:
    """Return the mean error over the classes `members` (indices; all by default), with both its intervals.

    Over all classes it is the balanced error (Menon et al. 2021, eq. 2), over a group that group's error:
    each class counts alike however many labels it has, and a class without labels is left out, not zero.
    """
    n_classes = len(by_class.errors)
    chosen = checked_labels(range(n_classes) if members is None else members, n_classes)
    if not chosen.size or len(np.unique(chosen)) < len(chosen):
        raise ValueError("A mean needs at least one class, and each class once.")
    errors, labels, effective = by_class.errors[chosen], by_class.labels[chosen], by_class.effective[chosen]
    labelled = labels > 0
    interval = largest_variance(errors, effective)
    return MeanError(
        error=float(errors[labelled].mean()) if labelled.any() else float("nan"),
        interval=interval,
        interval_all=widened(interval, int(labelled.sum()), len(chosen)),
        labels=int(labels.sum()),
        classes=len(chosen),
        classes_with_labels=int(labelled.sum()),
    )


def balanced_error(labels: npt.ArrayLike, predicted: npt.ArrayLike, n_classes: int) -> float:
    """Return the mean over classes with labels of the per-class error (eq. 2), NaN without labels.

    >>> balanced_error([0, 0, 0, 1], [0, 0, 0, 0], n_classes=2)  # one in four wrong, but a whole class
    0.5
    """
    return mean_error(class_errors(labels, predicted, n_classes)).error


def top_k_balanced_error(labels: npt.ArrayLike, scores: npt.ArrayLike, k: int) -> float:
    """Return the balanced error that counts a label as right if it is among the k highest scores (N, L).

    Ties go to the lower index, as where they are served; a class at -inf is in no top-k.
    """
    ranked = top_k(scores, k)
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"Scores of shape (N, L) are needed, not {values.shape}.")
    truth = checked_labels(labels, values.shape[1])
    if len(truth) != len(values):
        raise ValueError(f"There are {len(truth)} labels but {len(values)} rows of scores.")
    hit = (ranked == truth[:, None]).any(axis=1) & (values[np.arange(len(truth)), truth] > -np.inf)
    return mean_error(_weighted_errors(truth, ~hit, values.shape[1], None)).error


def traffic_error(
    labels: npt.ArrayLike,
    predicted: npt.ArrayLike,
    n_classes: int,
    weights: npt.ArrayLike | None = None,
) -> TrafficError:
    """Return the error over all labels, each weighted (Hájek's), with Wilson's interval at Kish's number."""
    truth = checked_labels(labels, n_classes)
    wrong = _wrong(truth, predicted, n_classes)
    pooled = _weighted_errors(np.zeros_like(truth), wrong, 1, weights)
    error = float(pooled.errors[0])
    return TrafficError(error, wilson(error, float(pooled.effective[0])), len(truth))


def expected_calibration_error(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, prior: npt.ArrayLike, bins: int = 15
) -> float:
    """Return the expected calibration error of the top probability, under a stated label distribution.

    Probabilities (N, L) are a posterior under one prior only (softmax((f + b) / T) under the source prior),
    so measured on a sample with another mix of labels they look wrong by construction. Each item therefore
    weighs prior_y / n_y, n_y the sample's labels of its class: the weighted sample has the prior's mix, over
    the classes that have labels. Then, over `bins` equal bins of confidence, each closed on the right, the
    mean over weight of |accuracy - confidence| (Guo et al. 2017, eq. 3).
    """
    values = np.asarray(probabilities, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"Probabilities of shape (N, L) are needed, N at least 1, not {values.shape}.")
    if not (values >= 0).all() or not (abs(values.sum(axis=1) - 1) <= 1e-3).all():
        raise ValueError("Probabilities must be numbers, not negative, and sum to one in each row.")
    if bins < 1:
        raise ValueError(f"At least one bin is needed, not {bins}.")
    truth = checked_labels(labels, values.shape[1])
    if len(truth) != len(values):
        raise ValueError(f"There are {len(truth)} labels but {len(values)} rows of probabilities.")
    stated = checked_prior(prior, values.shape[1])
    weights = stated[truth] / np.bincount(truth, minlength=len(stated))[truth]
    if weights.sum() == 0:
        raise ValueError("The prior is zero for every class with a label: there is nothing to measure.")
    right = values.argmax(axis=1) == truth
    confidence = values.max(axis=1)
    place = np.searchsorted(np.arange(1, bins) / bins, confidence, side="left")
    gaps = np.bincount(place, weights * (right - confidence), minlength=bins)
    return float(np.abs(gaps).sum() / weights.sum())


def groups_by_count(class_counts: npt.ArrayLike, many: float = 100, few: float = 20) -> list[str]:
    """Return each class's group: "many" from `many` training images on, "few" up to `few`, "medium" between.

    The bounds of Menon et al. (2021), section 6; Kang et al.'s code puts 100 in medium and 20 in medium too.
    """
    if not few < many:
        raise ValueError(f"`few` must be below `many`, else a class is in two groups; got {few} and {many}.")
    counts = np.asarray(class_counts, dtype=np.float64)
    if counts.ndim != 1 or not (counts >= 0).all():
        raise ValueError("One count for each class is needed, none negative or NaN.")
    return ["many" if count >= many else "few" if count <= few else "medium" for count in counts]


def group_members(groups: Sequence[str]) -> dict[str, Ints]:
    """Return the indices of each group's classes, in the order in which the groups first appear."""
    names = np.asarray(groups, dtype=object)
    return {name: np.flatnonzero(names == name).astype(np.int64) for name in dict.fromkeys(groups)}


def checked_labels(labels: npt.ArrayLike, n_classes: int) -> Ints:
    """Return labels as an integer array (N,), each from 0 to n_classes - 1; ValueError otherwise."""
    truth = np.asarray(labels)
    if truth.ndim != 1 or (truth.size and truth.dtype.kind not in "iu"):
        raise ValueError(f"Labels must be whole numbers in one flat list, not {truth.dtype} {truth.shape}.")
    if truth.size and not (truth.min() >= 0 and truth.max() < n_classes):
        raise ValueError(f"A label lies outside 0 to {n_classes - 1}.")
    return truth.astype(np.int64)


def checked_weights(weights: npt.ArrayLike, n: int) -> Floats:
    """Return weights as float64 (N,), finite and above zero; ValueError otherwise."""
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (n,) or not np.isfinite(w).all() or (w <= 0).any():
        raise ValueError("One weight for each label is needed, finite and above zero.")
    return w


def _wrong(truth: Ints, predicted: npt.ArrayLike, n_classes: int) -> npt.NDArray[np.bool_]:
    decided = checked_labels(predicted, n_classes)
    if len(truth) != len(decided):
        raise ValueError(f"There are {len(truth)} labels but {len(decided)} predictions.")
    return np.asarray(truth != decided)


def _weighted_errors(
    cell: Ints, wrong: npt.NDArray[np.bool_], n_cells: int, weights: npt.ArrayLike | None
) -> ClassErrors:
    """Return Hájek's error and Kish's number in each cell."""
    labels = np.bincount(cell, minlength=n_cells)
    if weights is None:
        w = np.ones(len(cell))
    else:
        w = checked_weights(weights, len(cell))
        largest = np.zeros(n_cells)
        np.maximum.at(largest, cell, w)
        w = w / largest[cell]  # neither formula knows the scale, and squares of raw weights may overflow
    weight, squares = np.bincount(cell, w, n_cells), np.bincount(cell, w * w, n_cells)
    errors = np.full(n_cells, np.nan)
    np.divide(np.bincount(cell, w * wrong, n_cells), weight, out=errors, where=labels > 0)
    effective = np.divide(weight**2, squares, out=np.zeros(n_cells), where=labels > 0)
    return ClassErrors(errors, labels.astype(np.int64), effective)
