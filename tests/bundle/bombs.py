"""Small files that ask for much: pixels, tiles, frames, scans. Each is a whole file of its format."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image

from tests.bundle import encoders as enc

WIDE, HIGH = 60_000, 40_000  # 2.4 billion pixels
WEBP_SIDE = 16_383  # the largest that the format knows


def saved(kind: str, image: Image.Image | None = None, **options: Any) -> bytearray:
    """A file of a small grey image, to be changed."""
    buffer = io.BytesIO()
    (image or Image.new("RGB", (16, 16), (90, 90, 90))).save(buffer, kind, **options)
    return bytearray(buffer.getvalue())


def png(width: int = WIDE, height: int = HIGH, *, frames: int = 1) -> bytes:
    """A PNG that promises this size, with checksums that hold; with more frames it is animated."""
    data = saved("PNG", save_all=True, append_images=frames_of(frames)) if frames > 1 else saved("PNG")
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def jpeg(width: int = WIDE, height: int = HIGH) -> bytes:
    data = saved("JPEG")
    frame = data.index(b"\xff\xc0") + 5
    data[frame : frame + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def gif(width: int = WIDE, height: int = HIGH, *, frames: int = 1) -> bytes:
    data = saved("GIF", save_all=True, append_images=frames_of(frames)) if frames > 1 else saved("GIF")
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def gif_of_a_large_frame() -> bytes:
    """A screen of one pixel, and a first frame far beyond it."""
    data = bytearray(gif(1, 1))
    frame = data.index(b"\x2c", 13) + 5
    data[frame : frame + 4] = struct.pack("<HH", WIDE, HIGH)
    return bytes(data)


def webp(side: int = WEBP_SIDE) -> bytes:
    """A lossless WebP: 14 bits of width and of height follow its signature."""
    data = saved("WEBP", lossless=True)
    place = data.index(b"VP8L") + 9
    kept = int.from_bytes(data[place : place + 4], "little") >> 28
    data[place : place + 4] = (side - 1 | (side - 1) << 14 | kept << 28).to_bytes(4, "little")
    return bytes(data)


def webp_animated(side: int = WEBP_SIDE + 1) -> bytes:
    data = saved("WEBP", save_all=True, append_images=frames_of(2))
    canvas = data.index(b"VP8X") + 12
    data[canvas : canvas + 6] = (side - 1).to_bytes(3, "little") * 2
    return bytes(data)


def bmp(width: int = WIDE, height: int = HIGH) -> bytes:
    data = saved("BMP")
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def tiff(width: int = WIDE, height: int = HIGH) -> bytes:
    data = saved("TIFF")
    for tag, value in ((256, width), (257, height)):
        place = data.index(struct.pack("<H", tag), int.from_bytes(data[4:8], "little"))
        data[place + 2 : place + 12] = struct.pack("<HII", 4, 1, value)
    return bytes(data)


def tiff_tile(width: int, height: int) -> bytes:
    """A TIFF of one pixel in a tile of this size, of which nearly nothing is there."""
    tile = zlib.compress(bytes(1000))
    tags = [(256, 1), (257, 1), (258, 8), (259, 8), (262, 1), (277, 1)]
    tags += [(322, width), (323, height), (324, 8), (325, len(tile))]
    place = 8 + len(tile) + len(tile) % 2
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", place) + tile.ljust(place - 8, b"\0")
    return head + struct.pack("<H", len(tags)) + entries + bytes(4)


def jpeg_of_scans(scans: int, width: int = 16, height: int = 16) -> bytes:
    """A progressive JPEG, then scans that each go through all of its blocks and change none."""
    whole = saved("JPEG", progressive=True)
    frame = whole.index(b"\xff\xc2") + 5
    whole[frame : frame + 4] = struct.pack(">HH", height, width)
    first = whole.index(b"\xff\xda")
    # A Huffman table of one code: "0" for a run of 2^14 blocks and as many more as the next 14 bits say.
    table = b"\xff\xc4" + struct.pack(">H", 21) + b"\x10\1\1" + bytes(14) + b"\xe0\0"
    blocks = 4 * -(-width // 16) * -(-height // 16)
    bits = ("0" + "1" * 14) * -(-blocks // 32_767)
    packed = int(bits.ljust(-(-len(bits) // 8) * 8, "1"), 2).to_bytes(-(-len(bits) // 8))
    scan = b"\xff\xda" + struct.pack(">H", 8) + b"\1\1\0\1\5\0" + packed.replace(b"\xff", b"\xff\0")
    return bytes(whole[:first]) + table + scan * scans + b"\xff\xd9"


def png_of_profiles(profiles: int) -> bytes:
    """A PNG with colour profiles that are a megabyte each once inflated."""
    data = saved("PNG")
    profile = enc.png_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(1_000_000), 9))
    place = data.index(b"IDAT") - 4
    return bytes(data[:place]) + profile * profiles + bytes(data[place:])


def frames_of(frames: int) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), (number * 40 % 256, 0, 0)) for number in range(1, frames)]


TOO_LARGE = {
    "PNG": png(),
    "PNG animated": png(frames=3),
    "JPEG": jpeg(),
    "GIF": gif(),
    "GIF animated": gif(frames=3),
    "GIF of a large frame": gif_of_a_large_frame(),
    "WebP": webp(),
    "WebP animated": webp_animated(),
    "BMP": bmp(),
    "BMP upside down": bmp(height=-HIGH),
    "TIFF": tiff(),
    "TIFF of a large tile": tiff_tile(40_000, 40_000),
}
"""Refused for their pixels, by name."""

LABORIOUS = {
    "JPEG of many scans": jpeg_of_scans(501, 4000, 4000),
    "PNG of many profiles": png_of_profiles(9),
}
"""Refused for what else they ask for."""
