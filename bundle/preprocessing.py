"""From the bytes of an image to the uint8 pixels of the network's size: the rule training and serving share.

The first bytes decide the format; the first frame; EXIF orientation applied; 16-bit channels scaled by
v // 257; palette and grey expanded; alpha composited on white; CMYK by Pillow's convert; then the manifest's
resize. Nothing here depends on a file name or a declared type.
"""

from __future__ import annotations

import io
import struct
import sys
import warnings
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bundle.manifest import ImageInput, Resize

# We read every size from the header and refuse by our own limit before a pixel is decoded;
# Pillow's own limit would only warn, and would do so about images that we have already refused.
Image.MAX_IMAGE_PIXELS = None
# About damaged metadata Pillow warns in words that differ from file to file, and Python remembers every one:
# whoever sends such files would fill the memory. What makes an image unusable is raised, not warned about.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

MAX_PIXELS: Final = 50_000_000

_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_FILTERS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_LONGEST_WHOLE: Final = 4  # sides' ratio up to which an image is resized whole before it is cropped
_BAND_PIXELS: Final = 1 << 18
_OPAQUE: Final = np.uint8(255)
_ORIENTATION: Final = 0x0112
_PHOTOMETRIC, _BITS_PER_SAMPLE, _PLANAR_CONFIGURATION = 262, 258, 284  # TIFF's tags
_TILE_WIDTH, _TILE_LENGTH = 322, 323
# What a small file can ask for over and over, and how often at most: each scan of a progressive JPEG may go
# through all of its pixels, and each colour profile of a PNG is inflated to a megabyte. Files have ten of the
# one and one of the other; a few more of the markers may stand in other data by chance.
_REPEATED: Final = {"JPEG": (b"\xff\xda", 500, "scans"), "PNG": (b"iCCP", 8, "colour profiles")}
_GREY_STEPS: Final = {"L;2": 85, "L;4": 17}  # from one grey of 2 or 4 bits to the next, on 0..255
# How 16-bit colours are read again, by what Pillow calls them: the image's mode and the stem of its raw mode.
_WIDE_MODES: Final = {
    "RGB": ("RGB", "RGB"),
    "RGBX": ("RGB", "RGBX"),
    "RGBA": ("RGBA", "RGBA"),
    "RGBa": ("RGBA", "RGBA"),
    "CMYK": ("CMYK", "CMYK"),
}
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises on bytes that are not the image they claim to be (its plugins parse with struct).
_DECODING_FAILURES: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
)


class ImageError(Exception):
    """These bytes are no image that can be taken."""


class UnknownFormatError(ImageError):
    """The first bytes name no format that is taken, or there are none."""


class TooManyPixelsError(ImageError):
    """The header promises more pixels than the limit."""


class UndecodableError(ImageError):
    """The format is known, the image cannot be decoded whole."""


def sniff(data: bytes) -> str:
    """Return the format that the first bytes name: PNG, JPEG, WEBP, GIF, BMP or TIFF.

    Raises UnknownFormatError for any other, and for no bytes at all.
    """
    if not data:
        raise UnknownFormatError("there are no bytes; send the bytes of one image")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data.startswith(b"BM"):
        return "BMP"
    raise UnknownFormatError("the first bytes name no image format; send PNG, JPEG, WebP, GIF, BMP or TIFF")


def is_laborious(data: bytes, kind: str) -> bool:
    """Whether these bytes of a format ask for much more work than their size and pixels say."""
    if kind not in _REPEATED:
        return False
    mark, most, _ = _REPEATED[kind]
    return data.count(mark) > most


