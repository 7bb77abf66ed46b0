"""Images that someone else prepared, as two NumPy archives."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data import Dataset, Examples
from training.exceptions import DataError


def read_npz(train_file: Path | None, test_file: Path | None) -> Dataset:
    """Return the data set of two archives with `images` uint8 (N, H, W, 3), `labels` and optionally `names`.

    Without `names` the classes are called by their numbers.
    """
    if train_file is None or test_file is None:
        raise DataError("the npz data set needs --train-file and --test-file")
    train, names = _read(train_file)
    test, _ = _read(test_file)
    n_classes = int(train.labels.max(initial=-1)) + 1 if names is None else len(names)
    labels = tuple(str(index) for index in range(n_classes)) if names is None else names
    for path, part in ((train_file, train), (test_file, test)):
        if len(part) and not 0 <= part.labels.min() <= part.labels.max() < n_classes:
            raise DataError(f"{path}: labels must lie between 0 and {n_classes - 1}")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(f"{train_file} and {test_file} hold images of different sizes")
    if len(set(labels)) < n_classes or "" in labels:
        raise DataError(f"{train_file}: class names must be different and not empty")
    return Dataset(
        name=train_file.stem,
        class_labels=labels,
        train=train,
        test=test,
        note=f"prepared archives: {train_file.name}, {len(train):,} images; {test_file.name}, {len(test):,}",
    )


def _read(path: Path) -> tuple[Examples, tuple[str, ...] | None]:
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if not zipfile.is_zipfile(path):  # np.load would take a bare array or a pickle too
        raise DataError(f"{path} is not a whole npz archive")
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
            names = archive["names"].tolist() if "names" in archive.files else None
    except KeyError as failure:
        raise DataError(f"{path} has no array {failure.args[0].split()[0]}") from failure
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as failure:
        raise DataError(f"{path} is not an npz archive of plain arrays: {failure}") from failure
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(
            f"{path}: images must be uint8 (N, H, W, 3), not {images.dtype} {tuple(images.shape)}"
        )
    if images.shape[1] != images.shape[2]:
        raise DataError(f"{path}: images must be square, not {images.shape[1]}x{images.shape[2]}")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: labels must be {len(images)} integers")
    return Examples(images, _as_int64(labels)), None if names is None else tuple(str(n) for n in names)


def _as_int64(labels: NDArray[np.integer]) -> NDArray[np.int64]:
    return labels.astype(np.int64)
