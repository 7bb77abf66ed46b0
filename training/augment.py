"""Random changes of a whole batch at once, in fixed shapes, on whatever device the images lie."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image besides its mirror image. Lengths are shares of the image's side."""

    crop_padding: float = 1 / 8  # 4 pixels at 32
    distortion: float = 0.0  # strength of `distort`; 0 leaves it out
    cutout: float = 0.0  # side of the square that `erase` hides; 0 leaves it out


def augment(
    images: Tensor, settings: Augmentation, mean: Tensor, std: Tensor, generator: torch.Generator
) -> Tensor:
    """Return uint8 images (B, S, S, 3) changed at random and normalised, (B, 3, S, S), ready to train on."""
    side = images.shape[1]
    pixels = crop_and_flip(images, math.ceil(settings.crop_padding * side), generator)
    if settings.distortion:
        pixels = distort(pixels, settings.distortion, generator)
    inputs = normalise(pixels, mean, std)
    return erase(inputs, round(settings.cutout * side), generator) if settings.cutout else inputs


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


OPERATIONS = (
    "identity",
    "shear-x",
    "shear-y",
    "translate-x",
    "translate-y",
    "rotate",
    "brightness",
    "contrast",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
    "color",
    "sharpness",
)


def distort(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Return each uint8 image (B, H, W, 3) changed by one operation, drawn with its magnitude.

    TrivialAugment (Mueller and Hutter, 2021) with its 14 operations; at strength 1 the magnitudes reach as
    far as its wide space on CIFAR, at less they stop at that share of it. What a move uncovers is black.
    """
    n, device = len(images), images.device
    operation = torch.randint(len(OPERATIONS), (n,), generator=generator, device=device)
    magnitude = strength * torch.rand(n, generator=generator, device=device)
    sign = 1 - 2 * torch.randint(2, (n,), generator=generator, device=device)
    return apply(images, operation, magnitude, sign)


def apply(images: Tensor, operation: Tensor, magnitude: Tensor, sign: Tensor) -> Tensor:
    """Return image i of uint8 (B, H, W, 3) after OPERATIONS[operation[i]], magnitude (B,) in 0..1, sign +-1.

    Every operation is a move of pixels, a new level for each old one, or a blend with a duller image; all
    three are computed for the whole batch, so that no shape depends on what was drawn.
    """
    images = _move(images, operation, sign * magnitude)
    levels = _levels(images, operation, magnitude, sign)
    flat = images.flatten(1, 2).long().transpose(1, 2)
    images = levels.gather(2, flat).transpose(1, 2).contiguous().reshape(images.shape)
    return _blend(images, operation, 1 + 0.99 * sign * magnitude)


def erase(inputs: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Return normalised images (B, C, H, W) with a square of `side` pixels set to 0, the mean colour.

    Its centre is anywhere in the image, so that a part of it may lie outside (DeVries and Taylor, 2017).
    """
    n, _, height, width = inputs.shape

    def span(length: int) -> Tensor:
        start = torch.randint(length, (n, 1), generator=generator, device=inputs.device) - side // 2
        place = torch.arange(length, device=inputs.device)
        return (place >= start) & (place < start + side)

    hidden = span(height)[:, :, None] & span(width)[:, None, :]
    return inputs.clone().masked_fill_(hidden[:, None], 0)  # the copy keeps the memory format


def shrink(inputs: Tensor, side: int) -> Tensor:
    """Return a batch (B, C, S, S) at `side` pixels, each the weighted mean of those it covers."""
    if side == inputs.shape[-1]:
        return inputs
    small = functional.interpolate(inputs, size=(side, side), mode="bilinear", antialias=True)
    return small.contiguous(memory_format=torch.channels_last)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return uint8 (B, H, W, C) as float32 (B, C, H, W) in channels_last memory, (v / 255 - mean) / std."""
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def _move(images: Tensor, operation: Tensor, amount: Tensor) -> Tensor:
    """Shear, shift or turn about the centre by the nearest pixel; `amount` (B,) in -1..1."""
    n, height, width, _ = images.shape
    device = images.device

    def only(name: str, value: Tensor) -> Tensor:
        return torch.where(operation == OPERATIONS.index(name), value, 0.0)[:, None, None]

    y = (torch.arange(height, device=device) - (height - 1) / 2)[None, :, None]
    x = (torch.arange(width, device=device) - (width - 1) / 2)[None, None, :]
    angle = only("rotate", math.radians(135) * amount)
    from_x = angle.cos() * x - angle.sin() * y
    from_y = angle.sin() * x + angle.cos() * y
    from_x = from_x + only("shear-x", 0.99 * amount) * y - only("translate-x", width * amount)
    from_y = from_y + only("shear-y", 0.99 * amount) * x - only("translate-y", height * amount)
    column = (from_x + (width - 1) / 2).round().long()
    row = (from_y + (height - 1) / 2).round().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    batch = torch.arange(n, device=device)[:, None, None]
    moved = images[batch, row.clamp(0, height - 1), column.clamp(0, width - 1)]
    return moved * inside[..., None]


def _levels(images: Tensor, operation: Tensor, magnitude: Tensor, sign: Tensor) -> Tensor:
    """Return what each level of each channel becomes, uint8 (B, 3, 256)."""
    old = torch.arange(256, device=images.device).float()
    n_pixels = images.shape[1] * images.shape[2]
    counts = torch.zeros(len(images), 3, 256, dtype=torch.int64, device=images.device)
    flat = images.flatten(1, 2).transpose(1, 2).long()
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    lowest, highest = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    mean = _grey(images).mean((1, 2))[:, None, None]
    magnitude, sign = magnitude[:, None, None], sign[:, None, None]
    factor = 1 + 0.99 * sign * magnitude
    bits = 2 ** (6 * magnitude).round()
    stretch = 255 / (highest - lowest).clamp(min=1)
    step = (n_pixels - counts.gather(2, highest)) // 255
    below = counts.cumsum(2) - counts
    equalized = torch.where(step > 0, (below + step // 2) // step.clamp(min=1), old)
    new = {
        "brightness": factor * old,
        "contrast": mean + factor * (old - mean),
        "posterize": (old / bits).floor() * bits,
        "solarize": torch.where(old >= 256 * (1 - magnitude), 255 - old, old),
        "autocontrast": torch.where(highest > lowest, (old - lowest) * stretch, old),
        "equalize": equalized,
    }
    levels = old.expand(len(images), 3, 256)
    for name, table in new.items():
        levels = torch.where((operation == OPERATIONS.index(name))[:, None, None], table, levels)
    return levels.clamp(0, 255).to(torch.uint8)


def _blend(images: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """Move images away from (factor > 1) or towards (factor < 1) their grey or their blurred version."""
    values = images.float()
    kernel = torch.full((3, 1, 3, 3), 1 / 13, device=images.device)
    kernel[:, :, 1, 1] = 5 / 13
    blurred = values.clone()
    inner = functional.conv2d(values.permute(0, 3, 1, 2), kernel, groups=3)
    blurred[:, 1:-1, 1:-1] = inner.permute(0, 2, 3, 1)
    chosen = operation[:, None, None, None]
    dull = torch.where(chosen == OPERATIONS.index("color"), _grey(images)[..., None], values)
    dull = torch.where(chosen == OPERATIONS.index("sharpness"), blurred, dull)
    blended = dull + factor[:, None, None, None] * (values - dull)
    return blended.round().clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Return ITU-R 601 luma of (B, H, W, 3), float32 (B, H, W)."""
    red, green, blue = images.float().unbind(3)
    return 0.299 * red + 0.587 * green + 0.114 * blue
