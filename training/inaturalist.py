"""iNaturalist 2018: photographs of 8,142 species as people met them, by the competition's json files."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from training.data import Dataset, existing_folder
from training.exceptions import DataError
from training.image_files import ImageFiles, find_images, input_of
from training.imagenet_lt import check_below, shorter_side_and_crop

TRAIN, VAL = "train2018.json", "val2018.json"
PUBLISHED_IMAGES, PUBLISHED_CLASSES = 437_513, 8_142
NORMALISATION = (0.466, 0.471, 0.380), (0.195, 0.194, 0.192)


class _Image(TypedDict):
    id: int
    file_name: str


class _Annotation(TypedDict):
    image_id: int
    category_id: int


class _Category(TypedDict):
    id: int
    name: str | int  # the first release had numbers for names


class _Content(TypedDict):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def read_inaturalist(data_dir: Path | None, image_size: int, workers: int) -> Dataset:
    """Return the data set of train2018.json and val2018.json in `data_dir`; images lie below it.

    The published validation images are the test set, as in the literature: the test set's labels were never
    published. Classes come in the order of the category ids. Images stay in their files. Raises DataError
    that names the entry at fault.
    """
    root = existing_folder(data_dir, "--data-dir")
    train, val = _read(root / TRAIN), _read(root / VAL)
    categories = _categories(train, root / TRAIN)
    if _categories(val, root / VAL) != categories:
        raise DataError(f"{TRAIN} and {VAL} in {root} name different categories")
    index_of = {category: index for index, category in enumerate(sorted(categories))}
    spec = input_of(image_size, shorter_side_and_crop(image_size))

    def part(content: _Content, file: Path) -> ImageFiles:
        names, labels = _labelled(content, index_of, file)
        return find_images(root, names, labels, spec, workers, listed_in=file.name)

    trained = part(train, root / TRAIN)
    note = ""
    if (len(trained), len(categories)) != (PUBLISHED_IMAGES, PUBLISHED_CLASSES):
        note = (
            f"{len(trained):,} training images of {len(categories):,} classes; published are"
            f" {PUBLISHED_IMAGES:,} of {PUBLISHED_CLASSES:,}"
        )
    return Dataset(
        name="inaturalist2018",
        class_labels=_class_labels(categories),
        train=trained,
        test=part(val, root / VAL),
        resize=spec.resize,
        normalisation=NORMALISATION,
        note=note,
    )


def _read(file: Path) -> _Content:
    try:
        return TypeAdapter(_Content).validate_json(file.read_bytes())
    except FileNotFoundError as failure:
        raise DataError(f"there is no file {file}") from failure
    except OSError as failure:
        raise DataError(f"{file} cannot be read: {failure.strerror}") from failure
    except ValidationError as failure:
        raise DataError(f"{file}: {_first_fault(failure)}") from failure


def _first_fault(failure: ValidationError) -> str:
    fault: Any = failure.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    return f"{place}: {fault['msg']}" if place else str(fault["msg"])


def _categories(content: _Content, file: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for category in content["categories"]:
        if category["id"] in names:
            raise DataError(f"{file}: two categories have the id {category['id']}")
        names[category["id"]] = str(category["name"])
    return names


def _class_labels(categories: dict[int, str]) -> tuple[str, ...]:
    """Return the names by index; where two are alike, all carry their id."""
    names = [categories[category] for category in sorted(categories)]
    if len(set(names)) == len(names):
        return tuple(names)
    return tuple(f"{categories[category]} ({category})" for category in sorted(categories))


def _labelled(content: _Content, index_of: dict[int, int], file: Path) -> tuple[list[str], list[int]]:
    """Join images and annotations by the image's id, whatever their order."""
    category_of: dict[int, int] = {}
    for annotation in content["annotations"]:
        image, category = annotation["image_id"], annotation["category_id"]
        if category not in index_of:
            raise DataError(
                f"{file}: an annotation of image {image} names category {category}, which is not there"
            )
        if image in category_of:
            raise DataError(f"{file}: image {image} has two annotations")
        category_of[image] = category
    names: list[str] = []
    labels: list[int] = []
    seen: set[int] = set()
    for entry in content["images"]:
        image, name = entry["id"], entry["file_name"]
        if image in seen:
            raise DataError(f"{file}: two images have the id {image}")
        if image not in category_of:
            raise DataError(f"{file}: image {image} has no annotation")
        check_below(name, str(file))
        seen.add(image)
        names.append(name)
        labels.append(index_of[category_of[image]])
    for image in category_of.keys() - seen:
        raise DataError(f"{file}: an annotation names image {image}, which is not there")
    return names, labels
