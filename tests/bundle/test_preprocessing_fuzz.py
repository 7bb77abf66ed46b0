"""Hostile bytes: whatever is done to an image, it is decoded to its promised shape or refused."""

from __future__ import annotations

import io
import struct
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bundle.manifest import ImageInput, Resize
from bundle.preprocessing import ImageError, decode, sniff
from tests.bundle import encoders as enc

pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")

SPEC = ImageInput(height=8, width=6, mean=[0] * 3, std=[1] * 3, resize=Resize(rule="crop", shorter_side=9))
BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF0000WEBP", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
LIMIT = 100_000  # pixels, so that a header that lies is not a slow test


@cache
def seeds() -> tuple[bytes, ...]:
    """Small images of every format, mode and container that decoding treats apart."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6

    def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        return buffer.getvalue()

    more = {"save_all": True, "append_images": [image.rotate(90)]}
    wide = rng.integers(0, 65536, (12, 11, 4)).astype(np.uint16)
    key = (b"tRNS", struct.pack(">HHH", 1, 2, 3))
    palette = [(b"PLTE", bytes(range(12))), (b"tRNS", b"\0\1")]
    return (
        *(saved(image, kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP", "TIFF")),
        *(saved(image, kind, **more) for kind in ("PNG", "WEBP", "GIF", "TIFF", "MPO")),
        saved(image, "JPEG", progressive=True),
        saved(image.convert("CMYK"), "JPEG"),
        *(saved(image.convert(mode), "BMP") for mode in ("RGB", "RGBA", "P", "1")),
        *(saved(image, "TIFF", compression=kind) for kind in ("tiff_lzw", "jpeg", "packbits")),
        saved(image.convert("1"), "TIFF", compression="group4"),
        saved(image, "TIFF", big_tiff=True),
        enc.png(wide, enc.RGBA, 16),
        enc.png(wide[..., :3], enc.RGB, 16, interlaced=True, before=[key]),
        enc.png(wide[..., :2], enc.GREY_ALPHA, 16),
        enc.png(wide[..., 0], enc.GREY, 16),
        enc.png(wide[..., 0] % 4, enc.GREY, 2, before=[(b"tRNS", b"\0\1")]),
        enc.png(wide[..., 0] % 4, enc.PALETTE, 2, before=palette),
        *(enc.tiff(wide, 2, order, extra_samples=1, deflated=order == "<", orientation=7) for order in "<>"),
        enc.tiff(wide[..., :1], 0),
        enc.tiff(wide[..., :3], 2, planes_apart=True),
    )


def with_right_checksums(data: bytes) -> bytes:
    """Write a PNG's checksums anew, so that a change gets past them."""
    mended, position = bytearray(data[:8]), 8
    while position + 8 <= len(data):
        length = min(int.from_bytes(data[position : position + 4], "big"), max(0, len(data) - position - 12))
        body = data[position + 4 : position + 8 + length]
        mended += enc.png_chunk(body[:4], body[4:])
        position += 12 + length
    return bytes(mended)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(seeds())))
    for _ in range(draw(st.integers(1, 5))):
        # Half of all changes fall among the first bytes, where sizes and kinds stand.
        reach = min(len(data), draw(st.sampled_from([64, len(data)]))) - 1
        position = draw(st.integers(0, max(0, reach)))
        words = st.sampled_from(
            [b"\0", b"\xff", b"\x7f", b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\1"]
        )
        new = draw(st.one_of(words, st.binary(max_size=6)))
        data[position : position + draw(st.integers(0, 8))] = new
    data = data[: draw(st.sampled_from([len(data), len(data) // 2]))]
    is_png = data.startswith(b"\x89PNG\r\n\x1a\n")
    return with_right_checksums(bytes(data)) if is_png and draw(st.booleans()) else bytes(data)


def decoded_or_refused(data: bytes) -> None:
    try:
        pixels = decode(data, SPEC, max_pixels=LIMIT)
    except ImageError as refused:
        assert str(refused)
    else:
        assert (pixels.shape, pixels.dtype) == ((8, 6, 3), np.uint8)


def test_the_seeds_themselves_are_decoded_but_for_the_refused_planes() -> None:
    for data in seeds()[:-1]:
        assert decode(data, SPEC).shape == (8, 6, 3)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_changed_bytes_are_decoded_or_refused_and_nothing_else(data: bytes) -> None:
    decoded_or_refused(data)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(BEGINNINGS), st.binary(max_size=300))
def test_random_bytes_after_a_known_beginning_are_refused(beginning: bytes, rest: bytes) -> None:
    decoded_or_refused(beginning + rest)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=64))
def test_the_format_is_told_from_any_bytes_or_refused(data: bytes) -> None:
    try:
        assert sniff(data) in {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"}
    except ImageError as refused:
        assert str(refused)
