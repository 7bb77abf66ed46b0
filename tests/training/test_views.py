"""Random views are torchvision's random-resized crops; served views are what serving decodes."""

import numpy as np
import pytest
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional

from bundle.manifest import ImageInput, Resize
from bundle.preprocessing import decode
from tests.training.photos import photo
from training.exceptions import DataError
from training.views import random_box, random_view, served_view

CROP = Resize(rule="crop", shorter_side=18)


def spec(resize=CROP) -> ImageInput:
    return ImageInput(height=16, width=16, resize=resize, mean=[0, 0, 0], std=[1, 1, 1])


def test_a_served_view_is_what_serving_decodes(tmp_path):
    file = photo(tmp_path / "a.jpg", size=(50, 31))
    for resize in (Resize(), CROP):
        expected = decode(file.read_bytes(), spec(resize=resize))
        np.testing.assert_array_equal(served_view(file, spec(resize=resize)), expected)


def test_a_random_view_is_the_resized_crop_of_its_box(tmp_path):
    file = photo(tmp_path / "a.jpg", size=(50, 31))
    for seed in range(50):
        left, top, width, height = random_box(50, 31, np.random.default_rng(seed))
        with Image.open(file) as image:
            plain = np.asarray(functional.resized_crop(image, top, left, height, width, [16, 16]))
        view = random_view(file, spec(), np.random.default_rng(seed))
        np.testing.assert_array_equal(view, plain)


def test_boxes_are_spread_as_torchvisions_are():
    """Means of area and of log ratio over 4,000 draws each, within 5 standard errors of their difference."""
    rng = np.random.default_rng(0)
    ours = np.array([random_box(100, 75, rng)[2:] for _ in range(4_000)], dtype=float)
    image = Image.new("RGB", (100, 75))
    draw = torchvision.transforms.RandomResizedCrop.get_params
    theirs = np.array([draw(image, [0.08, 1.0], [3 / 4, 4 / 3])[:1:-1] for _ in range(4_000)], dtype=float)
    for quantity in (lambda wh: wh[:, 0] * wh[:, 1], lambda wh: np.log(wh[:, 0] / wh[:, 1])):
        a, b = quantity(ours), quantity(theirs)
        assert abs(a.mean() - b.mean()) < 5 * np.hypot(a.std(), b.std()) / np.sqrt(4_000)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1000, 2), (2, 1000), (3, 3)])
def test_a_box_lies_inside_the_image_whatever_its_shape(width, height):
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top, w, h = random_box(width, height, rng)
        assert 0 <= left < left + w <= width
        assert 0 <= top < top + h <= height


def test_a_strip_gets_the_largest_part_of_an_allowed_ratio_from_its_middle():
    assert random_box(1000, 3, np.random.default_rng(0)) == (498, 0, 4, 3)
    assert random_box(3, 1000, np.random.default_rng(0)) == (0, 498, 3, 4)


def test_a_file_that_is_missing_or_no_image_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg cannot be read: No such file"):
        served_view(tmp_path / "gone.jpg", spec())
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(DataError, match=r"empty\.jpg: there are no bytes"):
        random_view(tmp_path / "empty.jpg", spec(), np.random.default_rng(0))
