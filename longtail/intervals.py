"""95 % intervals for error rates that hold with few labels: one class, and the mean over classes.

Fixed-n intervals, for a report at a date: who looks after every label and stops when it suits needs a
confidence sequence instead.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longtail.priors import Floats

Z_95 = 1.959963984540054  # the normal's 97.5 % point


@dataclass(frozen=True)
class Interval:
    """Where an error rate lies, ends included."""

    low: float
    high: float


def wilson(error: float, n: float, z: float = Z_95) -> Interval:
    """Return Wilson's (1927) score interval for the error rate of one class, seen on `n` labels.

    It is {p: (error - p)^2 <= z^2 p (1 - p) / n}, solved. `n` may be a fraction (Kish's effective number);
    n = 0 gives [0, 1], whatever the error. It covers 95 % on average over rates, less at single rates with
    few labels, near 0 and 1 above all (docs/maths.md).

    >>> wilson(0.0, 10)
    Interval(low=0.0, high=0.2775...)
    """
    _check_z(z)
    if not math.isfinite(n) or n < 0:
        raise ValueError(f"A number of labels must be finite and not negative, not {n}.")
    if n == 0:
        return Interval(0.0, 1.0)
    if not 0 <= error <= 1:
        raise ValueError(f"An error rate must lie between 0 and 1, not {error}.")
    centre = (error + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(error * (1 - error) / n + z**2 / (4 * n**2))
    # Nothing wrong and nothing right reach the end itself, which rounding would miss.
    return Interval(
        max(centre - half, 0.0) if error > 0 else 0.0, min(centre + half, 1.0) if error < 1 else 1.0
    )


def largest_variance(errors: npt.ArrayLike, n: npt.ArrayLike, z: float = Z_95) -> Interval:
    """Return the largest-variance score interval for the mean over the classes that have labels.

    `errors` and `n`, shape (L,), are each class's error rate and number of labels (a fraction for weighted
    labels); a class with n = 0 is left out, and none left gives [0, 1]. A mean m0 is kept if
    (mean - m0)^2 <= z^2 V(m0), where V(m0) is the largest variance that any rates p of mean m0 give the mean:

        V(m0) = max { sum p_c (1 - p_c) / n_c / L^2 : mean p = m0 },
        reached at p_c = max(1/2 - t n_c, 0), t >= 0, for m0 <= 1/2, and V(1 - m0) = V(m0)

    So classes with few labels, the uncertain ones, are taken at their worst, and coverage is at least 93 %
    where a bootstrap or a pooled interval falls to a half (docs/maths.md). One class gives Wilson exactly.
    V is concave, so the kept means are an interval, and its ends solve a quadratic: no grid, no iteration.

    >>> largest_variance([0.0, 1.0, 0.2], [40, 1, 10])
    Interval(low=0.1003..., high=0.7398...)
    """
    rates, counts = _labelled(errors, n)
    _check_z(z)
    if not counts.size:
        return Interval(0.0, 1.0)
    mean = float(rates.mean())
    return Interval(_low_end(mean, counts, z), 1 - _low_end(1 - mean, counts, z))


def widened(interval: Interval, labelled: int, total: int) -> Interval:
    """Return the interval for the mean over all `total` classes, from one over the `labelled` of them.

    The classes without a label may err never or always, so their share of the mean is added at both ends.
    """
    if not 0 <= labelled <= total or total == 0:
        raise ValueError(f"There cannot be {labelled} classes with labels among {total}.")
    return Interval(interval.low * labelled / total, (interval.high * labelled + (total - labelled)) / total)


def _check_z(z: float) -> None:
    if not math.isfinite(z) or z <= 0:
        raise ValueError(f"z must be a finite number above zero, not {z}.")


def _labelled(errors: npt.ArrayLike, n: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Return the error rates and numbers of labels of the classes that have labels, checked."""
    rates, counts = np.asarray(errors, dtype=np.float64), np.asarray(n, dtype=np.float64)
    if rates.ndim != 1 or rates.shape != counts.shape:
        raise ValueError(
            f"One error rate and one number of labels for each class, not {rates.shape} and {counts.shape}."
        )
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("Numbers of labels must be finite and not negative.")
    rates, counts = rates[counts > 0], counts[counts > 0]
    if not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError("An error rate must lie between 0 and 1 wherever there are labels.")
    return rates, counts


def _low_end(mean: float, n: Floats, z: float) -> float:
    """Return the least m0 with mean - m0 <= z sqrt(V(m0)).

    As t grows from 0, the class with the most labels reaches 0 first, at t = 1 / (2 n). On segment k of t,
    k classes are at 0; with A, S and H the number, the sum of n and the sum of 1 / n of the others,

        L m0 = A/2 - t S        L^2 V = H/4 - t^2 S

    is exact, and the end solves (L mean - L m0)^2 = z^2 L^2 V in t. Above 1/2, 1 - m0 takes the place of m0.
    """
    if mean <= 0:
        return 0.0
    n = np.sort(n)[::-1]
    size = len(n)
    active = np.arange(size, 0, -1, dtype=np.float64)
    total = np.cumsum(n[::-1])[::-1]
    inverse = np.cumsum(1 / n[::-1])[::-1]
    start = np.concatenate([[0.0], 1 / (2 * n[:-1])])  # of each segment
    sums = active / 2 - start * total  # L m0 where the segment starts, falling from L/2
    reach = z * np.sqrt(np.maximum(inverse / 4 - start**2 * total, 0))

    # The root of (d + t S)^2 = z^2 (H/4 - t^2 S) with d = L mean - A/2 (below 1/2), or with
    # (d - t S)^2 and d = L (mean - 1) + A/2 (above it); each time the one where m0 < mean.
    upper = size * mean - size / 2 > reach[0]  # is even m0 = 1/2 too low to be kept?
    if upper:
        too_low = size * (mean - 1) + sums > reach  # true up to the segment that holds the end
        k = int(np.flatnonzero(too_low)[-1])
        d, sign = size * (mean - 1) + active[k] / 2, -1.0
    else:
        kept = size * mean - sums <= reach  # true up to the segment that holds the end
        k = int(np.flatnonzero(kept)[-1])
        d, sign = size * mean - active[k] / 2, 1.0
    s = total[k]
    room = max(z**2 * (s + z**2) * s * inverse[k] / 4 - z**2 * s * d**2, 0.0)
    t = sign * (np.sqrt(room) - d * s) / (s**2 + z**2 * s)
    sum_at_t = active[k] / 2 - t * s
    return float(np.clip((size - sum_at_t if upper else sum_at_t) / size, 0.0, mean))
