"""Pictures of random pixels as files, and the inputs they are brought to."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from bundle.manifest import ImageInput

if TYPE_CHECKING:
    from numpy.typing import NDArray


H, W = 9, 13


def samples(depth: int, channels: int, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, 2**depth, (H, W, channels))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def spec(height: int, width: int, **changes: Any) -> ImageInput:
    channels = 1 if changes.get("colour") == "L" else 3
    return ImageInput(height=height, width=width, mean=[0] * channels, std=[1] * channels, **changes)
