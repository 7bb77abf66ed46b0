"""CIFAR-10-LT and CIFAR-100-LT, cut from the original files that torchvision reads."""

import contextlib
import os
import pickle
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torchvision

from training.data import Dataset, Examples, existing_folder, long_tail, profile_counts
from training.exceptions import DataError


def read_cifar(name: str, data_dir: Path | None, profile: str, imbalance_ratio: float) -> Dataset:
    """Return the long-tailed training set and the whole, balanced test set.

    Without a folder the files are looked for in the user's cache and downloaded if they are not there.
    """
    reader: Any = {
        "cifar10-lt": torchvision.datasets.CIFAR10,
        "cifar100-lt": torchvision.datasets.CIFAR100,
    }[name]
    root = cache_folder() if data_dir is None else existing_folder(data_dir, "--data-dir")
    try:
        # torchvision prints its progress to stdout, which is kept for results
        with contextlib.redirect_stdout(sys.stderr):
            train, test = (reader(root, train=part, download=data_dir is None) for part in (True, False))
    except (URLError, ConnectionError, TimeoutError) as failure:
        raise DataError(
            f"{name} could not be downloaded ({failure}); name a folder that holds it by --data-dir"
        ) from failure
    except RuntimeError as failure:  # torchvision's advice is about its own arguments
        raise DataError(
            f"{root} does not hold the original files of {name}: name the folder that has"
            f" {reader.base_folder}/ in it, or leave --data-dir out to download them"
        ) from failure
    except (OSError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as failure:
        reason = str(failure).splitlines()[0]
        raise DataError(f"{root} does not hold the original files of {name}: {reason}") from failure
    labels = np.array(train.targets, dtype=np.int64)
    n_classes = len(train.classes)
    counts = profile_counts(profile, len(labels) // n_classes, imbalance_ratio, n_classes)
    kept = long_tail(labels, counts)
    return Dataset(
        name=name,
        class_labels=tuple(train.classes),
        train=Examples(train.data[kept], labels[kept]),
        test=Examples(test.data, np.array(test.targets, dtype=np.int64)),
    )


def cache_folder() -> Path:
    """Return the folder that data is looked for in, and downloaded to, where none is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tare" / "data"
