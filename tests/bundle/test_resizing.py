"""Bringing pixels to the network's size: stretch, shorter side and crop, against Pillow and torchvision."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bundle.manifest import Resize
from bundle.preprocessing import decode
from tests.bundle.pictures import H, W, samples, saved, spec


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (10_000, 1), (1, 10_000), (3, 70), (64, 64)])
@pytest.mark.parametrize(
    "resize",
    [
        Resize(),
        *(Resize(rule="crop", shorter_side=side) for side in (12, 256)),
        Resize(interpolation="nearest"),
    ],
    ids=str,
)
def test_any_size_comes_out_as_the_networks(size: tuple[int, int], resize: Resize) -> None:
    data = saved(Image.new("RGB", size, (9, 8, 7)), "PNG")
    got = decode(data, spec(12, 10, resize=resize))
    assert (got.shape, got.dtype) == ((12, 10, 3), np.uint8)
    assert (got == [9, 8, 7]).all()


def test_stretching_is_pillows_antialiased_resize_and_leaves_the_right_size_alone() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    data = saved(noise, "PNG")
    assert (decode(data, spec(50, 70)) == np.asarray(noise)).all()
    for name, resample in (("bilinear", 2), ("bicubic", 3), ("lanczos", 1), ("nearest", 0)):
        got = decode(data, spec(20, 24, resize=Resize(interpolation=name)))
        assert (got == np.asarray(noise.resize((24, 20), Image.Resampling(resample)))).all(), name


def test_grey_input_is_pillows_luma_in_one_channel_and_bgr_is_left_to_the_graph() -> None:
    values = samples(8, 3).astype(np.uint8)
    data = saved(Image.fromarray(values), "PNG")
    grey = decode(data, spec(H, W, colour="L"))
    assert grey.shape == (H, W, 1)
    assert abs(grey[..., 0] - values @ [0.299, 0.587, 0.114]).max() <= 1
    assert (decode(data, spec(H, W, colour="BGR")) == values).all()


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_the_crop_rule_is_torchvisions_resize_and_centre_crop(interpolation: str) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="torchvision is not installed")
    rng = np.random.default_rng(4)
    for _ in range(60):
        height, width = rng.integers(20, 200, 2)
        if max(height, width) > 4 * min(height, width):
            continue
        crop = (int(rng.integers(1, 48)), int(rng.integers(1, 48)))
        side = max(crop) + int(rng.integers(0, 16))
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        theirs = v2.CenterCrop(crop)(
            v2.Resize(side, interpolation=v2.InterpolationMode(interpolation))(image)
        )
        rule = Resize(rule="crop", shorter_side=side, interpolation=interpolation)
        ours = decode(saved(image, "PNG"), spec(*crop, resize=rule))
        assert (ours == np.asarray(theirs)).all(), (height, width, crop, side)


def test_a_long_strip_is_cropped_as_if_it_had_been_resized_whole() -> None:
    rng = np.random.default_rng(4)
    for height, width in ((30, 400), (700, 20), (7, 90)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        scale = 24 / min(height, width)
        whole = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BILINEAR)
        left, top = round((whole.width - 20) / 2), round((whole.height - 16) / 2)
        expected = np.asarray(whole.crop((left, top, left + 20, top + 16))).astype(int)
        ours = decode(saved(image, "PNG"), spec(16, 20, resize=Resize(rule="crop", shorter_side=24)))
        assert abs(ours - expected).max() <= 1, (height, width)
