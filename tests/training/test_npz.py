"""Archives made elsewhere: what is read, and what is refused in one sentence."""

import os
from pathlib import Path

import numpy as np
import pytest

from training.exceptions import DataError
from training.npz import read_npz

IMAGES = np.zeros((5, 4, 4, 3), np.uint8)
LABELS = np.array([0, 0, 1, 1, 2])


def archive(path: Path, **arrays) -> Path:
    np.savez(path, **{"images": IMAGES, "labels": LABELS, **arrays})
    return path


def test_names_are_taken_where_they_are_and_numbers_where_not(tmp_path):
    test = archive(tmp_path / "test.npz")
    named = archive(tmp_path / "named.npz", names=["a", "b", "c"])
    plain = archive(tmp_path / "plain.npz", labels=LABELS.astype(np.uint8))
    assert read_npz(named, test).class_labels == ("a", "b", "c")
    made = read_npz(plain, test)
    assert made.class_labels == ("0", "1", "2")
    assert made.train.labels.dtype == np.int64
    assert "plain.npz, 5 images" in made.note


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"images": IMAGES.astype(np.float32)}, "must be uint8"),
        ({"images": IMAGES[..., :1]}, "must be uint8"),
        ({"images": np.zeros((5, 4, 6, 3), np.uint8)}, "must be square"),
        ({"labels": LABELS[:3]}, "must be 5 integers"),
        ({"labels": LABELS.astype(float)}, "must be 5 integers"),
        ({"labels": np.array([0, 1, 2, 3, -1])}, "between 0 and 3"),
        ({"names": ["a", "b"]}, "between 0 and 1"),
        ({"names": ["a", "b", "b"]}, "must be different"),
        ({"names": ["a", "b", "c", "d"]}, "class 'd' has no training image"),
        ({"names": np.array(["a", None, "c"], dtype=object)}, "plain arrays"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, reason):
    test = archive(tmp_path / "test.npz")
    with pytest.raises(DataError, match=reason):
        read_npz(archive(tmp_path / "train.npz", **arrays), test)


def test_files_that_are_none_are_refused_by_name(tmp_path):
    whole = archive(tmp_path / "whole.npz")
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:200])
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", pictures=IMAGES)
    np.save(tmp_path / "one.npy", IMAGES)
    for name, reason in {
        "cut.npz": "not a whole npz",
        "text.npz": "not a whole npz",
        "one.npy": "not a whole npz",
        "other.npz": "has no array images",
        "none.npz": "there is no file",
    }.items():
        with pytest.raises(DataError, match=reason) as refusal:
            read_npz(tmp_path / name, whole)
        assert name in str(refusal.value)
        assert "\n" not in str(refusal.value)
    with pytest.raises(DataError, match="needs --train-file and --test-file"):
        read_npz(whole, None)


@pytest.mark.data
@pytest.mark.skipif("TARE_DATA_DIR" not in os.environ, reason="TARE_DATA_DIR is not set")
def test_the_prepared_cifar10_lt_says_how_many_images_it_lacks():
    folder = Path(os.environ["TARE_DATA_DIR"]) / "cifar-10-lt"
    made = read_npz(folder / "train_lt100.npz", folder / "test.npz")
    assert made.class_counts.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 82, 50]
    assert "12,405 images" in made.note
    assert "9,980" in made.note
