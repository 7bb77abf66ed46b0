"""Images in files are decoded as for serving, by any number of workers, a few at a time."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bundle.manifest import Resize
from bundle.preprocessing import decode as decode_for_serving
from tests.training.photos import photo
from training import image_files
from training.data import Dataset, channel_statistics
from training.exceptions import DataError
from training.image_files import Piece, decode, find_images, input_of

SPEC = input_of(12, Resize(rule="crop", shorter_side=14))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    names = [f"{n % 3}/{n:03}.jpg" for n in range(70)]
    for n, name in enumerate(names):
        photo(root / name, seed=n, size=(20 + n % 9, 16 + n % 5))
    return find_images(root, names, [n % 3 for n in range(70)], SPEC, 0, listed_in="the test")


def test_blocks_are_the_images_that_serving_would_decode(files):
    blocks = list(files.blocks(32))
    assert [len(block) for block in blocks] == [32, 32, 6]
    expected = [decode_for_serving((files.root / name).read_bytes(), SPEC) for name in files.names]
    np.testing.assert_array_equal(np.concatenate(blocks), expected)


def test_in_memory_taken_and_joined_images_keep_their_labels_and_order(files):
    index = np.array([5, 3, 60])
    whole, part = files.in_memory(), files.take(index).joined(files.take(np.array([1])))
    np.testing.assert_array_equal(part.in_memory().images, whole.images[[5, 3, 60, 1]])
    np.testing.assert_array_equal(part.labels, whole.labels[[5, 3, 60, 1]])
    assert len(files.take(np.array([], dtype=np.int64)).in_memory()) == 0


def test_statistics_are_the_same_from_files_and_from_memory(files):
    whole = files.in_memory()
    assert channel_statistics(files.blocks(7)) == channel_statistics([whole.images])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # on two cores
def test_any_number_of_workers_gives_the_same_pixels(files):
    pieces = [Piece(files.paths([n, 69 - n]), [(3, n), (4, n)]) for n in range(20)]
    alone, one, three = (
        [piece.numpy() for piece in decode(pieces, SPEC, workers=workers)] for workers in (0, 1, 3)
    )
    np.testing.assert_array_equal(alone, one)
    np.testing.assert_array_equal(alone, three)


@pytest.mark.slow
def test_decoding_leaves_torchs_global_generator_alone(files):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(decode([Piece(files.paths([0]))], SPEC, workers=1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_corrupt_image_is_one_line_that_names_it(files, tmp_path, workers):
    whole = photo(tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    pieces = [Piece(files.paths(range(4))), Piece([tmp_path / "cut.jpg"])]
    decoded = decode(pieces, SPEC, workers=workers)
    next(decoded)
    with pytest.raises(DataError) as refusal:
        next(decoded)
    assert re.fullmatch(
        r"\S+/cut\.jpg: the JPEG image cannot be decoded whole; send it again", str(refusal.value)
    )


@pytest.mark.slow
def test_a_worker_that_dies_is_one_line(files, monkeypatch):
    monkeypatch.setattr(image_files, "_leave_signals_to_the_parent", _die)
    with pytest.raises(
        DataError, match=r"decoding stopped: DataLoader worker .*; try fewer --workers"
    ) as refusal:
        list(decode([Piece(files.paths([0]))] * 9, SPEC, workers=1))
    assert "\n" not in str(refusal.value)


def _die(_worker: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_decode_a_bounded_number_of_pieces_ahead(files):
    given = 0

    def pieces():
        nonlocal given
        for _ in range(1000):
            given += 1
            yield Piece(files.paths([0]))

    decoded = decode(pieces(), SPEC, workers=0)
    for _ in range(5):
        next(decoded)
    assert given <= 6


@pytest.mark.slow
def test_workers_take_no_more_pieces_than_they_may_be_ahead(files):
    given = 0

    def pieces():
        nonlocal given
        for _ in range(1000):
            given += 1
            yield Piece(files.paths([0]))

    decoded = decode(pieces(), SPEC, workers=2, ahead=3)
    for _ in range(5):
        next(decoded)
    assert given <= 5 + 2 * 3


STREAM = """
import resource, sys
from pathlib import Path
from bundle.manifest import Resize
from training.image_files import find_images, input_of
root = Path(sys.argv[1])
names = sorted(path.name for path in root.iterdir())
files = find_images(root, names, [0] * len(names), input_of(224, Resize()), 0, listed_in="the test")
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
blocks = files.blocks(32)
next(blocks)
start = peak()
n = sum(len(block) for block in blocks)
print(n, files.decoded_bytes >> 20, peak() - start)
"""


@pytest.mark.slow
def test_the_memory_does_not_grow_with_the_number_of_images(tmp_path):
    first = photo(tmp_path / "00000.jpg")
    for n in range(1, 1600):
        os.link(first, tmp_path / f"{n:05}.jpg")
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    streamed, decoded_mib, grown_mib = map(int, done.stdout.split())
    assert (streamed, decoded_mib) == (1568, 229)
    assert grown_mib < 50


@pytest.mark.slow
def test_workers_go_on_after_signals_that_are_meant_for_their_parent(files):
    before = set(multiprocessing.active_children())
    decoded = decode([Piece(files.paths([n])) for n in range(40)], SPEC, workers=1)
    first = next(decoded)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)
    rest = list(decoded)
    np.testing.assert_array_equal(np.concatenate([first, *rest]), files.in_memory().images[:40])


def test_ranks_on_one_machine_share_its_cores_and_each_has_a_worker(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    for ranks, expected in ((None, 12), ("4", 3), ("16", 1)):
        if ranks is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert image_files.default_workers() == expected


def test_missing_files_are_counted_and_the_first_is_named(files):
    names = [*files.names[:3], "gone/1.jpg", "gone/2.jpg"]
    with pytest.raises(
        DataError, match=r"list\.txt: 2 of 5 images are not there, the first is /.*/gone/1\.jpg"
    ):
        find_images(files.root, names, [0] * 5, SPEC, 0, listed_in="list.txt")


def test_the_fingerprint_tells_another_file_size_name_and_label(files, tmp_path):
    def fingerprint(names=("a.jpg", "b.jpg", "c.jpg"), labels=(0, 1, 1), seed=0):
        for n, name in enumerate(("a.jpg", "b.jpg", "c.jpg", "d.jpg")):
            photo(tmp_path / name, seed=seed + n)
        part = find_images(tmp_path, names, labels, SPEC, 0, listed_in="the test")
        return Dataset("made", ("x", "y"), part, part.take(np.arange(1))).fingerprint()

    made = {
        fingerprint(),
        fingerprint(names=("a.jpg", "b.jpg", "d.jpg")),
        fingerprint(labels=(0, 1, 0)),
        fingerprint(seed=9),
    }
    assert len(made) == 4
    assert fingerprint() in made


CRASH = """
import sys
from pathlib import Path
from training.image_files import Piece, decode, input_of
from bundle.manifest import Resize
if __name__ == "__main__":
    decoded = decode([Piece([Path(sys.argv[1])])] * 99, input_of(12, Resize()), workers=1)
    next(decoded)
    print("crashes", flush=True)
    raise SystemError("a fault of ours")
"""


@pytest.mark.slow
def test_a_crash_amid_decoding_ends_the_workers_too(tmp_path):
    script = tmp_path / "crash.py"
    script.write_text(CRASH)
    done = subprocess.run(
        [sys.executable, script, photo(tmp_path / "a.jpg")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout == "crashes\n"
    assert "a fault of ours" in done.stderr
    assert done.returncode == 1
