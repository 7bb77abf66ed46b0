"""Small files that ask for much are refused before they get it; files that are merely unusual are not."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from bundle.manifest import ImageInput
from bundle.preprocessing import TooManyPixelsError, UndecodableError, decode
from tests.bundle import bombs
from tests.bundle import encoders as enc

if TYPE_CHECKING:
    from collections.abc import Callable

SPEC = ImageInput(height=8, width=8, mean=[0] * 3, std=[1] * 3)
ROOT = Path(__file__).parents[2]
SIDE = 4000


@pytest.mark.parametrize("name", bombs.TOO_LARGE)
def test_what_promises_too_many_pixels_is_refused_by_its_header(name: str) -> None:
    with pytest.raises(TooManyPixelsError, match="the limit is 50000000"):
        decode(bombs.TOO_LARGE[name], SPEC)


@pytest.mark.parametrize("name", bombs.LABORIOUS)
def test_what_asks_for_the_same_work_over_and_over_is_refused(name: str) -> None:
    with pytest.raises(UndecodableError, match="more than"):
        decode(bombs.LABORIOUS[name], SPEC)


def test_as_many_scans_profiles_and_tiles_as_images_have_are_taken() -> None:
    for data in (bombs.jpeg_of_scans(10), bombs.png_of_profiles(1)):
        assert decode(data, SPEC).shape == (8, 8, 3)
    with pytest.raises(UndecodableError):  # a tile that may be, with pixels that are not there
        decode(bombs.tiff_tile(256, 256), SPEC)


def test_the_limit_is_exact() -> None:
    assert decode(bombs.png(16, 16), SPEC, max_pixels=256).shape == (8, 8, 3)
    with pytest.raises(TooManyPixelsError):
        decode(bombs.png(16, 16), SPEC, max_pixels=255)


def peak_bytes(work: str, data: bytes = b"") -> int:
    """By how much these lines, with `data` and `decode` at hand, raise the peak of a process of their own."""
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from tests.bundle import bombs, test_bombs\n"
        "from bundle.preprocessing import ImageError, decode\n"
        "data = sys.stdin.buffer.read()\n"
        # Of this program alone: rusage would begin with the peak of whoever started it.
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        f"{work}\n"
        "print((peak() - before) * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, input=data, capture_output=True, check=True)
    return int(done.stdout)


def test_refusing_them_takes_no_memory() -> None:
    """The smallest of them would take 1.6 GB."""
    work = (
        "for data in (*bombs.TOO_LARGE.values(), *bombs.LABORIOUS.values()):\n"
        "    try: decode(data, test_bombs.SPEC)\n"
        "    except ImageError: pass"
    )
    assert peak_bytes(work) < 64 << 20


def turned(kind: str) -> bytes:
    """A transparent image of 16 million pixels that is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return bytes(bombs.saved(kind, Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, 9)), lossless=True, exif=exif))


def animated() -> bytes:
    """So many pixels in a file of 140 bytes."""
    frames = [Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, alpha)) for alpha in (1, 2)]
    return bytes(bombs.saved("WEBP", frames[0], lossless=True, save_all=True, append_images=frames[1:]))


def wide(colour_type: int, channels: int, **chunks: Any) -> bytes:
    """A PNG of 16 bits a channel."""
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, colour_type, 0, 0, 0)
    packed = zlib.compress(bytes((1 + 2 * channels * SIDE) * SIDE), 1)
    parts = [(b"IHDR", header), *((name.encode(), part) for name, part in chunks.items())]
    parts += [(b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(enc.png_chunk(*part) for part in parts)


@pytest.mark.parametrize(
    "make",
    [
        animated,
        lambda: turned("WEBP"),
        lambda: turned("PNG"),
        lambda: wide(enc.RGBA, 4),
        lambda: wide(enc.RGB, 3, tRNS=bytes(6)),
        lambda: wide(enc.GREY, 1, tRNS=bytes(2)),
    ],
    ids=["animated WebP", "WebP", "PNG", "PNG of 16 bits", "with a key colour", "with a key grey"],
)
@pytest.mark.slow
def test_no_image_takes_more_than_seventeen_bytes_a_pixel(make: Callable[[], bytes]) -> None:
    """Four canvases: two that WebP's decoder keeps, what it hands over, and the image made of that."""
    taken = peak_bytes("decode(data, test_bombs.SPEC)", make())
    assert 4 < taken / SIDE**2 < 17
