"""Hostile bytes by the service's decoder: the picture of the shared rule, or its refusal, nothing else."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from bundle import preprocessing
from bundle.manifest import ImageInput
from service.adapters import images
from service.core.exceptions import Invalid, TooLarge, UnknownImageFormat
from tests.bundle import bombs
from tests.bundle import encoders as enc
from tests.bundle.test_preprocessing_fuzz import mutated, seeds, with_right_checksums

pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\\.")

SPEC = ImageInput(height=8, width=8, mean=[0] * 3, std=[1] * 3)
LIMIT = 100_000
REFUSAL = {
    preprocessing.UnknownFormatError: UnknownImageFormat,
    preprocessing.TooManyPixelsError: TooLarge,
    preprocessing.UndecodableError: Invalid,
}
RNG = np.random.default_rng(1)
PICTURE = Image.fromarray(RNG.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize((20, 24))


def saved(kind, **options):
    buffer = io.BytesIO()
    PICTURE.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of(filters, *, rows=24, level=9, split=None):
    """A PNG the fast path may take, with these filters, numbers of rows and chunks."""
    raw = b"".join(bytes([filters[row % len(filters)]]) + RNG.bytes(60) for row in range(rows))
    packed = zlib.compress(raw, level)
    parts = [packed] if split is None else [packed[:split], packed[split:]]
    header = (20).to_bytes(4) + (24).to_bytes(4) + bytes([8, 2, 0, 0, 0])
    chunks = [(b"IHDR", header), *((b"IDAT", part) for part in parts), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(enc.png_chunk(*chunk) for chunk in chunks)


PLAIN = (
    saved("PNG"),
    saved("PNG", compress_level=0),
    png_of([0, 1, 2, 3, 4]),
    png_of([4, 3], split=100),
    png_of([9]),
    png_of([0], rows=23),
    png_of([0], rows=40),
    *(saved("JPEG", subsampling=kind) for kind in (0, 1, 2)),
    saved("JPEG", progressive=True),
    saved("JPEG", keep_rgb=True),
    saved("JPEG", restart_marker_blocks=1),
    saved("JPEG", optimize=True, quality=3),
)
"""What the fast paths take, or nearly."""


@st.composite
def touched(draw):
    """A plain file with a few bytes that are others, most of them deep inside: often still a picture."""
    data = bytearray(draw(st.sampled_from(PLAIN)))
    is_png = data.startswith(b"\x89PNG")
    for _ in range(draw(st.integers(0, 3))):
        first = draw(st.sampled_from([2, 33 if is_png else 160, len(data) // 2]))
        data[draw(st.integers(first, len(data) - 1))] = draw(st.integers(0, 255))
    if is_png and draw(st.integers(0, 3)):
        return with_right_checksums(bytes(data))
    return bytes(data)


@st.composite
def repacked(draw):
    """A PNG whose packing is right, of rows that need not be: other filters, too many bytes or too few."""
    filters = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    rows, level = draw(st.sampled_from([24, 24, 24, 23, 25, 0])), draw(st.integers(0, 9))
    return png_of(filters, rows=rows, level=level, split=draw(st.sampled_from([None, 0, 1, 7, 200])))


def outcome(decode, data):
    """The pixels, or the name of the refusal in the service's words."""
    try:
        return decode(data, SPEC, max_pixels=LIMIT)
    except preprocessing.ImageError as failure:
        return REFUSAL[type(failure)], str(failure)[1:]
    except (UnknownImageFormat, TooLarge, Invalid) as failure:
        return type(failure), failure.detail[1:-1]


def compare(data):
    """Both ways must agree; return whether it was a picture."""
    shared, service = outcome(preprocessing.decode, data), outcome(images.pixels, data)
    if isinstance(shared, tuple) or isinstance(service, tuple):
        assert shared == service
        return False
    np.testing.assert_array_equal(shared, service)
    return True


def test_the_files_that_are_changed_are_decoded_by_the_fast_paths_unless_they_are_odd():
    taken = [images._fast(data, LIMIT) is not None for data in PLAIN if compare(data)]
    assert len(taken) >= 9
    assert taken.count(False) <= 2


CHANGED = st.one_of(touched(), touched(), repacked(), mutated())


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@example(bombs.jpeg_of_scans(501))
@example(bombs.png_of_profiles(9))
@given(CHANGED)
def test_a_changed_file_is_the_same_picture_or_refused_in_the_same_words(data):
    compare(data)


def test_every_kind_of_file_is_the_same_picture_by_both():
    assert sum(compare(data) for data in seeds()) == len(seeds()) - 1
