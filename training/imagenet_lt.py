"""ImageNet-LT (Liu et al., 2019): ImageNet's images, cut to a long tail by three list files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bundle.manifest import Resize
from training.data import Dataset, existing_folder
from training.exceptions import DataError
from training.image_files import ImageFiles, find_images, input_of

TRAIN, VAL, TEST = (f"ImageNet_LT_{part}.txt" for part in ("train", "val", "test"))
PUBLISHED_IMAGES = 115_846
NORMALISATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the usual ones of ImageNet


@dataclass(frozen=True)
class Listed:
    """What a list file says: paths below the data folder, and their labels."""

    file: Path
    names: list[str]
    labels: list[int]


def read_imagenet_lt(data_dir: Path | None, image_size: int, workers: int) -> Dataset:
    """Return the data set of the list files in `data_dir`, each line of which is a path below it and a label.

    The balanced val list, where it is there, is held out, beside the training set; the balanced test list is
    the test set. A class is called by the folder of its training images, such as n01440764, where each class
    has one of its own, else by its number. Images stay in their files. Raises DataError that names the line.
    """
    root = existing_folder(data_dir, "--data-dir")
    train, test = read_list(root / TRAIN), read_list(root / TEST)
    val = read_list(root / VAL) if (root / VAL).exists() else None
    lists = [train, test] if val is None else [train, test, val]
    n_classes = max(train.labels) + 1
    for listed in lists:
        if max(listed.labels) >= n_classes:
            raise DataError(
                f"{listed.file} has label {max(listed.labels)}, {TRAIN} none above {n_classes - 1}"
            )
    _refuse_shared(lists)
    spec = input_of(image_size, shorter_side_and_crop(image_size))

    def part(listed: Listed) -> ImageFiles:
        return find_images(root, listed.names, listed.labels, spec, workers, listed_in=listed.file.name)

    published = len(train.names) == PUBLISHED_IMAGES
    return Dataset(
        name="imagenet-lt",
        class_labels=_class_labels(train, n_classes),
        train=part(train),
        test=part(test),
        holdout=None if val is None else part(val),
        holdout_is_apart=True,
        resize=spec.resize,
        normalisation=NORMALISATION,
        note="" if published else f"{len(train.names):,} training images; published are {PUBLISHED_IMAGES:,}",
    )


def read_list(file: Path) -> Listed:
    """Read lines of a path, blanks and a label. Raises DataError that names the line at fault."""
    lines: dict[str, int] = {}
    labels = []
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as failure:
        raise DataError(f"there is no list file {file}") from failure
    except UnicodeDecodeError as failure:
        raise DataError(f"{file} is not UTF-8 text") from failure
    except OSError as failure:
        raise DataError(f"{file} cannot be read: {failure.strerror}") from failure
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        name, _, label = line.strip().rpartition(" ")
        name = name.strip()
        if not name or not (label.isascii() and label.isdigit() and len(label) <= 6):
            raise DataError(f"{where}: a path and a label from 0 are expected, not '{line.strip()[:100]}'")
        if name in lines:
            raise DataError(f"{where}: {name} stands in line {lines[name]} already")
        check_below(name, where)
        lines[name] = number
        labels.append(int(label))
    if not lines:
        raise DataError(f"{file} lists no image")
    return Listed(file, list(lines), labels)


def check_below(name: str, where: str) -> None:
    """Refuse a path that leads out of the data folder. Raises DataError."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise DataError(f"{where}: {name!r} does not lie below --data-dir")


def shorter_side_and_crop(image_size: int) -> Resize:
    """Return the customary way to look at a photograph: shorter side to 8/7 of the crop (256 for 224)."""
    return Resize(rule="crop", shorter_side=round(image_size * 8 / 7))


def _refuse_shared(lists: Sequence[Listed]) -> None:
    owner: dict[str, Path] = {}
    for listed in lists:
        for name in listed.names:
            if name in owner:
                raise DataError(f"{name} stands in {owner[name].name} and in {listed.file.name}")
            owner[name] = listed.file


def _class_labels(train: Listed, n_classes: int) -> tuple[str, ...]:
    folders: list[set[str]] = [set() for _ in range(n_classes)]
    for name, label in zip(train.names, train.labels, strict=True):
        folders[label].add(PurePosixPath(name).parent.name)
    names = ["".join(found) for found in folders if len(found) == 1]
    if len(set(names)) == n_classes and "" not in names:
        return tuple(names)
    return tuple(str(index) for index in range(n_classes))
