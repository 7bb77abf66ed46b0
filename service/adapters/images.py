"""From bytes to pixels, as `bundle.preprocessing` rules it, with a fast path for the commonest JPEGs.

The fast path takes what most traffic is (8-bit baseline or progressive JPEG, grey or three channels, no EXIF
or XMP that might turn it) and gives the same pixels at half the cost; everything else, and everything that it
stumbles over, goes the shared way, which alone decides what is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import simplejpeg
from PIL import Image

from bundle.preprocessing import (
    MAX_PIXELS,
    ImageError,
    TooManyPixelsError,
    UnknownFormatError,
    decode,
    fit,
)
from service.core.exceptions import Invalid, TooLarge, UnknownImageFormat

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bundle.manifest import ImageInput
    from service.core.exceptions import Refusal

_START: Final = b"\xff\xd8"
_SCAN: Final = 0xDA
_FRAMES: Final = frozenset({0xC0, 0xC1, 0xC2})  # Huffman-coded: baseline, extended, progressive
# Tables, comments, and applications' own segments but for the first, where EXIF and XMP stand.
_SKIPPED: Final = frozenset({0xC4, 0xDB, 0xDD, 0xFE, 0xE0, *range(0xE2, 0xF0)})


def pixels(data: bytes, spec: ImageInput, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return uint8 (height, width, channels) of the network's size, as `bundle.preprocessing.decode` does.

    Raises UnknownImageFormat, TooLarge for more than `max_pixels` in the header, or Invalid for an image that
    cannot be decoded whole.
    """
    size = _plain_jpeg(data)
    if size is not None and 0 < size[0] * size[1] <= max_pixels:
        try:
            rgb: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:  # damaged, or stranger than it looks: the shared way says which
            pass
        else:
            fits = rgb.shape[:2] == (spec.height, spec.width) and spec.resize.rule == "stretch"
            if fits and spec.colour != "L":
                return rgb
            return fit(Image.fromarray(rgb), spec)
    try:
        return decode(data, spec, max_pixels=max_pixels)
    except ImageError as failure:
        raise _refusal(failure) from failure


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG that the fast path may take, None for any other bytes.

    Walks the segments before the first scan: a marker, two bytes of length, the content.
    """
    if not data.startswith(_START):
        return None
    place, size = 2, None
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == _SCAN:
            return size
        length = int.from_bytes(data[place + 2 : place + 4])
        if marker in _FRAMES:
            frame = data[place + 4 : place + 2 + length]  # bits a sample, height, width, channels, ...
            if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3):
                return None
            size = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
        elif marker not in _SKIPPED or length < 2:
            return None
        place += 2 + length
    return None


def _refusal(failure: ImageError) -> Refusal:
    detail = str(failure)
    detail = f"{detail[:1].upper()}{detail[1:]}."
    if isinstance(failure, UnknownFormatError):
        return UnknownImageFormat("unknown-image-format", detail)
    if isinstance(failure, TooManyPixelsError):
        return TooLarge("too-many-pixels", detail)
    return Invalid("undecodable-image", detail)
