"""Random crops and flips of a whole batch in one gather, on whatever device the images lie."""

import torch
from torch import Tensor
from torch.nn import functional


def crop_and_flip(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Return each uint8 image (B, H, W, C) shifted by up to `padding` pixels and mirrored half of the time.

    What a shift uncovers is black, as in the usual CIFAR augmentation (He et al., 2016, section 4.2).
    """
    n, height, width, _ = images.shape
    device = images.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n, 1), generator=generator, device=device)

    padded = functional.pad(images, (0, 0, padding, padding, padding, padding))
    rows = draw(2 * padding + 1) + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(n, -1)
    columns = draw(2 * padding + 1) + torch.where(draw(2) == 1, columns.flip(1), columns)
    batch = torch.arange(n, device=device)
    return padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return uint8 (B, H, W, C) as float32 (B, C, H, W) in channels_last memory, (v / 255 - mean) / std."""
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)