def decode(data: bytes, spec: ImageInput, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return the pixels as the network's graph takes them: uint8, shape (height, width, channels).

    Channels are R, G, B whatever `spec.colour` (the graph swaps for BGR), or one for `L`.
    Raises UnknownFormatError, TooManyPixelsError or UndecodableError.
    """
    return fit(upright(data, max_pixels=max_pixels), spec)


def upright(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to an 8-bit RGB image, upright, of the size it has: every rule but the resize."""
    kind = sniff(data)
    if is_laborious(data, kind):
        _, most, what = _REPEATED[kind]
        raise UndecodableError(f"the {kind} image has more than {most} {what}; save it again")
    try:
        rgb, turn = _rgb_and_turn(data, kind, max_pixels)
    except ImageError:
        raise
    except _DECODING_FAILURES as failure:
        raise UndecodableError(f"the {kind} image cannot be decoded whole; send it again") from failure
    return rgb if turn is None else rgb.transpose(turn)


def fit(image: Image.Image, spec: ImageInput) -> NDArray[np.uint8]:
    """Resize an upright RGB image by the manifest's rule and return its pixels, (height, width, channels)."""
    image = _resized(image, spec.resize, spec.height, spec.width)
    if spec.colour == "L":
        return np.asarray(image.convert("L"))[:, :, None]
    return np.asarray(image)


def _resized(image: Image.Image, resize: Resize, height: int, width: int) -> Image.Image:
    resample = _FILTERS[resize.interpolation]
    if resize.rule == "stretch" or resize.shorter_side is None:
        return image.resize((width, height), resample)
    # torchvision's arithmetic for Resize(shorter_side) and CenterCrop.
    shorter = min(image.width, image.height)
    whole_width = int(resize.shorter_side * image.width / shorter)
    whole_height = int(resize.shorter_side * image.height / shorter)
    left, top = round((whole_width - width) / 2), round((whole_height - height) / 2)
    if max(image.width, image.height) <= _LONGEST_WHOLE * shorter:
        whole = image.resize((whole_width, whole_height), resample)
        return whole.crop((left, top, left + width, top + height))
    # A 10,000 x 1 strip must not become one of 2,560,000 x 256: only what lies under the crop is resampled.
    # That is the same up to the rounding between the two passes, which Pillow takes in the cheaper order.
    across, down = image.width / whole_width, image.height / whole_height
    # A product may round to just beyond the image, which Pillow refuses.
    right, bottom = min((left + width) * across, image.width), min((top + height) * down, image.height)
    return image.resize((width, height), resample, box=(left * across, top * down, right, bottom))


def _rgb_and_turn(data: bytes, kind: str, max_pixels: int) -> tuple[Image.Image, Image.Transpose | None]:
    """Return the 8-bit RGB image and how it is to be turned; what it was decoded from is let go of."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _check_size(image.size, max_pixels)
        _check_tiles(image, max_pixels)
        return _to_rgb(image, data, kind), _TURNS.get(_orientation(image))


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise UndecodableError("the header says the image has no pixels")
    if width * height > max_pixels:
        raise TooManyPixelsError(
            f"the image has {width} x {height} pixels, the limit is {max_pixels}: send a smaller one"
        )


def _check_tiles(image: Image.Image, max_pixels: int) -> None:
    """Hold the tiles of a TIFF to the limit too: one is decoded whole, however small the image is."""
    if isinstance(image, TiffImageFile) and _TILE_WIDTH in image.tag_v2:
        width, height = image.tag_v2[_TILE_WIDTH], image.tag_v2.get(_TILE_LENGTH, 1)
        if width * height > max_pixels:
            raise TooManyPixelsError(
                f"the image has tiles of {width} x {height} pixels, the limit is {max_pixels}: save it again"
            )


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none or the EXIF block itself is damaged."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _DECODING_FAILURES:
        return 1  # a damaged EXIF block does not make the pixels wrong


def _to_rgb(image: Image.Image, data: bytes, kind: str) -> Image.Image:
    """Bring every mode that Pillow decodes to RGB: 16 bits by v // 257, alpha on white."""
    key = image.info.get("transparency")
    step = _GREY_STEPS.get(_raw_mode(image) or "")
    if step is not None and isinstance(key, int):
        image.info["transparency"] = key * step  # Pillow spreads 2- and 4-bit greys to 0..255, not their key
    wide = _wide_grey(image) or _wide_colour(image, data)
    image.load()  # also where wide has the pixels: reads what follows them (EXIF may), and finds truncation
    image_8 = image if wide is None else wide
    if image_8.mode in ("I", "F"):
        raise UndecodableError(f"the {kind} image has 32-bit pixels; send 8 or 16 bits a channel")
    if image_8.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image_8.info:
        return _on_white(image_8)
    return image_8.convert("RGB") if image_8.mode != "RGB" else image_8.copy()


def _on_white(image: Image.Image) -> Image.Image:
    """Composite on white, some rows at a time: the steps of the whole image would stand side by side."""
    rgb = Image.new("RGB", image.size)
    step = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, step):
        rows = image.crop((0, top, image.width, min(top + step, image.height))).convert("RGBA")
        white = Image.new("RGBA", rows.size, (255, 255, 255, 255))
        rgb.paste(Image.alpha_composite(white, rows).convert("RGB"), (0, top))
    return rgb


