"""What a person hands over beside a graph: class names with counts, and labelled evidence to calibrate on."""

from __future__ import annotations

import csv
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.exceptions import DataError
from training.views import served_view

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from bundle.manifest import ImageInput


@dataclass(frozen=True)
class Classes:
    """The classes by index: their labels, and their training images, int64 (L,)."""

    labels: list[str]
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """Logits f, float32 (n, L), and labels, int64 (n,), of images that the weights never saw."""

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]


def read_classes(path: Path) -> Classes:
    """Read `label,count` lines in the order of the network's outputs; a line `label,count` may head them.

    Raises DataError that names the line at fault.
    """
    lines: dict[str, int] = {}
    counts: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                fields = [field.strip() for field in row]
                if not any(fields) or (
                    not counts and [field.lower() for field in fields] == ["label", "count"]
                ):
                    continue
                if len(fields) != 2:
                    raise DataError(f"{where}: label,count is expected, found {len(fields)} fields")
                label, count = fields
                if not label or len(label) > 1000:
                    raise DataError(f"{where}: a label has 1 to 1,000 characters, this one {len(label)}")
                if label in lines:
                    raise DataError(f"{where}: the label '{label}' stands in line {lines[label]} already")
                if not re.fullmatch(r"[0-9]{1,15}", count):
                    raise DataError(f"{where}: the count of '{label}' is '{count}', not a whole number")
                lines[label] = rows.line_num
                counts.append(int(count))
    except OSError as failure:
        raise DataError(f"{path} cannot be read: {failure.strerror}") from failure
    except UnicodeDecodeError as failure:
        raise DataError(f"{path} is not UTF-8 text") from failure
    except csv.Error as failure:
        raise DataError(f"{path}, line {rows.line_num}: {failure}") from failure
    if not counts:
        raise DataError(f"{path} names no class")
    return Classes(list(lines), np.array(counts, dtype=np.int64))


def read_holdout(path: Path, n_classes: int) -> HeldOut:
    """Read the arrays `logits` (n, L) and `labels` (n,) of an npz file. Raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            logits, labels = arrays["logits"], arrays["labels"]
    except FileNotFoundError as failure:
        raise DataError(f"{path} does not exist") from failure
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as failure:
        raise DataError(f"{path} is not an npz file with the arrays logits and labels") from failure
    if logits.ndim != 2 or logits.dtype.kind != "f" or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: logits must be floats (n, classes) and labels whole numbers (n,)")
    if logits.shape != (len(labels), n_classes) or not len(labels):
        raise DataError(
            f"{path}: {len(labels)} labels and logits of shape {logits.shape} do not go with"
            f" {n_classes} classes"
        )
    with np.errstate(over="ignore"):
        logits = logits.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if bad.size:
        raise DataError(f"{path}: the logits of row {bad[0]} are not finite")
    if labels.min() < 0 or labels.max() >= n_classes:
        raise DataError(f"{path}: a label lies outside 0 to {n_classes - 1}")
    if sums_to_one(logits):
        raise DataError(
            f"{path}: the logits are probabilities already; store what the network gives before softmax"
        )
    return HeldOut(logits, labels.astype(np.int64))


def sums_to_one(rows: NDArray[Any]) -> bool:
    """Return whether rows (n, L) look like probabilities; a single class has nothing to tell them by."""
    if rows.shape[1] < 2:
        return False
    values = rows.astype(np.float64)
    return bool(values.min() >= 0 and np.allclose(values.sum(axis=1), 1, atol=1e-2))


def image_files(folder: Path, labels: list[str]) -> list[tuple[Path, int]]:
    """Return the files of a folder of class folders, each with its class index. Raises DataError."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    index = {label: i for i, label in enumerate(labels)}
    found = []
    for inner in sorted(folder.iterdir()):
        if inner.name.startswith(".") or not inner.is_dir():
            continue
        if inner.name not in index:
            raise DataError(f"{inner}: '{inner.name}' is no class of the CSV file")
        files = sorted(file for file in inner.iterdir() if file.is_file() and not file.name.startswith("."))
        found += [(file, index[inner.name]) for file in files]
    if not found:
        raise DataError(f"{folder} holds no image; one folder for each class is expected, named by its label")
    return found


def decoded(files: list[tuple[Path, int]], spec: ImageInput, batch: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the images in batches (b, H, W, C), decoded as for /predict. Raises DataError naming the file."""
    for start in range(0, len(files), batch):
        yield np.stack([served_view(path, spec) for path, _ in files[start : start + batch]])
