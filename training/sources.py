"""From the name of a data set to its images: the one list of what `--dataset` may say."""

from collections.abc import Callable
from pathlib import Path

from training.checkpoint import Source
from training.cifar import read_cifar
from training.data import Dataset
from training.exceptions import DataError
from training.imagefolder import read_imagefolder
from training.npz import read_npz
from training.shapes import draw_shapes


def read(source: Source, seed: int) -> Dataset:
    """Read the data set; where it has no test set of its own, the seed cuts one off.

    Raises DataError for one that is unknown, missing, empty or corrupt.
    """
    try:
        reader = DATASETS[source.dataset]
    except KeyError:
        raise DataError(f"unknown data set '{source.dataset}'; known are {', '.join(DATASETS)}") from None
    return reader(source, seed)


def _cifar(source: Source, _seed: int) -> Dataset:
    return read_cifar(source.dataset, _path(source.data_dir), source.profile, source.imbalance_ratio)


def _npz(source: Source, _seed: int) -> Dataset:
    return read_npz(_path(source.train_file), _path(source.test_file))


def _imagefolder(source: Source, seed: int) -> Dataset:
    if source.image_size is None:
        raise DataError("the imagefolder data set needs --image-size")
    return read_imagefolder(_path(source.data_dir), source.image_size, seed)


def _shapes(source: Source, _seed: int) -> Dataset:
    return draw_shapes(source.profile, source.imbalance_ratio)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


DATASETS: dict[str, Callable[[Source, int], Dataset]] = {
    "cifar10-lt": _cifar,
    "cifar100-lt": _cifar,
    "npz": _npz,
    "imagefolder": _imagefolder,
    "shapes-lt": _shapes,
}
