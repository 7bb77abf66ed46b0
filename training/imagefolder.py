"""A person's own images, one folder for each class, brought to one size by the rules that serving uses."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.manifest import ImageInput
from bundle.preprocessing import ImageError, decode
from training.data import Dataset, Examples, existing_folder, rounded_share
from training.exceptions import DataError

TEST_SHARE = 0.2
_NOT_IMAGES = {"thumbs.db", "desktop.ini"}  # what file managers leave behind, beside dot files


def read_imagefolder(data_dir: Path | None, image_size: int, seed: int) -> Dataset:
    """Return the images under `data_dir`, (image_size, image_size) each.

    Either DIR/CLASS/... , where a fifth of each class (rounded half up, none below 3 images, at least one
    left) is taken for testing by the seed; or DIR/train/CLASS/... with DIR/test and DIR/val beside it, where
    val is the held-out set. Every file must be an image but those whose names begin with a dot. Raises
    DataError that names the folder or the file.
    """
    root = existing_folder(data_dir, "--data-dir")
    if (root / "train").is_dir() and ((root / "test").is_dir() or (root / "val").is_dir()):
        return _ready_split(root, image_size)
    labels = _class_folders(root)
    whole = _read(root, labels, image_size)
    held = np.zeros(len(whole), dtype=bool)
    counts = np.bincount(whole.labels, minlength=len(labels))
    rng = np.random.default_rng([seed, 0])
    for index, count in enumerate(counts):
        positions = rng.permutation(np.flatnonzero(whole.labels == index))
        held[positions[: rounded_share(int(count), TEST_SHARE) if count >= 3 else 0]] = True
    return Dataset(
        name=root.name,
        class_labels=tuple(labels),
        train=whole.take(np.flatnonzero(~held)),
        test=whole.take(np.flatnonzero(held)),
        holdout_base=counts,
    )


def _ready_split(root: Path, size: int) -> Dataset:
    labels = _class_folders(root / "train")
    parts = {}
    for name in ("val", "test"):
        folder = root / name
        if folder.is_dir():
            for stranger in set(_class_folders(folder)) - set(labels):
                raise DataError(f"{folder / stranger} is a class that {root / 'train'} does not have")
            parts[name] = _read(folder, labels, size, may_miss=True)
    nothing = Examples(np.empty((0, size, size, 3), dtype=np.uint8), np.empty(0, dtype=np.int64))
    return Dataset(
        name=root.name,
        class_labels=tuple(labels),
        train=_read(root / "train", labels, size),
        test=parts.get("test", nothing),
        holdout=parts.get("val"),
    )


def _class_folders(root: Path) -> list[str]:
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not _hidden(entry))
    if not names:
        raise DataError(f"{root} holds no folder; one for each class is needed")
    for name in names:
        if not name.isprintable():  # a name that is no text could stand in no manifest
            raise DataError(f"{root}: the folder name {name!r} is not printable text")
    return names


def _read(root: Path, labels: Iterable[str], size: int, *, may_miss: bool = False) -> Examples:
    """Read every image of every class, in the order of the names."""
    files, indices = [], []
    for index, label in enumerate(labels):
        found = sorted(_image_files(root / label))
        if not found and not may_miss:
            raise DataError(f"{root / label} holds no image; a class needs at least one")
        files += found
        indices += [index] * len(found)
    _check_memory(len(files) * size * size * 3, root)
    images = np.empty((len(files), size, size, 3), dtype=np.uint8)
    spec = ImageInput(height=size, width=size, mean=[0, 0, 0], std=[1, 1, 1])
    with ThreadPoolExecutor(max_workers=min(32, os.cpu_count() or 1)) as pool:
        for place, pixels in enumerate(pool.map(lambda file: _pixels(file, spec), files)):
            images[place] = pixels
    return Examples(images, np.array(indices, dtype=np.int64))


def _image_files(folder: Path) -> Iterable[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not _hidden(Path(name)))


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in _NOT_IMAGES


def _pixels(file: Path, spec: ImageInput) -> NDArray[np.uint8]:
    try:
        return decode(file.read_bytes(), spec)
    except ImageError as failure:
        raise DataError(f"{file}: {failure}") from failure
    except OSError as failure:
        raise DataError(f"{file} cannot be read: {failure.strerror}") from failure


def _check_memory(needed: int, root: Path) -> None:
    """Refuse images that would not fit: they are kept in memory, decoded."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * total:
        raise DataError(
            f"the images under {root} take {needed / 2**30:.1f} GiB at this size, and this machine has"
            f" {total / 2**30:.1f}; choose a smaller --image-size"
        )
