"""From the name of a data set to its images: the one list of what `--dataset` may say."""

from collections.abc import Callable
from pathlib import Path

from training.checkpoint import Source
from training.cifar import read_cifar
from training.data import Dataset
from training.exceptions import DataError
from training.image_files import default_workers
from training.imagefolder import read_imagefolder
from training.imagenet_lt import read_imagenet_lt
from training.inaturalist import read_inaturalist
from training.npz import read_npz
from training.shapes import draw_shapes


def read(source: Source, seed: int, *, workers: int | None = None) -> Dataset:
    """Read the data set; where it has no test set of its own, the seed cuts one off.

    `workers` processes decode images that stay in their files; None means one a core. Raises DataError for a
    data set that is unknown, missing, empty or corrupt.
    """
    try:
        reader = DATASETS[source.dataset]
    except KeyError:
        raise DataError(f"unknown data set '{source.dataset}'; known are {', '.join(DATASETS)}") from None
    return reader(source, seed, default_workers() if workers is None else workers)


def _cifar(source: Source, _seed: int, _workers: int) -> Dataset:
    return read_cifar(source.dataset, _path(source.data_dir), source.profile, source.imbalance_ratio)


def _npz(source: Source, _seed: int, _workers: int) -> Dataset:
    return read_npz(_path(source.train_file), _path(source.test_file))


def _imagefolder(source: Source, seed: int, workers: int) -> Dataset:
    return read_imagefolder(_path(source.data_dir), _size(source), seed, workers)


def _imagenet_lt(source: Source, _seed: int, workers: int) -> Dataset:
    return read_imagenet_lt(_path(source.data_dir), _size(source), workers)


def _inaturalist(source: Source, _seed: int, workers: int) -> Dataset:
    return read_inaturalist(_path(source.data_dir), _size(source), workers)


def _shapes(source: Source, _seed: int, _workers: int) -> Dataset:
    return draw_shapes(source.profile, source.imbalance_ratio)


def _size(source: Source) -> int:
    if source.image_size is None:
        raise DataError(f"the {source.dataset} data set needs --image-size")
    return source.image_size


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


DATASETS: dict[str, Callable[[Source, int, int], Dataset]] = {
    "cifar10-lt": _cifar,
    "cifar100-lt": _cifar,
    "imagenet-lt": _imagenet_lt,
    "inaturalist2018": _inaturalist,
    "npz": _npz,
    "imagefolder": _imagefolder,
    "shapes-lt": _shapes,
}

IN_FILES = frozenset({"imagefolder", "imagenet-lt", "inaturalist2018"})  # those that --image-size is for
