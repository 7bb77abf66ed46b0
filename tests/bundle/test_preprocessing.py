"""Every rule for bringing an image to pixels, mode by mode, against the rule written out in NumPy."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from bundle.preprocessing import (
    ImageError,
    TooManyPixelsError,
    UndecodableError,
    UnknownFormatError,
    decode,
    sniff,
    upright,
)
from tests.bundle import encoders as enc
from tests.bundle.pictures import H, W, samples, saved, spec

if TYPE_CHECKING:
    from numpy.typing import NDArray


pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")  # as the module itself asks


def grey_of(values: NDArray[Any]) -> NDArray[Any]:
    return np.repeat(values.reshape(H, W, 1), 3, axis=2)


def on_white(colours: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """Alpha 0..255 on white, in exact arithmetic."""
    share = alpha.reshape(H, W, 1) / 255
    return np.asarray(colours * share + 255 * (1 - share))


def pixels(data: bytes) -> NDArray[np.int64]:
    return np.asarray(upright(data)).astype(np.int64)


interlacing = pytest.mark.parametrize("interlaced", [False, True], ids=["plain", "interlaced"])


@interlacing
def test_16_bit_png_is_scaled_by_257_in_every_colour_type(interlaced: bool) -> None:
    def png(values: NDArray[Any], colour_type: int) -> NDArray[Any]:
        return pixels(enc.png(values, colour_type, 16, interlaced=interlaced))

    grey, rgb, grey_alpha, rgba = (samples(16, channels) for channels in (1, 3, 2, 4))
    eighth = rgba // 257
    assert (png(grey, enc.GREY) == grey_of(grey // 257)).all()
    assert (png(rgb, enc.RGB) == rgb // 257).all()
    assert abs(png(rgba, enc.RGBA) - on_white(eighth[..., :3], eighth[..., 3])).max() <= 1
    expected = on_white(grey_of(grey_alpha[..., 0] // 257), grey_alpha[..., 1] // 257)
    assert abs(png(grey_alpha, enc.GREY_ALPHA) - expected).max() <= 1


def test_40000_of_65535_is_155_not_255() -> None:
    assert set(pixels(enc.png(np.full((H, W), 40000), enc.GREY, 16)).flat) == {155}


@interlacing
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_grey_png_of_few_bits_is_spread_over_0_to_255(depth: int, interlaced: bool) -> None:
    values = samples(depth, 1)
    expected = grey_of(values * 255 // (2**depth - 1))
    assert (pixels(enc.png(values, enc.GREY, depth, interlaced=interlaced)) == expected).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("key", [0, 1])
def test_the_transparent_grey_of_a_png_becomes_white_and_no_other(depth: int, key: int) -> None:
    values = samples(depth, 1)
    values[0, 0] = key
    eighth = values // 257 if depth == 16 else values * 255 // (2**depth - 1)
    data = enc.png(values, enc.GREY, depth, before=[(b"tRNS", struct.pack(">H", key))])
    assert (pixels(data) == grey_of(np.where(values == key, 255, eighth))).all()


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_a_png_becomes_white_and_no_near_one(depth: int) -> None:
    values = samples(depth, 3)
    values[0, 0], values[1, 1] = (1, 2, 3), (1, 2, 4)
    expected = values // 257 if depth == 16 else values.copy()
    expected[0, 0] = 255
    data = enc.png(values, enc.RGB, depth, before=[(b"tRNS", struct.pack(">HHH", 1, 2, 3))])
    assert (pixels(data) == expected).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_palette_is_expanded_and_its_transparency_put_on_white(depth: int) -> None:
    rng = np.random.default_rng(1)
    values = samples(depth, 1)[..., 0]
    palette = rng.integers(0, 256, (2**depth, 3)).astype(np.uint8)
    alpha = rng.integers(0, 256, 2**depth).astype(np.uint8)
    plain = [(b"PLTE", palette.tobytes())]
    assert (pixels(enc.png(values, enc.PALETTE, depth, before=plain)) == palette[values]).all()
    some = enc.png(values, enc.PALETTE, depth, before=[*plain, (b"tRNS", alpha.tobytes())])
    assert abs(pixels(some) - on_white(palette[values], alpha[values])).max() <= 1
    one = np.full(2**depth, 255, dtype=np.uint8)
    one[1] = 0
    single = enc.png(values, enc.PALETTE, depth, before=[*plain, (b"tRNS", one.tobytes())])
    assert (pixels(single) == on_white(palette[values], one[values])).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composited_on_white(kind: str) -> None:
    values = samples(8, 4).astype(np.uint8)
    values[0, 0], values[0, 1] = (10, 20, 30, 0), (10, 20, 30, 255)
    data = saved(
        Image.fromarray(values), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})
    )
    got = pixels(data)
    assert abs(got - on_white(values[..., :3], values[..., 3])).max() <= 1
    assert got[0, 0].tolist() == [255, 255, 255]
    assert got[0, 1].tolist() == [10, 20, 30]


orders = pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
compressions = pytest.mark.parametrize("deflated", [False, True], ids=["raw", "deflated"])


@orders
@compressions
@pytest.mark.parametrize("rows_a_strip", [None, 4])
def test_16_bit_tiff_colours_are_scaled_by_257(order: str, deflated: bool, rows_a_strip: int | None) -> None:
    values = samples(16, 4).astype(np.uint16)
    eighth = (values // 257).astype(np.int64)

    def tiff(part: NDArray[Any], photometric: int, extra: int | None = None) -> NDArray[Any]:
        return pixels(
            enc.tiff(
                part, photometric, order, deflated=deflated, rows_a_strip=rows_a_strip, extra_samples=extra
            )
        )

    assert (tiff(values[..., :3], 2) == eighth[..., :3]).all()
    assert (tiff(values, 2, extra=0) == eighth[..., :3]).all()
    assert abs(tiff(values, 2, extra=2) - on_white(eighth[..., :3], eighth[..., 3])).max() <= 1
    premultiplied = values.copy()
    premultiplied[..., :3] = values[..., :3] * (values[..., 3:] / 65535)
    assert abs(tiff(premultiplied, 2, extra=1) - on_white(eighth[..., :3], eighth[..., 3])).max() <= 2
    cmyk = Image.fromarray(eighth.astype(np.uint8), "CMYK").convert("RGB")
    assert (tiff(values, 5) == np.asarray(cmyk)).all()
    assert (tiff(values[..., :1], 1) == grey_of(eighth[..., 0])).all()


def test_a_tiff_whose_zero_is_white_is_turned_over() -> None:
    eight, sixteen = samples(8, 1).astype(np.uint8), samples(16, 1).astype(np.uint16)
    assert (pixels(enc.tiff(eight, 0)) == grey_of(255 - eight)).all()
    assert (pixels(enc.tiff(sixteen, 0)) == grey_of((65535 - sixteen.astype(int)) // 257)).all()


@orders
def test_16_bit_tiff_planes_are_refused_rather_than_read_wrongly(order: str) -> None:
    values = samples(16, 3).astype(np.uint16)
    for deflated in (False, True):
        with pytest.raises(UndecodableError, match="planes"):
            upright(enc.tiff(values, 2, order, planes_apart=True, deflated=deflated))
    eighth = samples(8, 3).astype(np.uint8)
    assert (pixels(enc.tiff(eighth, 2, order, planes_apart=True)) == eighth).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_refused_by_name(mode: str) -> None:
    with pytest.raises(UndecodableError, match="32-bit"):
        upright(saved(Image.new(mode, (W, H)), "TIFF"))


def test_cmyk_is_converted_by_pillow_whether_adobe_turned_it_over_or_not() -> None:
    cmyk = Image.fromarray(np.kron(samples(8, 4)[:1, :2], np.ones((16, 16, 1))).astype(np.uint8), "CMYK")
    data = saved(cmyk, "JPEG", quality=95, subsampling=0)
    assert (pixels(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()
    assert abs(pixels(data) - np.asarray(cmyk.convert("RGB"))).mean() < 4
    assert (pixels(saved(cmyk, "TIFF")) == np.asarray(cmyk.convert("RGB"))).all()


def test_a_grey_image_and_a_1_bit_image_of_every_format_give_three_equal_channels() -> None:
    grey = Image.fromarray(samples(8, 1)[..., 0].astype(np.uint8))
    for kind in ("PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP"):
        got = pixels(saved(grey, kind, **({"lossless": True} if kind == "WEBP" else {})))
        if kind != "JPEG":
            assert (got == np.asarray(grey)[..., None]).all(), kind
        assert (got == got[..., :1]).all(), kind
    for kind in ("PNG", "BMP", "TIFF", "GIF"):
        assert set(pixels(saved(grey.convert("1"), kind)).flat) == {0, 255}, kind


ARROW = np.array(
    [[[200, 0, 0], [0, 200, 0], [0, 0, 200]], [[0, 0, 0], [90, 90, 90], [255, 255, 255]]], np.uint8
)
# What each orientation asks a viewer to do, from the EXIF table: row 0 and column 0 of the stored pixels are
# at (top, left), (top, right), (bottom, right), (bottom, left), (left, top), (right, top), (right, bottom),
# (left, bottom) of the upright picture.
UPRIGHT = {
    1: ARROW,
    2: ARROW[:, ::-1],
    3: ARROW[::-1, ::-1],
    4: ARROW[::-1],
    5: ARROW.transpose(1, 0, 2),
    6: ARROW.transpose(1, 0, 2)[:, ::-1],
    7: ARROW.transpose(1, 0, 2)[::-1, ::-1],
    8: ARROW.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright_by_its_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(ARROW)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        got = pixels(saved(stored, kind, exif=exif, **options))
        assert (got == UPRIGHT[orientation]).all(), kind
    large = Image.fromarray(np.kron(ARROW, np.ones((16, 16, 1), np.uint8)))
    jpeg = pixels(saved(large, "JPEG", exif=exif, quality=95, subsampling=0))[8::16, 8::16]
    assert abs(jpeg - UPRIGHT[orientation]).max() < 12
    assert (pixels(enc.tiff(ARROW, 2, orientation=orientation)) == UPRIGHT[orientation]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_images_are_turned_once(orientation: int) -> None:
    wide, grey = ARROW.astype(np.uint16) * 257, ARROW[..., :1].astype(np.uint16) * 257
    for order in "<>":
        for deflated in (False, True):
            options = {"orientation": orientation, "deflated": deflated}
            assert (pixels(enc.tiff(wide, 2, order, **options)) == UPRIGHT[orientation]).all()
            assert (pixels(enc.tiff(grey, 1, order, **options)) == UPRIGHT[orientation][..., :1]).all()
    exif = Image.Exif()
    exif[0x0112] = orientation
    chunk = (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    for place in ("before", "after"):
        png = enc.png(wide, enc.RGB, 16, **{place: [chunk]})
        assert (pixels(png) == UPRIGHT[orientation]).all(), place


def test_a_damaged_or_senseless_orientation_leaves_the_pixels_alone() -> None:
    exif = Image.Exif()
    for value in (0, 9, 65535):
        exif[0x0112] = value
        assert (pixels(saved(Image.fromarray(ARROW), "PNG", exif=exif)) == ARROW).all()
    for block in (b"", b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"):
        assert (pixels(enc.png(ARROW, enc.RGB, before=[(b"eXIf", block)])) == ARROW).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (W, H), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert (pixels(data) == [255, 0, 0]).all()


def test_of_a_photo_with_two_pictures_in_it_the_first_is_taken() -> None:
    first, second = Image.new("RGB", (16, 16), (200, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 200))
    data = saved(first, "MPO", save_all=True, append_images=[second])
    assert sniff(data) == "JPEG"
    assert abs(pixels(data) - [200, 0, 0]).max() < 4


def test_the_first_bytes_alone_name_the_format() -> None:
    image = Image.new("RGB", (W, H))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        assert sniff(saved(image, kind)) == kind
    assert sniff(saved(image, "TIFF", big_tiff=True)) == "TIFF"
    assert pixels(saved(image, "TIFF", big_tiff=True)).shape == (H, W, 3)


@pytest.mark.parametrize("kind", ["ICO", "PPM", "TGA", "JPEG2000", "PCX", "SGI", "PDF", "AVIF"])
def test_other_formats_are_not_taken_though_pillow_knows_them(kind: str) -> None:
    if kind not in Image.SAVE and not (Image.init() and kind in Image.SAVE):
        pytest.skip(f"this Pillow does not write {kind}")
    with pytest.raises(UnknownFormatError):
        decode(saved(Image.new("RGB", (16, 16)), kind), spec(4, 4))


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"<svg xmlns=''/>", b"not an image at all", b"\x89PNG", b"\xff\xd8"]
)
def test_bytes_of_no_format_are_refused(data: bytes) -> None:
    with pytest.raises(UnknownFormatError):
        decode(data, spec(4, 4))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_image_is_refused_and_never_half_a_picture(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    data = saved(noise, kind)
    for share in (0.05, 0.3, 0.6, 0.9):
        with pytest.raises(ImageError):
            decode(data[: int(len(data) * share)], spec(4, 4))


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, enc.RGB, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + enc.png_chunk(b"IHDR", header)
        + enc.png_chunk(b"IDAT", zlib.compress(b"\0" * 99))
    )


def test_more_pixels_than_the_limit_are_refused_from_the_header() -> None:
    data = saved(Image.new("1", (1000, 1000)), "PNG")
    assert decode(data, spec(4, 4), max_pixels=1_000_000).shape == (4, 4, 3)
    with pytest.raises(TooManyPixelsError, match="1000 x 1000 pixels, the limit is 999999"):
        decode(data, spec(4, 4), max_pixels=999_999)
    for size in ((2**31 - 1, 2**31 - 1), (50_000, 50_000), (2**31 - 1, 1)):
        with pytest.raises(TooManyPixelsError):
            decode(png_header(*size), spec(4, 4))


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError):
        decode(png_header(0, 5), spec(4, 4))