def _wide_grey(image: Image.Image) -> Image.Image | None:
    """Return an image of 16-bit greys scaled by v // 257 (of 12-bit ones by v // 16), None for any other."""
    if not image.mode.startswith("I;16"):
        return None
    twelve_bits = _raw_mode(image) == "I;12"
    # Pillow turns white-is-zero over for fewer bits only.
    negative = isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0
    values = np.asarray(image).astype(np.uint16)
    key = image.info.get("transparency")
    if negative:
        values = (4095 if twelve_bits else 65535) - values
    grey = Image.fromarray((values // (16 if twelve_bits else 257)).astype(np.uint8))
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(_OPAQUE * (values != key)))
    return grey


def _wide_colour(image: Image.Image, data: bytes) -> Image.Image | None:
    """Return an image of 16-bit colours scaled by v // 257, None for any other.

    Of such colours Pillow keeps the high byte, and which byte that is depends on the raw mode alone: read
    again with the other byte order it yields the low one.
    """
    raw_mode = _raw_mode(image)
    if isinstance(image, TiffImageFile) and image.mode in ("RGB", "RGBA", "CMYK"):
        depths = image.tag_v2.get(_BITS_PER_SAMPLE, (8,))
        if image.tag_v2.get(_PLANAR_CONFIGURATION) == 2 and max(depths) > 8:
            raise UndecodableError("the TIFF image has 16-bit channels in planes; save them interleaved")
    if raw_mode is None or ";16" not in raw_mode:
        return None
    if raw_mode == "LA;16B":  # four bytes a pixel: read them as they are
        four = np.asarray(_reread(data, "RGBA", "RGBA"))
        return Image.fromarray(_over_257(four[:, :, 0::2], four[:, :, 1::2]), "LA")
    stem, _, order = raw_mode.partition(";16")
    if stem not in _WIDE_MODES:
        return None
    mode, raw_stem = _WIDE_MODES[stem]
    low_order = "B" if order == "L" or (order == "N" and sys.byteorder == "little") else "L"
    high = np.asarray(_reread(data, mode, f"{raw_stem};16{order}"))
    low = np.asarray(_reread(data, mode, f"{raw_stem};16{low_order}"))
    colour = Image.fromarray(_over_257(high, low), "RGBa" if stem == "RGBa" else mode)
    key = image.info.get("transparency")
    if stem == "RGB" and isinstance(key, tuple):
        opaque = np.zeros(high.shape[:2], dtype=bool)
        for channel, part in enumerate(key):  # of all at once NumPy would make three times as much
            opaque |= (high[:, :, channel] != part >> 8) | (low[:, :, channel] != part & 255)
        colour.putalpha(Image.fromarray(_OPAQUE * opaque))
    return colour


def _over_257(high: NDArray[np.uint8], low: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return (256 high + low) // 257 in uint8: of 257 high + (low - high) that is high or one less."""
    return high - (low < high)


def _raw_mode(image: Image.Image) -> str | None:
    tiles = getattr(image, "tile", None)
    if not tiles:
        return None
    args = tiles[0][3]
    raw_mode = args[0] if isinstance(args, tuple) and args else args
    return raw_mode if isinstance(raw_mode, str) else None


def _reread(data: bytes, mode: str, raw_mode: str) -> Image.Image:
    """Decode the first frame again with another raw mode."""
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    tiles = []
    for codec, extents, offset, args in image.tile:
        new = (raw_mode, *args[1:]) if isinstance(args, tuple) else raw_mode
        tiles.append(image.tile[0]._replace(codec_name=codec, extents=extents, offset=offset, args=new))
    image.tile = tiles
    image._mode = mode
    image.load()
    return image
