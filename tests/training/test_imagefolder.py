"""A person's folders: odd formats, odd sizes, few images, and files that are no images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bundle.manifest import ImageInput
from bundle.preprocessing import decode
from training import imagefolder
from training.data import Examples, split
from training.exceptions import DataError
from training.image_files import ImageFiles
from training.imagefolder import read_imagefolder


def save(path: Path, colour=(200, 30, 30), size=(20, 14), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def fill(root: Path, counts: dict[str, int]) -> Path:
    for label, count in counts.items():
        for n in range(count):
            save(root / label / f"{n:03}.png", colour=(n % 256, 60, 90))
    return root


def test_a_fifth_is_tested_and_a_tenth_held_out_of_the_whole_folder(tmp_path):
    made = read_imagefolder(fill(tmp_path, {"a": 50, "b": 13, "c": 5, "d": 3, "e": 2, "f": 1}), 8, seed=0)
    cut = split(made, 0.1, seed=0)
    assert np.bincount(made.test.labels, minlength=6).tolist() == [10, 3, 1, 1, 0, 0]
    assert np.bincount(cut.holdout.labels, minlength=6).tolist() == [5, 1, 1, 0, 0, 0]
    assert np.bincount(cut.trained.labels, minlength=6).tolist() == [35, 9, 3, 2, 2, 1]
    assert made.class_counts.tolist() == [40, 10, 4, 2, 2, 1]


@pytest.mark.parametrize("ready", [False, True])
def test_a_folder_beyond_the_budget_stays_in_its_files_with_the_same_split_and_pixels(
    tmp_path, monkeypatch, ready
):
    for part in ("train", "val", "test") if ready else (".",):
        fill(tmp_path / part, {"a": 12, "b": 5, "c": 1})
    memory = read_imagefolder(tmp_path, 8, seed=0)
    decoded_bytes = (3 if ready else 1) * 18 * 8 * 8 * 3
    monkeypatch.setattr(imagefolder, "MEMORY_BUDGET_BYTES", decoded_bytes)
    assert isinstance(read_imagefolder(tmp_path, 8, seed=0).train, Examples)
    monkeypatch.setattr(imagefolder, "MEMORY_BUDGET_BYTES", decoded_bytes - 1)
    files = read_imagefolder(tmp_path, 8, seed=0)
    assert memory.class_counts.tolist() == files.class_counts.tolist()
    for name in ("train", "test", *(["holdout"] if ready else [])):
        part = getattr(files, name)
        assert isinstance(part, ImageFiles)
        np.testing.assert_array_equal(part.in_memory().images, getattr(memory, name).images)
        np.testing.assert_array_equal(part.labels, getattr(memory, name).labels)
    assert len(split(files, 0.0, seed=0).trained) == len(split(memory, 0.0, seed=0).trained)


def test_the_seed_decides_which_images_are_tested(tmp_path):
    fill(tmp_path, {"a": 40, "b": 10})
    one, same, other = (read_imagefolder(tmp_path, 8, seed).test.images for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_folders_that_are_split_already_are_taken_as_they_are(tmp_path):
    fill(tmp_path / "train", {"a": 6, "b": 4})
    fill(tmp_path / "val", {"a": 2})
    fill(tmp_path / "test", {"a": 3, "b": 1})
    made = read_imagefolder(tmp_path, 8, seed=0)
    cut = split(made, 0.1, seed=0)
    assert [len(cut.trained), len(cut.holdout), len(made.test)] == [10, 2, 4]
    assert made.class_counts.tolist() == [8, 4]


def test_a_class_that_only_the_test_folder_knows_is_refused(tmp_path):
    fill(tmp_path / "train", {"a": 3, "b": 3})
    fill(tmp_path / "test", {"a": 1, "z": 1})
    with pytest.raises(DataError, match=r"z is a class that .*train does not have"):
        read_imagefolder(tmp_path, 8, seed=0)


def test_odd_formats_and_names_are_decoded_by_the_rules_of_serving(tmp_path):
    folder = tmp_path / "odd"
    files = [
        save(folder / "no_extension", format="WEBP", lossless=True),
        save(folder / "wrong.txt", format="PNG"),
        save(folder / "deep" / "er" / "photo.JPG", format="JPEG", exif=_turned()),
        save(folder / "big.tiff", size=(300, 7)),
        save(folder / "old.bmp"),
        save(folder / "moving.gif"),
    ]
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(folder / "clear.png")
    Image.new("CMYK", (9, 9), (10, 20, 30, 40)).save(folder / "print.jpg")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(folder / "deep.png")
    Image.new("P", (9, 9)).save(folder / "palette.png")
    files += [folder / name for name in ("clear.png", "print.jpg", "deep.png", "palette.png")]
    (folder / ".DS_Store").write_bytes(b"not an image")
    (folder / "Thumbs.db").write_bytes(b"not an image")
    fill(tmp_path, {"plain": 2})
    made = read_imagefolder(tmp_path, 16, seed=0)
    spec = ImageInput(height=16, width=16, mean=[0, 0, 0], std=[1, 1, 1])
    expected = {decode(file.read_bytes(), spec).tobytes() for file in files}
    label = made.class_labels.index("odd")
    found = np.concatenate([part.images[part.labels == label] for part in (made.train, made.test)])
    assert len(found) == len(files)
    assert {image.tobytes() for image in found} == expected


def test_what_is_no_image_is_named(tmp_path):
    fill(tmp_path, {"a": 2, "b": 2})
    bad = tmp_path / "b" / "notes.txt"
    bad.write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt: the first bytes name no image format"):
        read_imagefolder(tmp_path, 8, seed=0)
    whole = save(tmp_path / "whole.jpg").read_bytes()
    bad.unlink()
    (tmp_path / "whole.jpg").unlink()
    (tmp_path / "b" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.jpg: .*cannot be decoded whole"):
        read_imagefolder(tmp_path, 8, seed=0)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="--data-dir is needed"):
        read_imagefolder(None, 8, seed=0)
    with pytest.raises(DataError, match="there is no folder"):
        read_imagefolder(tmp_path / "nowhere", 8, seed=0)
    with pytest.raises(DataError, match="holds no folder; one for each class"):
        read_imagefolder(tmp_path, 8, seed=0)
    fill(tmp_path, {"a": 2})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no image"):
        read_imagefolder(tmp_path, 8, seed=0)


def test_a_size_that_no_bundle_could_name_is_refused(tmp_path):
    fill(tmp_path, {"a": 2, "b": 2})
    with pytest.raises(DataError, match="--image-size must be at most 4096, not 5000"):
        read_imagefolder(tmp_path, 5000, seed=0)


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif
