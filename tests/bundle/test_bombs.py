"""Small files that ask for much are refused before they get it; files that are merely unusual are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bundle.manifest import ImageInput
from bundle.preprocessing import TooManyPixelsError, UndecodableError, decode
from tests.bundle import bombs

SPEC = ImageInput(height=8, width=8, mean=[0] * 3, std=[1] * 3)
ROOT = Path(__file__).parents[2]


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


def test_refusing_them_takes_no_memory() -> None:
    """In a process of its own, whose peak is its own: the smallest of them would take 1.6 GB."""
    code = (
        "import resource\n"
        "from tests.bundle import bombs, test_bombs\n"
        "from bundle.preprocessing import ImageError, decode\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "for data in (*bombs.TOO_LARGE.values(), *bombs.LABORIOUS.values()):\n"
        "    try: decode(data, test_bombs.SPEC)\n"
        "    except ImageError: pass\n"
        "print((peak() - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64  # MiB
