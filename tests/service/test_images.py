"""The service's decoder against bundle.preprocessing, to the pixel, mode by mode."""

from __future__ import annotations

import io

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
SHARED = {
    **{f"JPEG turned by EXIF {n}": encoded("JPEG", exif=exif(n)) for n in range(1, 9)},
    "JPEG turned by XMP": encoded("JPEG", xmp=b'<x tiff:Orientation="6"/>'),
    "JPEG CMYK": encoded("JPEG", "CMYK"),
    "PNG": encoded("PNG"),
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
@pytest.mark.parametrize("data", [*FAST.values(), *SHARED.values()], ids=[*FAST, *SHARED])
def test_every_mode_gives_the_pixels_of_the_shared_rules(data, spec):
    expected = preprocessing.decode(data, spec)
    found = images.pixels(data, spec)
    assert found.dtype == np.uint8
    assert found.shape == (spec.height, spec.width, spec.channels)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("data", FAST.values(), ids=FAST)
def test_plain_jpegs_take_the_fast_path(data, monkeypatch):
    monkeypatch.delattr(images, "decode")
    images.pixels(data, SAME_SIZE)


@pytest.mark.parametrize("data", SHARED.values(), ids=SHARED)
def test_all_else_goes_the_shared_way(data):
    assert images._plain_jpeg(data) is None


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"hello world", b"%PDF-1.7", bytes(100)])
def test_bytes_that_are_no_image_are_an_unknown_format(data):
    with pytest.raises(UnknownImageFormat) as refused:
        images.pixels(data, SAME_SIZE)
    assert refused.value.code == "unknown-image-format"


@pytest.mark.parametrize("data", [FAST["JPEG 4:2:0"], FAST["JPEG progressive"], SHARED["PNG"]])
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
