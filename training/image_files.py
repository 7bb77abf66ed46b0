"""Labelled images that stay in their files: decoded a few at a time, in worker processes, when needed.

At any moment the workers hold a bounded number of decoded images, however many files there are.
"""

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data
from numpy.typing import NDArray
from torch import Tensor

from bundle.manifest import ImageInput, Resize
from training.data import Examples
from training.exceptions import DataError, first_line
from training.views import random_view, served_view

PIECE = 32  # images that a worker decodes at a time
MEMORY_BUDGET_BYTES = 2**30  # decoded images up to this size are kept in memory, where a reader allows it
_FEW = 256  # up to so many images, starting worker processes takes longer than decoding


@dataclass(frozen=True)
class ImageFiles:
    """Images under `root`, by name, with their labels (N,) int64 and sizes in bytes (N,).

    `spec` says how they come to the network's size; `workers` decode, 0 is the process itself. How many work
    decides the speed and nothing else.
    """

    root: Path
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    spec: ImageInput
    workers: int

    def __len__(self) -> int:
        return len(self.names)

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return self.spec.height

    @property
    def decoded_bytes(self) -> int:
        """What all images would take in memory."""
        return len(self) * self.spec.height * self.spec.width * 3

    def take(self, index: NDArray[np.integer]) -> "ImageFiles":
        """Return the images at these positions."""
        names = tuple(self.names[place] for place in index)
        return replace(self, names=names, labels=self.labels[index], n_bytes=self.n_bytes[index])

    def joined(self, other: "ImageFiles") -> "ImageFiles":
        """Return these images and then the other's, which lie under the same root."""
        return replace(
            self,
            names=self.names + other.names,
            labels=np.concatenate([self.labels, other.labels]),
            n_bytes=np.concatenate([self.n_bytes, other.n_bytes]),
        )

    def blocks(self, size: int = PIECE) -> Iterator[NDArray[np.uint8]]:
        """Yield the images as they will be served, uint8 (b, H, W, 3), in order. Raises DataError."""
        pieces = (
            Piece(self.paths(range(start, min(start + size, len(self)))))
            for start in range(0, len(self), size)
        )
        for pixels in decode(pieces, self.spec, workers=0 if len(self) <= _FEW else self.workers):
            yield pixels.numpy()

    def paths(self, places: Iterable[int]) -> list[Path]:
        """Return the files of the images at these positions."""
        return [self.root / self.names[place] for place in places]

    def content(self) -> Iterator[bytes]:
        """Yield what a fingerprint is taken of: names, sizes of the files and labels, not their bytes."""
        yield "\0".join(self.names).encode(errors="surrogateescape")
        yield self.n_bytes.astype("<i8").tobytes()
        yield self.labels.astype("<i8").tobytes()

    def in_memory(self) -> Examples:
        """Decode all images and keep them."""
        images = np.empty((len(self), self.spec.height, self.spec.width, 3), dtype=np.uint8)
        place = 0
        for block in self.blocks():
            images[place : place + len(block)] = block
            place += len(block)
        return Examples(images, self.labels)


def find_images(
    root: Path, names: Sequence[str], labels: Sequence[int], spec: ImageInput, workers: int, *, listed_in: str
) -> ImageFiles:
    """Return the named files under `root`. Raises DataError that names the first that is missing."""
    n_bytes, missing = np.zeros(len(names), dtype=np.int64), []
    for place, name in enumerate(names):
        try:
            n_bytes[place] = (root / name).stat().st_size
        except OSError:
            missing.append(name)
    if missing:
        raise DataError(
            f"{listed_in}: {len(missing):,} of {len(names):,} images are not there, the first is"
            f" {root / missing[0]}"
        )
    return ImageFiles(root, tuple(names), np.array(labels, dtype=np.int64), n_bytes, spec, workers)


def input_of(image_size: int, resize: Resize) -> ImageInput:
    """Return how files come to the network's size, without a normalisation. Raises DataError."""
    largest = 4096
    if image_size > largest:
        raise DataError(f"--image-size must be at most {largest}, not {image_size}")
    return ImageInput(height=image_size, width=image_size, resize=resize, mean=[0, 0, 0], std=[1, 1, 1])


def default_workers() -> int:
    """Return how many processes decode unless told: one a core that this process may use, at most 16.

    Ranks that torchrun started on one machine share its cores.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, len(os.sched_getaffinity(0)) // ranks))


@dataclass(frozen=True)
class Piece:
    """What one worker decodes at a time: served views, or random views of which `draws` seeds each."""

    paths: list[Path]
    draws: Sequence[tuple[int, ...]] | None = None


def decode(
    pieces: Iterable[Piece], spec: ImageInput, *, workers: int, ahead: int = 2, pinned: bool = False
) -> Iterator[Tensor]:
    """Yield the pixels of each piece, uint8 (b, H, W, 3), in order.

    Each worker is at most `ahead` pieces ahead. `pinned` memory is copied to a GPU without waiting. Raises
    DataError that names the file at fault.
    """
    processes: dict[str, Any] = {}
    if workers:
        processes = {
            "prefetch_factor": ahead,
            "multiprocessing_context": _context(),
            "worker_init_fn": _leave_signals_to_the_parent,
        }
    loaded = iter(
        torch.utils.data.DataLoader(
            _Decoder(spec),
            batch_size=None,  # a piece is a batch already
            sampler=pieces,
            num_workers=workers,
            pin_memory=pinned,
            generator=torch.Generator(),  # else torch's global one is drawn from
            **processes,
        )
    )
    while True:
        try:
            pixels = next(loaded)
        except StopIteration:
            return
        except RuntimeError as failure:  # a worker died, by lack of memory or of /dev/shm most likely
            raise DataError(f"decoding stopped: {first_line(failure)}; try fewer --workers") from failure
        if isinstance(pixels, DataError):
            raise pixels
        yield pixels


class _Decoder(torch.utils.data.Dataset[Any]):
    """What runs in the workers. It returns an error: one that is raised arrives with its trace as message."""

    def __init__(self, spec: ImageInput) -> None:
        self._spec = spec

    def __getitem__(self, piece: Piece) -> Tensor | DataError:
        try:
            if piece.draws is None:
                views = [served_view(path, self._spec) for path in piece.paths]
            else:
                views = [
                    random_view(path, self._spec, np.random.default_rng(draw))
                    for path, draw in zip(piece.paths, piece.draws, strict=True)
                ]
        except DataError as failure:
            return failure
        return torch.from_numpy(np.stack(views))


def _context() -> Any:
    """Start workers from a server without threads: forked from this process they could inherit held locks."""
    context = multiprocessing.get_context("forkserver")
    # Each worker imports the main module anew: what that needs is imported once, in the server, but not the
    # module itself, which Python warns about.
    main = getattr(sys.modules["__main__"], "__spec__", None)
    needed = [
        name for name in sys.modules if name.startswith("training.") and name != getattr(main, "name", "")
    ]
    context.set_forkserver_preload(needed)
    return context


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Ignore what is sent to all processes: the parent decides when to stop, and needs batches until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """End the workers that a crash leaves: multiprocessing would send a SIGTERM, and wait for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
