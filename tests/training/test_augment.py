"""Changes of whole batches against the plain definition, or torchvision's, one image at a time."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as reference

from training.augment import (
    OPERATIONS,
    Augmentation,
    apply,
    augment,
    crop_and_flip,
    distort,
    erase,
    normalise,
    shrink,
)


def stream(seed):
    return torch.Generator().manual_seed(seed)


def test_every_result_is_a_shift_of_its_own_image_mirrored_or_not():
    images = torch.randint(1, 256, (64, 6, 6, 3), dtype=torch.uint8, generator=stream(0))
    out = crop_and_flip(images, 2, stream(1)).numpy()
    seen = set()
    for image, result in zip(images.numpy(), out, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        choices = {
            (top, left, flip): padded[top : top + 6, left : left + 6][:, ::flip]
            for top in range(5)
            for left in range(5)
            for flip in (1, -1)
        }
        matches = [choice for choice, expected in choices.items() if np.array_equal(expected, result)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert {flip for _, _, flip in seen} == {1, -1}


def test_the_same_stream_gives_the_same_batch():
    images = torch.randint(0, 256, (8, 5, 5, 3), dtype=torch.uint8, generator=stream(0))
    assert torch.equal(crop_and_flip(images, 1, stream(4)), crop_and_flip(images, 1, stream(4)))
    assert not torch.equal(crop_and_flip(images, 1, stream(4)), crop_and_flip(images, 1, stream(5)))


def test_normalising_gives_channels_last_floats_of_the_stated_mean_and_deviation():
    images = torch.randint(0, 256, (4, 5, 5, 3), dtype=torch.uint8, generator=stream(0))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    out = normalise(images, mean, std)
    assert out.shape == (4, 3, 5, 5)
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = (images.numpy() / 255 - mean.numpy()) / std.numpy()
    np.testing.assert_allclose(out.numpy().transpose(0, 2, 3, 1), expected, atol=1e-6)


def affine(image, *, shift=(0, 0), shear=(0.0, 0.0)):
    return reference.affine(image, 0, list(shift), 1, list(shear))


def degrees(slope):
    return math.degrees(math.atan(slope))


# An operation at a signed magnitude m, on one image (3, 32, 32), as torchvision does it.
TORCHVISION = {
    "identity": lambda image, m: image,
    "shear-x": lambda image, m: affine(image, shear=(degrees(0.99 * m), 0)),
    "shear-y": lambda image, m: affine(image, shear=(0, degrees(0.99 * m))),
    "translate-x": lambda image, m: affine(image, shift=(round(32 * m), 0)),
    "translate-y": lambda image, m: affine(image, shift=(0, round(32 * m))),
    "rotate": lambda image, m: reference.rotate(image, 135 * m),
    "brightness": lambda image, m: reference.adjust_brightness(image, 1 + 0.99 * m),
    "contrast": lambda image, m: reference.adjust_contrast(image, 1 + 0.99 * m),
    "posterize": lambda image, m: reference.posterize(image, 8 - round(6 * abs(m))),
    "solarize": lambda image, m: reference.solarize(image, 256 * (1 - abs(m))),
    "autocontrast": lambda image, m: reference.autocontrast(image),
    "equalize": lambda image, m: reference.equalize(image),
    "color": lambda image, m: reference.adjust_saturation(image, 1 + 0.99 * m),
    "sharpness": lambda image, m: reference.adjust_sharpness(image, 1 + 0.99 * m),
}


def pictures(n):
    """Return smooth uint8 images (n, 32, 32, 3) that do not use all levels, and noise on half of them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:1:32j, 0:1:32j]
    slopes = rng.uniform(-60, 60, (2, n, 1, 1, 3))
    noise = rng.normal(0, 20, (n, 32, 32, 3)) * (np.arange(n) % 2)[:, None, None, None]
    values = 110 + slopes[0] * x[..., None] + slopes[1] * y[..., None] + noise
    return torch.from_numpy(values.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_does_to_a_batch_what_torchvision_does_to_each_image(name):
    magnitudes = torch.tensor([0.03, 0.11, 0.29, 0.37, 0.52, 0.74, 0.91, 0.99])
    signs = torch.tensor([1, -1, -1, 1, 1, -1, 1, -1])
    images = pictures(8)
    out = apply(images, torch.full((8,), OPERATIONS.index(name)), magnitudes, signs)
    for image, result, m in zip(images, out, magnitudes * signs, strict=True):
        expected = TORCHVISION[name](image.permute(2, 0, 1), m.item()).permute(1, 2, 0)
        # torchvision cuts fractions off, at the grey and at the blend: up to two levels
        differing = ((expected.int() - result.int()).abs() > 2).any(-1)
        # a pixel half-way between two may go either way
        assert differing.float().mean() < (0.02 if name in ("shear-x", "shear-y", "rotate") else 1e-9)


def test_operations_in_one_batch_do_not_touch_each_others_images():
    images = pictures(len(OPERATIONS))
    operation = torch.arange(len(OPERATIONS))
    magnitude, sign = torch.full((len(images),), 0.6), torch.ones(len(images), dtype=torch.int64)
    together = apply(images, operation, magnitude, sign)
    for i in range(len(images)):
        only = slice(i, i + 1)
        assert torch.equal(together[only], apply(images[only], operation[only], magnitude[only], sign[only]))


def test_a_constant_image_keeps_its_levels_under_every_table_that_stretches_them():
    images = torch.full((2, 8, 8, 3), 77, dtype=torch.uint8)
    operation = torch.tensor([OPERATIONS.index("autocontrast"), OPERATIONS.index("equalize")])
    out = apply(images, operation, torch.ones(2), torch.ones(2, dtype=torch.int64))
    assert torch.equal(out, images)


def test_distortion_uses_every_operation_and_stays_nearer_the_image_where_it_is_weak():
    images = pictures(560)
    change = [
        (distort(images, strength, stream(3)).float() - images.float()).abs().mean().item()
        for strength in (0.1, 0.5, 1.0)
    ]
    assert 0 < change[0] < change[1] < change[2]
    unchanged = (distort(images, 1.0, stream(3)) == images).flatten(1).all(1).float().mean()
    assert unchanged < 3 / len(OPERATIONS)  # the identity, and changes too small to see


def test_an_erased_square_is_the_mean_colour_and_may_stick_out():
    inputs = torch.full((400, 3, 10, 12), 5.0)
    out = erase(inputs, 4, stream(0))
    hidden = (out == 0).all(1)
    assert torch.equal(hidden, (out == 0).any(1))
    assert (out[~hidden.unsqueeze(1).expand_as(out)] == 5).all()
    areas = hidden.flatten(1).sum(1)
    assert areas.max() == 16
    assert areas.min() >= 4  # a quarter, where the centre is in a corner
    for mask in hidden:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()
    assert hidden.any(0).all()


def test_shrinking_keeps_the_mean_and_a_smooth_picture():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    inputs = (x + 2 * y).expand(2, 3, 32, 32)
    small = shrink(inputs, 24)
    assert small.shape == (2, 3, 24, 24)
    assert small.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(small.mean((2, 3)), inputs.mean((2, 3)), atol=1e-5, rtol=0)
    assert (small[0, 0].diff(dim=0) > 0).all()
    assert shrink(inputs, 32) is inputs


def test_a_batch_without_further_changes_is_a_crop_a_flip_and_nothing_else():
    images, mean, std = pictures(16), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    out = augment(images, Augmentation(), mean, std, stream(5))
    assert torch.equal(out, normalise(crop_and_flip(images, 4, stream(5)), mean, std))
    changed = augment(images, Augmentation(distortion=1.0, cutout=0.5), mean, std, stream(5))
    assert changed.shape == out.shape
    assert not torch.equal(changed, out)
