"""The list files of ImageNet-LT, on a tree made here: what they say, and every way they can be wrong."""

import numpy as np
import pytest

from bundle.preprocessing import decode
from tests.training.photos import WNIDS, imagenet_lt
from training.calibrate import groups_of
from training.data import split
from training.exceptions import DataError
from training.image_files import input_of
from training.imagenet_lt import NORMALISATION, read_imagenet_lt, shorter_side_and_crop


@pytest.fixture
def root(tmp_path):
    return imagenet_lt(tmp_path)


def read(root):
    return read_imagenet_lt(root, 16, 0)


def test_the_lists_give_counts_labels_and_a_balanced_test_set(root):
    made = read(root)
    assert made.class_labels == WNIDS[:3]
    assert made.class_counts.tolist() == [12, 6, 3]
    assert np.bincount(made.test.labels).tolist() == [2, 2, 2]
    assert made.normalisation == NORMALISATION
    assert made.note == "21 training images; published are 115,846"
    assert [group.name for group in groups_of(made.class_counts)] == ["few"]


def test_each_image_keeps_its_label(root):
    made = read(root)
    for part in (made.train, made.test, made.holdout):
        assert [int(name.split("_")[-2]) for name in part.names] == part.labels.tolist()


@pytest.mark.parametrize("share", [0.1, 0.0])
def test_the_val_list_is_held_out_beside_the_training_set_whatever_the_share(root, share):
    made = read(root)
    cut = split(made, share, seed=0)
    assert np.bincount(cut.trained.labels).tolist() == [12, 6, 3]
    assert np.bincount(cut.holdout.labels).tolist() == [2, 2, 2]


def test_without_a_val_list_a_share_of_the_training_images_is_held_out(root):
    (root / "ImageNet_LT_val.txt").unlink()
    cut = split(read(root), 0.25, seed=0)
    assert np.bincount(cut.holdout.labels, minlength=3).tolist() == [3, 2, 0]


def test_images_are_cut_from_the_middle_after_the_shorter_side_is_brought_to_256(root):
    assert shorter_side_and_crop(224).shorter_side == 256
    made = read_imagenet_lt(root, 224, 0)
    (first, *_), *_ = made.test.blocks(4)
    data = (root / made.test.names[0]).read_bytes()
    np.testing.assert_array_equal(first, decode(data, input_of(224, made.resize)))
    assert (made.resize.rule, made.resize.shorter_side) == ("crop", 256)


def test_classes_whose_folders_do_not_tell_them_apart_are_called_by_number(root):
    text = (root / "ImageNet_LT_train.txt").read_text()
    first, *rest = text.splitlines()
    (root / "ImageNet_LT_train.txt").write_text("\n".join([first.replace(" 0", " 1"), *rest]))
    assert read(root).class_labels == ("0", "1", "2")


def test_blank_lines_and_windows_line_ends_are_no_fault(root):
    file = root / "ImageNet_LT_train.txt"
    file.write_text("\r\n" + file.read_text().replace("\n", "\r\n") + "\r\n", newline="")
    assert len(read(root).train) == 21


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("train/a.JPEG", "line 22: a path and a label from 0 are expected, not 'train/a.JPEG'"),
        ("train/a.JPEG cat", "a path and a label from 0 are expected"),
        ("train/a.JPEG -1", "a path and a label from 0 are expected"),
        ("train/a.JPEG 1.0", "a path and a label from 0 are expected"),
        ("7", "a path and a label from 0 are expected, not '7'"),
        (f"train/{WNIDS[0]}/train_0_00000.JPEG 0", "stands in line 1 already"),
        (f"val/{WNIDS[0]}/test_0_00000.JPEG 0", "in ImageNet_LT_train.txt and in ImageNet_LT_test.txt"),
        ("/etc/passwd 0", "'/etc/passwd' does not lie below --data-dir"),
        ("train/../../a.JPEG 0", "does not lie below --data-dir"),
        ("train/gone.JPEG 0", "ImageNet_LT_train.txt: 1 of 22 images are not there, the first is /"),
        (
            f"train/{WNIDS[0]}/val_0_00000.JPEG 4",
            "label 3 has no training image|class '3' has no training image",
        ),
    ],
)
def test_a_wrong_line_is_named(root, line, reason):
    (root / "ImageNet_LT_val.txt").unlink()
    with (root / "ImageNet_LT_train.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=reason) as refusal:
        read(root)
    assert "\n" not in str(refusal.value)


def test_a_test_label_that_no_training_image_has_is_refused(root):
    with (root / "ImageNet_LT_test.txt").open("a") as file:
        file.write("val/a.JPEG 3\n")
    with pytest.raises(
        DataError, match=r"ImageNet_LT_test\.txt has label 3, ImageNet_LT_train\.txt none above 2"
    ):
        read(root)


def test_missing_empty_and_unreadable_lists_are_named(root):
    with pytest.raises(DataError, match="--data-dir is needed"):
        read(None)
    with pytest.raises(DataError, match="there is no folder"):
        read(root / "nowhere")
    (root / "ImageNet_LT_test.txt").write_text("\n")
    with pytest.raises(DataError, match=r"ImageNet_LT_test\.txt lists no image"):
        read(root)
    (root / "ImageNet_LT_test.txt").write_bytes(b"\xff\xfe 0\n")
    with pytest.raises(DataError, match=r"ImageNet_LT_test\.txt is not UTF-8 text"):
        read(root)
    (root / "ImageNet_LT_test.txt").unlink()
    with pytest.raises(DataError, match=r"there is no list file .*ImageNet_LT_test\.txt"):
        read(root)
    (root / "ImageNet_LT_test.txt").mkdir()
    with pytest.raises(DataError, match=r"ImageNet_LT_test\.txt cannot be read: Is a directory"):
        read(root)
