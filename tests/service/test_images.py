"""The service's decoder against bundle.preprocessing, to the pixel, mode by mode."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from bundle import preprocessing
from bundle.manifest import ImageInput, Resize
from service.adapters import images
from service.core.exceptions import Invalid, Refusal, TooLarge, UnknownImageFormat

RNG = np.random.default_rng(2)
NOISE = Image.fromarray(RNG.integers(0, 256, (12, 18, 3), dtype=np.uint8)).resize(
    (90, 61), Image.Resampling.BICUBIC
)
SAME_SIZE = ImageInput(height=61, width=90, mean=[0, 0, 0], std=[1, 1, 1])
SPECS = {
    "same size": SAME_SIZE,
    "stretched": ImageInput(height=32, width=32, mean=[0, 0, 0], std=[1, 1, 1]),
    "cropped": ImageInput(
        height=24,
        width=28,
        mean=[0, 0, 0],
        std=[1, 1, 1],
        resize=Resize(rule="crop", shorter_side=30, interpolation="bicubic"),
    ),
    "grey": ImageInput(height=61, width=90, colour="L", mean=[0], std=[1]),
    "blue first": ImageInput(height=61, width=90, colour="BGR", mean=[0, 0, 0], std=[1, 1, 1]),
}


def encoded(kind, mode="RGB", image=NOISE, **options):
    buffer = io.BytesIO()
    (image if image.mode == mode else image.convert(mode)).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def with_chunk(png, name, content, *, before=b"IDAT"):
    """The PNG with one more chunk."""
    chunk = len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)
    place = png.index(before) - 4
    return png[:place] + chunk + png[place:]


def interlaced(width, height):
    """An interlaced PNG of one colour: Pillow writes none."""
    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 1])
    passes = [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]
    rows = b""
    for left, top, across, down in passes:
        columns = len(range(left, width, across))
        if columns:
            rows += (b"\0" + bytes([10, 20, 30]) * columns) * len(range(top, height, down))
    start = b"\x89PNG\r\n\x1a\n\0\0\0\0IEND" + zlib.crc32(b"IEND").to_bytes(4)
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows))):
        start = with_chunk(start, name, content, before=b"IEND")
    return start


def sixteen_bit(kind):
    values = RNG.integers(0, 65536, (61, 90), dtype=np.uint16)
    return encoded(kind, "I;16", Image.fromarray(values))


FAST = {
    "JPEG 4:4:4": encoded("JPEG", subsampling=0),
    "JPEG 4:2:2": encoded("JPEG", subsampling=1),
    "JPEG 4:2:0": encoded("JPEG", subsampling=2),
    "JPEG of lowest quality": encoded("JPEG", quality=1),
    "JPEG of highest quality": encoded("JPEG", quality=100),
    "JPEG progressive": encoded("JPEG", progressive=True),
    "JPEG with restart markers": encoded("JPEG", restart_marker_blocks=3),
    "JPEG grey": encoded("JPEG", "L"),
    "JPEG grey progressive": encoded("JPEG", "L", progressive=True),
    "JPEG that keeps RGB": encoded("JPEG", keep_rgb=True),
    "JPEG with a colour profile": encoded("JPEG", icc_profile=b"profile" * 20_000),
    "JPEG with a comment": encoded("JPEG", comment=b"hello"),
    "JPEG of two pictures": encoded("MPO", save_all=True, append_images=[NOISE.rotate(180)]),
    "JPEG of one pixel": encoded("JPEG", image=NOISE.resize((1, 1))),
}
FAST_PNG = {
    "PNG": encoded("PNG"),
    "PNG in many chunks": encoded("PNG", image=NOISE.resize((900, 610)), compress_level=0),
    "PNG with a density": encoded("PNG", dpi=(72, 72)),
    "PNG of one pixel": encoded("PNG", image=NOISE.resize((1, 1))),
    **{f"PNG packed at level {level}": encoded("PNG", compress_level=level) for level in (0, 1, 9)},
}
SHARED = {
    **{f"JPEG turned by EXIF {n}": encoded("JPEG", exif=exif(n)) for n in range(1, 9)},
    "JPEG turned by XMP": encoded("JPEG", xmp=b'<x tiff:Orientation="6"/>'),
    "JPEG CMYK": encoded("JPEG", "CMYK"),
    "PNG interlaced": interlaced(90, 61),
    "PNG with a clear colour": encoded("PNG", transparency=NOISE.getpixel((0, 0))),
    "PNG turned by EXIF": encoded("PNG", exif=exif(6)),
    "PNG with a text": with_chunk(FAST_PNG["PNG"], b"tEXt", b"Comment\0hello"),
    "PNG with a text behind": with_chunk(FAST_PNG["PNG"], b"tEXt", b"Comment\0hello", before=b"IEND"),
    "PNG with bytes behind it": FAST_PNG["PNG"] + b"more",
    "PNG with a gap in its pixels": with_chunk(
        FAST_PNG["PNG in many chunks"], b"tIME", bytes([7, 234, 1, 1, 0, 0, 0])
    ),
    "PNG animated": encoded("PNG", save_all=True, append_images=[NOISE.rotate(90)]),
    "PNG grey": encoded("PNG", "L"),
    "PNG grey with alpha": encoded("PNG", "LA"),
    "PNG with alpha": encoded("PNG", "RGBA"),
    "PNG palette": encoded("PNG", "P"),
    "PNG palette with a clear colour": encoded("PNG", "P", transparency=3),
    "PNG of one bit": encoded("PNG", "1"),
    "PNG of 16 bits": sixteen_bit("PNG"),
    "TIFF of 16 bits": sixteen_bit("TIFF"),
    "TIFF CMYK": encoded("TIFF", "CMYK"),
    "WebP": encoded("WEBP"),
    "WebP with alpha": encoded("WEBP", "RGBA", lossless=True),
    "GIF": encoded("GIF"),
    "GIF animated": encoded("GIF", save_all=True, append_images=[NOISE.rotate(90)]),
    "BMP": encoded("BMP"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(
    "data", [*FAST.values(), *FAST_PNG.values(), *SHARED.values()], ids=[*FAST, *FAST_PNG, *SHARED]
)
def test_every_mode_gives_the_pixels_of_the_shared_rules(data, spec):
    expected = preprocessing.decode(data, spec)
    found = images.pixels(data, spec)
    assert found.dtype == np.uint8
    assert found.shape == (spec.height, spec.width, spec.channels)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("data", [*FAST.values(), *FAST_PNG.values()], ids=[*FAST, *FAST_PNG])
def test_plain_files_take_the_fast_path(data, monkeypatch):
    monkeypatch.delattr(images, "decode")
    images.pixels(data, SAME_SIZE)


@pytest.mark.parametrize("data", SHARED.values(), ids=SHARED)
def test_all_else_goes_the_shared_way(data):
    assert images._fast(data, preprocessing.MAX_PIXELS) is None


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"hello world", b"%PDF-1.7", bytes(100)])
def test_bytes_that_are_no_image_are_an_unknown_format(data):
    with pytest.raises(UnknownImageFormat) as refused:
        images.pixels(data, SAME_SIZE)
    assert refused.value.code == "unknown-image-format"


@pytest.mark.parametrize("data", [FAST["JPEG 4:2:0"], FAST["JPEG progressive"], FAST_PNG["PNG"]])
def test_an_image_cut_off_anywhere_is_undecodable(data):
    for end in (len(data) // 3, len(data) // 2, len(data) - 40):
        with pytest.raises(Invalid) as refused:
            images.pixels(data[:end], SAME_SIZE)
        assert refused.value.code == "undecodable-image"
        assert refused.value.detail.endswith(".")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_header_alone_decides_that_an_image_is_too_large(kind):
    data = encoded(kind)
    images.pixels(data, SAME_SIZE, max_pixels=90 * 61)
    with pytest.raises(TooLarge) as refused:
        images.pixels(data[: len(data) // 2], SAME_SIZE, max_pixels=90 * 61 - 1)
    assert refused.value.code == "too-many-pixels"
    assert "90 x 61" in refused.value.detail


# Pillow warns of damaged EXIF and of bytes it skips; that is about these inputs, not about our code.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["JPEG 4:2:0", "JPEG progressive", "JPEG grey", "JPEG that keeps RGB"])
def test_a_damaged_jpeg_is_decoded_as_the_shared_rules_do_or_refused_as_they_do(name):
    rng = np.random.default_rng(len(name))
    agreed = 0
    for _ in range(150):
        data = bytearray(FAST[name])
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(0, min(len(data), 1200))] = rng.integers(0, 256)
        try:
            expected = preprocessing.decode(bytes(data), SAME_SIZE, max_pixels=10**6)
        except preprocessing.ImageError:
            with pytest.raises(Refusal):
                images.pixels(bytes(data), SAME_SIZE, max_pixels=10**6)
        else:
            np.testing.assert_array_equal(images.pixels(bytes(data), SAME_SIZE, max_pixels=10**6), expected)
            agreed += 1
    assert agreed > 20


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_png_is_decoded_as_the_shared_rules_do_or_refused_as_they_do():
    rng = np.random.default_rng(8)
    whole, agreed = FAST_PNG["PNG"], 0
    for _ in range(300):
        if rng.random() < 0.5:  # other filters and pixels, well packed
            rows = bytearray(zlib.decompress(images._plain_png(whole)[1]))
            for _ in range(3):
                row = int(rng.integers(61)) * (1 + 3 * 90)
                rows[row + int(rng.integers(2)) * int(rng.integers(270))] = int(rng.integers(8))
            data = repacked(whole, zlib.compress(rows))
        else:
            data = bytearray(whole)
            data[int(rng.integers(8, len(data)))] = rng.integers(0, 256)
            if rng.random() < 0.7:  # with checksums that are right again, so that the damage goes deeper
                data = mended(data)
        try:
            expected = preprocessing.decode(bytes(data), SAME_SIZE, max_pixels=10**6)
        except preprocessing.ImageError:
            with pytest.raises(Refusal):
                images.pixels(bytes(data), SAME_SIZE, max_pixels=10**6)
        else:
            np.testing.assert_array_equal(images.pixels(bytes(data), SAME_SIZE, max_pixels=10**6), expected)
            agreed += 1
    assert 20 < agreed < 280


def repacked(png, packed):
    """The same header with other packed rows."""
    end = png.index(b"IHDR") + 4 + 13 + 4
    return with_chunk(png[:end] + png[-12:], b"IDAT", packed, before=b"IEND")


def mended(data):
    """The same chunks with right checksums, as far as the lengths lead."""
    place = 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4])
        if end > len(data):
            break
        data[end - 4 : end] = zlib.crc32(data[place + 4 : end - 4]).to_bytes(4)
        place = end
    return data
