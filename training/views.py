"""One image file as the network sees it: as it will be served, or at random to train on. No torch.

What can be wrong with the file is one line that names it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from bundle.preprocessing import ImageError, fit, upright
from training.exceptions import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bundle.manifest import ImageInput

AREA: Final = (0.08, 1.0)  # share of the image that a random crop covers
RATIO: Final = (3 / 4, 4 / 3)  # its width over its height
_TRIES: Final = 10


def served_view(file: Path, spec: ImageInput) -> NDArray[np.uint8]:
    """Return the pixels that serving would take, (height, width, channels). Raises DataError."""
    return fit(_upright(file), spec)


def random_view(file: Path, spec: ImageInput, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return a random part of the image at the network's size. Raises DataError.

    The part covers 8 to 100 % of the area and is 3:4 to 4:3 before it is stretched (Szegedy et al., 2015;
    torchvision's RandomResizedCrop).
    """
    image = _upright(file)
    left, top, width, height = random_box(image.width, image.height, rng)
    part = image.crop((left, top, left + width, top + height))
    return np.asarray(part.resize((spec.width, spec.height), Image.Resampling.BILINEAR))


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a random part of an image.

    Where ten draws do not fit, as in a long strip, it is the largest centred part of an allowed ratio.
    """
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def _upright(file: Path) -> Image.Image:
    try:
        return upright(file.read_bytes())
    except ImageError as failure:
        raise DataError(f"{file}: {failure}") from failure
    except OSError as failure:
        raise DataError(f"{file} cannot be read: {failure.strerror}") from failure
