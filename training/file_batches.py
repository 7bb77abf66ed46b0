"""Batches of images that lie in files: decoded in worker processes, normalised on the device."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from training.augment import crop_and_flip, normalise
from training.batches import WHOLE, Share, chosen_images
from training.image_files import PIECE, ImageFiles, Piece, decode
from training.streams import Stream, generator

_CPU = torch.device("cpu")


class FileBatches:
    """Batches of a training part in files, `Batches` of batches.py.

    Images that serving stretches are shifted and mirrored, as those in memory are. Images that serving crops
    are cropped at random: each from a draw of its own, by seed, step and place, so that neither the number of
    workers nor of processes matters. Two batches are decoded ahead.
    """

    def __init__(self, files: ImageFiles, mean: Tensor, std: Tensor, *, crop_padding: float) -> None:
        """Take mean and std (3,) on the device; `crop_padding` is a share of the side."""
        self.n_images = len(files)
        self.image_size = files.image_size
        self.device = mean.device
        self._files, self._mean, self._std = files, mean, std
        self._labels = torch.from_numpy(files.labels)
        self._crops = files.spec.resize.rule == "crop"
        self._padding = math.ceil(crop_padding * files.image_size)

    def stream(
        self, *, seed: int, start: int, stop: int, batch_size: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of these steps, as `Batches` says. Raises DataError that names a file."""
        own = slice(share.rank, None, share.ranks)
        on_gpu = self.device.type == "cuda"
        workers = self._files.workers
        decoded = decode(
            self._pieces(seed, start, stop, batch_size, own),
            self._files.spec,
            workers=workers,
            ahead=max(2, math.ceil(2 * batch_size / (PIECE * max(1, workers)))),
            pinned=on_gpu,
        )
        for step, chosen in enumerate(self._chosen(seed, start, stop, batch_size), start):
            size = self.image_size
            pixels = torch.zeros((len(chosen), size, size, 3), dtype=torch.uint8, device=self.device)
            mine = pixels[own]
            for begin in range(0, len(mine), PIECE):
                mine[begin : begin + PIECE].copy_(next(decoded), non_blocking=on_gpu)
            if not self._crops:  # drawn for the whole batch: the images of other processes stay black
                draws = generator(seed, Stream.AUGMENTATION, step, self.device)
                mine = crop_and_flip(pixels, self._padding, draws)[own]
            labels = self._labels[chosen[own]].to(self.device, non_blocking=on_gpu)
            yield normalise(mine, self._mean, self._std), labels

    def _pieces(self, seed: int, start: int, stop: int, batch_size: int, own: slice) -> Iterator[Piece]:
        """Yield the images of all steps in pieces that do not depend on the number of workers."""
        for step, chosen in enumerate(self._chosen(seed, start, stop, batch_size), start):
            places = range(len(chosen))[own]
            for begin in range(0, len(places), PIECE):
                piece = places[begin : begin + PIECE]
                paths = self._files.paths(chosen[piece.start : piece.stop : piece.step].tolist())
                draws = [(seed, int(Stream.AUGMENTATION), step, place) for place in piece]
                yield Piece(paths, draws if self._crops else None)

    def _chosen(self, seed: int, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        return chosen_images(
            self.n_images, seed=seed, start=start, stop=stop, batch_size=batch_size, device=_CPU
        )
