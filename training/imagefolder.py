"""A person's own images, one folder for each class, brought to one size by the rules that serving uses."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from bundle.manifest import ImageInput, Resize
from training.data import Dataset, Part, existing_folder, rounded_share
from training.exceptions import DataError
from training.image_files import MEMORY_BUDGET_BYTES, ImageFiles, find_images, input_of

TEST_SHARE = 0.2
_NOT_IMAGES = {"thumbs.db", "desktop.ini"}  # what file managers leave behind, beside dot files


def read_imagefolder(data_dir: Path | None, image_size: int, seed: int, workers: int = 0) -> Dataset:
    """Return the images under `data_dir`, brought to (image_size, image_size) each.

    Either DIR/CLASS/... , where a fifth of each class (rounded half up, none below 3 images, at least one
    left) is taken for testing by the seed; or DIR/train/CLASS/... with DIR/test and DIR/val beside it, where
    val is the held-out set. Every file must be an image but those whose names begin with a dot.

    Images that take up to 1 GiB when decoded are kept in memory; more stay in their files, which `workers`
    processes decode when they are needed. Raises DataError that names the folder or the file.
    """
    root = existing_folder(data_dir, "--data-dir")
    spec = input_of(image_size, Resize())
    if (root / "train").is_dir() and ((root / "test").is_dir() or (root / "val").is_dir()):
        return _ready_split(root, spec, workers)
    labels = _class_folders(root)
    files = _find(root, root, labels, spec, workers)
    held = np.zeros(len(files), dtype=bool)
    counts = np.bincount(files.labels, minlength=len(labels))
    rng = np.random.default_rng([seed, 0])
    for index, count in enumerate(counts):
        positions = rng.permutation(np.flatnonzero(files.labels == index))
        held[positions[: rounded_share(int(count), TEST_SHARE) if count >= 3 else 0]] = True
    whole = _kept([files])[0]
    return Dataset(
        name=root.name,
        class_labels=tuple(labels),
        train=whole.take(np.flatnonzero(~held)),
        test=whole.take(np.flatnonzero(held)),
        holdout_base=counts,
    )


def _ready_split(root: Path, spec: ImageInput, workers: int) -> Dataset:
    labels = _class_folders(root / "train")
    train = _find(root, root / "train", labels, spec, workers)
    found = {}
    for name in ("val", "test"):
        folder = root / name
        if folder.is_dir():
            for stranger in set(_class_folders(folder)) - set(labels):
                raise DataError(f"{folder / stranger} is a class that {root / 'train'} does not have")
            found[name] = _find(root, folder, labels, spec, workers, may_miss=True)
    parts = dict(zip(("train", *found), _kept([train, *found.values()]), strict=True))
    nothing = parts["train"].take(np.empty(0, dtype=np.int64))
    return Dataset(
        name=root.name,
        class_labels=tuple(labels),
        train=parts["train"],
        test=parts.get("test", nothing),
        holdout=parts.get("val"),
    )


def _kept(parts: Sequence[ImageFiles]) -> list[Part]:
    """Return the parts in memory if together they fit the budget, else as they are."""
    if sum(part.decoded_bytes for part in parts) > MEMORY_BUDGET_BYTES:
        return list(parts)
    return [part.in_memory() for part in parts]


def _class_folders(root: Path) -> list[str]:
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not _hidden(entry))
    if not names:
        raise DataError(f"{root} holds no folder; one for each class is needed")
    for name in names:
        if not name.isprintable():  # a name that is no text could stand in no manifest
            raise DataError(f"{root}: the folder name {name!r} is not printable text")
    return names


def _find(
    root: Path, folder: Path, labels: Iterable[str], spec: ImageInput, workers: int, *, may_miss: bool = False
) -> ImageFiles:
    """Find every image of every class, in the order of the names."""
    names, indices = [], []
    for index, label in enumerate(labels):
        found = sorted(_image_files(folder / label))
        if not found and not may_miss:
            raise DataError(f"{folder / label} holds no image; a class needs at least one")
        names += [str(file.relative_to(root)) for file in found]
        indices += [index] * len(found)
    return find_images(root, names, indices, spec, workers, listed_in=str(folder))


def _image_files(folder: Path) -> Iterable[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not _hidden(Path(name)))


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in _NOT_IMAGES
