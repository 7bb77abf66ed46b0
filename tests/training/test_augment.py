"""Crops and flips against the plain definition, one image at a time."""

import numpy as np
import torch

from training.augment import crop_and_flip, normalise


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
