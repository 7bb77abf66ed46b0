"""Labelled images in memory, and the two cuts that everything later depends on: long tail and held-out split.

The readers of single data sets are in cifar.py, npz.py, imagefolder.py and shapes.py.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.exceptions import DataError

PROFILES = ("exp", "step")


@dataclass(frozen=True)
class Examples:
    """Images (N, H, W, 3) uint8 RGB and their labels (N,) int64."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: NDArray[np.int64]) -> "Examples":
        """Return the examples at these positions."""
        return Examples(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """A data set as read: the whole training set (held-out images included) and the test set.

    `holdout` is set only where the data set brings its own. `holdout_base` (L,) counts the images that the
    held-out share is a share of; None means the training images.
    """

    name: str
    class_labels: tuple[str, ...]
    train: Examples
    test: Examples
    holdout: Examples | None = None
    holdout_base: NDArray[np.int64] | None = None
    note: str = ""  # what a reader of figures must know, such as images missing against the published set

    def __post_init__(self) -> None:
        if len(self.class_labels) < 2:
            raise DataError(f"{self.name}: a classifier needs at least two classes")
        for index in np.flatnonzero(self.class_counts == 0):
            raise DataError(f"{self.name}: class '{self.class_labels[index]}' has no training image")

    @property
    def class_counts(self) -> NDArray[np.int64]:
        """Images of each class in the whole training set, (L,): what the groups are made from."""
        counts = np.bincount(self.train.labels, minlength=len(self.class_labels))
        if self.holdout is not None:
            counts = counts + np.bincount(self.holdout.labels, minlength=len(self.class_labels))
        return counts

    def fingerprint(self) -> str:
        """Return a digest of every image and label, so that a resumed run can tell that its data changed."""
        digest = hashlib.sha256("\0".join(self.class_labels).encode())
        for part in (self.train, self.test, self.holdout):
            if part is not None:
                digest.update(np.ascontiguousarray(part.images).data)
                digest.update(part.labels.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Split:
    """The images that the weights see, and those kept back to choose tau and the temperature."""

    trained: Examples
    holdout: Examples


def split(dataset: Dataset, share: float, seed: int) -> Split:
    """Hold out floor(share * n + 1/2) images of each class with n images, none where n < 5.

    At least one image of a class stays for training. A data set that brings its own held-out images keeps
    them, unless the share is 0: then they are trained on.
    """
    if not 0 <= share <= 0.5:
        raise DataError(f"the held-out share must be between 0 and 0.5, not {share}")
    if dataset.holdout is not None:
        if share > 0:
            return Split(dataset.train, dataset.holdout)
        images = np.concatenate([dataset.train.images, dataset.holdout.images])
        labels = np.concatenate([dataset.train.labels, dataset.holdout.labels])
        return Split(Examples(images, labels), dataset.holdout.take(np.array([], dtype=np.int64)))
    n_classes = len(dataset.class_labels)
    own = np.bincount(dataset.train.labels, minlength=n_classes)
    base = own if dataset.holdout_base is None else dataset.holdout_base
    wanted = [
        min(rounded_share(int(n), share) if n >= 5 else 0, int(m) - 1) for n, m in zip(base, own, strict=True)
    ]
    held = np.zeros(len(dataset.train), dtype=bool)
    rng = np.random.default_rng([seed, 1])
    for index, count in enumerate(wanted):
        positions = rng.permutation(np.flatnonzero(dataset.train.labels == index))
        held[positions[:count]] = True
    return Split(dataset.train.take(np.flatnonzero(~held)), dataset.train.take(np.flatnonzero(held)))


def rounded_share(n: int, share: float) -> int:
    """Return share * n rounded half up."""
    return math.floor(share * n + 0.5)


def profile_counts(profile: str, largest: int, imbalance_ratio: float, n_classes: int) -> list[int]:
    """Return how many images each class keeps, class 0 the most.

    exp: int(largest * ratio^(-c / (L - 1))); step: the first half keeps all, the rest int(largest / ratio)
    (Cui et al., 2019; Cao et al., 2019).
    """
    if not (math.isfinite(imbalance_ratio) and imbalance_ratio >= 1):
        raise DataError(f"the imbalance ratio must be at least 1, not {imbalance_ratio}")
    smallest_share = 1 / imbalance_ratio
    if profile == "exp":
        return [int(largest * smallest_share ** (c / (n_classes - 1))) for c in range(n_classes)]
    if profile == "step":
        half = n_classes // 2
        return [largest] * half + [int(largest * smallest_share)] * (n_classes - half)
    raise DataError(f"unknown profile '{profile}'; known are {', '.join(PROFILES)}")


def long_tail(labels: NDArray[np.int64], counts: list[int]) -> NDArray[np.int64]:
    """Return the positions kept, class by class: the published selection of Cao et al. (2019).

    Their code seeds NumPy's global stream with 0, once, and shuffles each class in turn; this is the same
    stream. It does not depend on the counts, so a smaller subset lies inside a larger one.
    """
    rng = np.random.RandomState(0)
    kept = []
    for index, count in enumerate(counts):
        positions = np.flatnonzero(labels == index)
        rng.shuffle(positions)
        kept.append(positions[:count])
    return np.concatenate(kept)


def channel_statistics(images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of v / 255, to four decimals.

    A constant channel gets a deviation of one grey level, so that it can be divided by.
    """
    levels = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[-1]):
        shares = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        mean = float(shares @ levels)
        deviation = math.sqrt(float(shares @ (levels - mean) ** 2))
        means.append(round(mean, 4))
        deviations.append(round(max(deviation, 1 / 255), 4))
    return tuple(means), tuple(deviations)


def existing_folder(path: Path | None, option: str) -> Path:
    """Return the folder, or raise DataError that names the option and what is missing."""
    if path is None:
        raise DataError(f"{option} is needed for this data set")
    if not path.is_dir():
        raise DataError(f"{option}: there is no folder {path}")
    return path
