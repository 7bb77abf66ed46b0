"""The json files of iNaturalist 2018, on a tree made here: what they say, and every way they can be wrong."""

import json

import numpy as np
import pytest

from tests.training.photos import inaturalist
from training.data import split
from training.exceptions import DataError
from training.inaturalist import NORMALISATION, read_inaturalist


@pytest.fixture
def root(tmp_path):
    return inaturalist(tmp_path)


def read(root):
    return read_inaturalist(root, 16, 0)


def change(root, part="train", **parts):
    """Apply a function to the images, annotations or categories of one of the files."""
    file = root / f"{part}2018.json"
    content = json.loads(file.read_text())
    for name, function in parts.items():
        content[name] = function(content[name])
    file.write_text(json.dumps(content))


def test_classes_come_by_category_id_and_images_are_joined_by_theirs(root):
    made = read(root)
    assert made.class_labels == ("Species 0", "Species 1", "Species 2")
    assert made.class_counts.tolist() == [12, 6, 3]
    assert np.bincount(made.test.labels).tolist() == [2, 2, 2]
    for part in (made.train, made.test):
        assert [int(name.split("/")[-2]) for name in part.names] == part.labels.tolist()
    assert (made.normalisation, made.resize.rule) == (NORMALISATION, "crop")
    assert made.note == "21 training images of 3 classes; published are 437,513 of 8,142"


def test_a_share_of_the_training_images_is_held_out_for_there_is_no_other_set(root):
    cut = split(read(root), 0.25, seed=0)
    assert np.bincount(cut.holdout.labels, minlength=3).tolist() == [3, 2, 0]
    assert len(split(read(root), 0.0, seed=0).trained) == 21


def test_species_of_one_name_are_told_apart_by_their_ids(root):
    for part in ("train", "val"):
        change(root, part, categories=lambda all_: [{**one, "name": 5} for one in all_])
    assert read(root).class_labels == ("5 (0)", "5 (7)", "5 (14)")


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"images": lambda x: x[:-1]}, "train2018.json: an annotation names image 20, which is not there"),
        ({"images": lambda x: [*x, x[0]]}, "two images have the id 0"),
        ({"images": lambda x: [{**x[0], "id": "a"}]}, r"images\.0\.id: Input should be a valid integer"),
        ({"images": lambda x: [{"id": 1}]}, r"images\.0\.file_name: Field required"),
        ({"images": lambda x: [{**x[0], "file_name": "../a.jpg"}, *x[1:]]}, "does not lie below --data-dir"),
        ({"images": lambda x: [{**x[0], "file_name": "a.jpg"}, *x[1:]]}, "1 of 21 images are not there"),
        ({"images": lambda x: None}, "images: Input should be a valid array"),
        ({"annotations": lambda x: x[1:]}, "image 20 has no annotation"),
        ({"annotations": lambda x: [*x, x[0]]}, "image 20 has two annotations"),
        ({"annotations": lambda x: [{**x[0], "category_id": 3}]}, "names category 3, which is not there"),
        (
            {"annotations": lambda x: [{**y, "category_id": 0} for y in x]},
            "class 'Species 1' has no training",
        ),
        ({"categories": lambda x: [*x, x[0]]}, "two categories have the id 14"),
        ({"categories": lambda x: [*x, {"id": 99, "name": "Z"}]}, "name different categories"),
    ],
)
def test_a_wrong_entry_is_named(root, parts, reason):
    change(root, **parts)
    with pytest.raises(DataError, match=reason) as refusal:
        read(root)
    assert "\n" not in str(refusal.value)


def test_a_category_without_an_image_is_named(root):
    for part in ("train", "val"):
        change(root, part, categories=lambda x: [*x, {"id": 99, "name": "Nemo"}])
    with pytest.raises(DataError, match="class 'Nemo' has no training image"):
        read(root)


def test_missing_and_broken_files_are_named(root):
    with pytest.raises(DataError, match="--data-dir is needed"):
        read(None)
    (root / "val2018.json").write_text('{"images": [')
    with pytest.raises(DataError, match=r"val2018\.json: Invalid JSON: EOF while parsing"):
        read(root)
    (root / "val2018.json").write_text("[]")
    with pytest.raises(DataError, match=r"val2018\.json: Input should be an object"):
        read(root)
    (root / "val2018.json").unlink()
    with pytest.raises(DataError, match=r"there is no file .*val2018\.json"):
        read(root)
