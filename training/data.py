"""Labelled images, and the two cuts that everything later depends on: long tail and held-out split.

The readers of single data sets are in cifar.py, npz.py, imagefolder.py, imagenet_lt.py, inaturalist.py and
shapes.py. Images that are too many for the memory are in image_files.py.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from bundle.manifest import Resize
from training.exceptions import DataError

PROFILES = ("exp", "step")

_LONGEST_LABEL = 1000  # in a manifest
_STATISTICS_IMAGES, _STATISTICS_BLOCK = 50_000, 32


class Part(Protocol):
    """Labelled square images of one size, in memory (`Examples`) or in files (`image_files.ImageFiles`)."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """The labels (N,)."""

    @property
    def image_size(self) -> int:
        """Side in pixels."""

    def __len__(self) -> int: ...

    def take(self, index: NDArray[np.int64]) -> Self:
        """Return the images at these positions."""

    def joined(self, other: Self) -> Self:
        """Return these images and then the other's."""

    def blocks(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """Yield the images in order, up to `size` at a time, as serving sees them: uint8 RGB (b, H, W, 3)."""

    def content(self) -> Iterable[bytes | memoryview]:
        """Yield what makes these images and labels different from others, for a digest."""


@dataclass(frozen=True)
class Examples:
    """Images (N, H, W, 3) uint8 RGB and their labels (N,) int64."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return int(self.images.shape[1])

    def take(self, index: NDArray[np.int64]) -> "Examples":
        """Return the examples at these positions."""
        return Examples(self.images[index], self.labels[index])

    def joined(self, other: "Examples") -> "Examples":
        """Return these examples and then the other's."""
        return Examples(
            np.concatenate([self.images, other.images]), np.concatenate([self.labels, other.labels])
        )

    def blocks(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """Yield the images up to `size` at a time, (b, H, W, 3), in order."""
        for start in range(0, len(self), size):
            yield self.images[start : start + size]

    def content(self) -> Iterator[bytes | memoryview]:
        """Yield every pixel and label, for a digest."""
        yield np.ascontiguousarray(self.images).data
        yield self.labels.astype("<i8").tobytes()


@dataclass(frozen=True)
class Dataset:
    """A data set as read: the whole training set (held-out images included) and the test set.

    `holdout` is set only where the data set brings its own: images of the training set set aside, which count
    for the groups and are trained on where nothing is to be held out, or, with `holdout_is_apart`, images
    beside the training set that do neither. `holdout_base` (L,) counts the images that the held-out share is
    a share of; None means the training images.
    """

    name: str
    class_labels: tuple[str, ...]
    train: Part
    test: Part
    holdout: Part | None = None
    holdout_is_apart: bool = False
    holdout_base: NDArray[np.int64] | None = None
    resize: Resize = field(default_factory=Resize)  # how an image of another size came to this one
    # mean and std that are customary for it; None: those of the images trained on
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    note: str = ""  # what a reader of figures must know, such as images missing against the published set

    def __post_init__(self) -> None:
        if len(self.class_labels) < 2:
            raise DataError(f"{self.name}: a classifier needs at least two classes")
        if len(set(self.class_labels)) < len(self.class_labels):
            raise DataError(f"{self.name}: two classes have the same name")
        if not all(1 <= len(label) <= _LONGEST_LABEL for label in self.class_labels):
            raise DataError(f"{self.name}: a class's name has 1 to {_LONGEST_LABEL:,} characters")
        for index in np.flatnonzero(self.class_counts == 0):
            raise DataError(f"{self.name}: class '{self.class_labels[index]}' has no training image")

    @property
    def class_counts(self) -> NDArray[np.int64]:
        """Images of each class in the whole training set, (L,): what the groups are made from."""
        counts = np.bincount(self.train.labels, minlength=len(self.class_labels))
        if self.holdout is not None and not self.holdout_is_apart:
            counts = counts + np.bincount(self.holdout.labels, minlength=len(self.class_labels))
        return counts

    def fingerprint(self) -> str:
        """Return a digest of images and labels, so that a resumed run can tell that its data changed.

        It covers every pixel of images in memory, and name and size of images in files.
        """
        digest = hashlib.sha256("\0".join(self.class_labels).encode())
        for part in (self.train, self.test, self.holdout):
            if part is not None:
                for content in part.content():
                    digest.update(content)
        return digest.hexdigest()


@dataclass(frozen=True)
class Split:
    """The images that the weights see, and those kept back to choose tau and the temperature."""

    trained: Part
    holdout: Part


def split(dataset: Dataset, share: float, seed: int) -> Split:
    """Hold out floor(share * n + 1/2) images of each class with n images, none where n < 5.

    At least one image of a class stays for training. A data set that brings its own held-out images keeps
    them, unless the share is 0: then those that are of the training set are trained on.
    """
    if not 0 <= share <= 0.5:
        raise DataError(f"the held-out share must be between 0 and 0.5, not {share}")
    if dataset.holdout is not None:
        if share > 0 or dataset.holdout_is_apart:
            return Split(dataset.train, dataset.holdout)
        nothing = dataset.holdout.take(np.array([], dtype=np.int64))
        return Split(dataset.train.joined(dataset.holdout), nothing)
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


def normalisation_of(dataset: Dataset, trained: Part) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and std that are customary for the data set, else those of the images trained on.

    Of more than 50,000 images as many are looked at, spread evenly over them.
    """
    if dataset.normalisation is not None:
        return dataset.normalisation
    if len(trained) > _STATISTICS_IMAGES:
        trained = trained.take(np.linspace(0, len(trained) - 1, num=_STATISTICS_IMAGES, dtype=np.int64))
    return channel_statistics(trained.blocks(_STATISTICS_BLOCK))


def channel_statistics(blocks: Iterable[NDArray[np.uint8]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of v / 255, to four decimals.

    The images come in blocks (b, H, W, 3). A constant channel gets a deviation of one grey level, so that it
    can be divided by.
    """
    counts = np.zeros((3, 256), dtype=np.int64)
    for images in blocks:
        for channel in range(3):
            counts[channel] += np.bincount(images[..., channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    means, deviations = [], []
    for shares in counts / counts.sum(axis=1, keepdims=True):
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
