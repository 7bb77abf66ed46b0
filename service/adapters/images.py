"""From bytes to pixels, as `bundle.preprocessing` rules it, with fast paths for the commonest files.

They take what most traffic is (8-bit baseline or progressive JPEG, grey or three channels, no EXIF or XMP
that might turn it; 8-bit RGB PNG, not interlaced, with nothing that changes its look) and give the same
pixels at half the cost; everything else, and everything that they stumble over, goes the shared way, which
alone decides what is refused.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final

import numpy as np
import simplejpeg
from PIL import Image

from bundle.preprocessing import (
    MAX_PIXELS,
    ImageError,
    TooManyPixelsError,
    UnknownFormatError,
    decode,
    fit,
    is_laborious,
)
from service.core.exceptions import Invalid, TooLarge, UnknownImageFormat

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bundle.manifest import ImageInput
    from service.core.exceptions import Refusal

# How a PNG begins, and what stands in its header after the size: 8 bits, RGB, the only compression and
# filters there are, not interlaced.
_PNG_START: Final = b"\x89PNG\r\n\x1a\n"
_PNG_HEADER: Final = _PNG_START + b"\x00\x00\x00\x0dIHDR"
_PNG_RGB: Final = b"\x08\x02\x00\x00\x00"
_PNG_IGNORED: Final = frozenset({b"IHDR", b"sRGB", b"gAMA", b"cHRM", b"sBIT", b"pHYs"})
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
    try:
        rgb = _fast(data, max_pixels)
    except ValueError:  # damaged, or stranger than it looks: the shared way says which
        rgb = None
    if rgb is not None:
        fits = rgb.shape[:2] == (spec.height, spec.width) and spec.resize.rule == "stretch"
        return rgb if fits and spec.colour != "L" else fit(Image.fromarray(rgb), spec)
    try:
        return decode(data, spec, max_pixels=max_pixels)
    except ImageError as failure:
        raise _refusal(failure) from failure


def _fast(data: bytes, max_pixels: int) -> NDArray[np.uint8] | None:
    """Return RGB pixels of a file that a fast path takes, None for any other. Raises ValueError."""
    size = _plain_jpeg(data)
    if size is not None:
        if not 0 < size[0] * size[1] <= max_pixels or is_laborious(data, "JPEG"):
            return None
        rgb: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
        return rgb
    plain = _plain_png(data)
    if plain is None:
        return None
    (height, width), packed = plain
    if not 0 < height * width <= max_pixels:
        return None
    return np.asarray(Image.frombytes("RGB", (width, height), packed, "zip", "RGB"))


def _plain_png(data: bytes) -> tuple[tuple[int, int], bytes] | None:
    """Return (height, width) and the packed rows of a PNG that the fast path may take, None for others.

    Walks all of its chunks: four bytes of length, four of name, the content, four of checksum.
    """
    if not data.startswith(_PNG_HEADER) or data[24:29] != _PNG_RGB:
        return None
    place, parts = len(_PNG_START), []
    while place + 12 <= len(data):
        name, end = data[place + 4 : place + 8], place + 12 + int.from_bytes(data[place : place + 4])
        if end > len(data) or zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            return None
        if name == b"IDAT":
            parts.append(data[place + 8 : end - 4])
        elif name == b"IEND":
            whole = end == len(data) == place + 12 and parts
            return (_png_size(data), b"".join(parts)) if whole else None
        elif parts or name not in _PNG_IGNORED:
            return None
        place = end
    return None


def _png_size(data: bytes) -> tuple[int, int]:
    return int.from_bytes(data[20:24]), int.from_bytes(data[16:20])


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
