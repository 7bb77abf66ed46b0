"""Batches of images that lie in files: decoded in worker processes, augmented on the device."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from training.augment import Augmentation, augment
from training.batches import WHOLE, Share, chosen_images
from training.image_files import PIECE, ImageFiles, Piece, decode
from training.streams import Stream, generator

_CPU = torch.device("cpu")


class FileBatches:
    """Batches of a training part in files, `Batches` of batches.py. Two are decoded ahead.

    Images that serving stretches are augmented as those in memory are. Of images that serving crops a random
    part is decoded instead of the shift: each by a draw of its own, from seed, step and place, so that
    neither the number of workers nor of ranks matters.
    """

    def __init__(
        self,
        files: ImageFiles,
        mean: Tensor,
        std: Tensor,
        *,
        augmentation: Augmentation,
        class_balanced: bool = False,
    ) -> None:
        """Take mean and std (3,) on the device that trains."""
        self.n_images = len(files)
        self.image_size = files.image_size
        self.device = mean.device
        self._files, self._mean, self._std = files, mean, std
        self._labels = torch.from_numpy(files.labels)
        self._balanced_by = self._labels if class_balanced else None
        self._random_parts = files.spec.resize.rule == "crop"
        self._augmentation = replace(augmentation, crop_padding=0) if self._random_parts else augmentation

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
            ahead=max(2, math.ceil(2 * batch_size / (PIECE * share.ranks * max(1, workers)))),
            pinned=on_gpu,
        )
        size = self.image_size
        for step, chosen in enumerate(self._chosen(seed, start, stop, batch_size), start):
            # Augmentation is drawn for the whole batch: the images of other ranks stay black in it.
            pixels = torch.zeros((len(chosen), size, size, 3), dtype=torch.uint8, device=self.device)
            mine = pixels[own]
            for begin in range(0, len(mine), PIECE):
                mine[begin : begin + PIECE].copy_(next(decoded), non_blocking=on_gpu)
            draws = generator(seed, Stream.AUGMENTATION, step, self.device)
            inputs = augment(pixels, self._augmentation, self._mean, self._std, draws)
            if share.ranks > 1:
                inputs = inputs[own].contiguous(memory_format=torch.channels_last)
            yield inputs, self._labels[chosen[own]].to(self.device, non_blocking=on_gpu)

    def _pieces(self, seed: int, start: int, stop: int, batch_size: int, own: slice) -> Iterator[Piece]:
        """Yield the images of all steps in pieces that do not depend on the number of workers."""
        for step, chosen in enumerate(self._chosen(seed, start, stop, batch_size), start):
            places = range(len(chosen))[own]
            for begin in range(0, len(places), PIECE):
                piece = places[begin : begin + PIECE]
                paths = self._files.paths(chosen[list(piece)].tolist())
                draws = [(seed, int(Stream.AUGMENTATION), step, place) for place in piece]
                yield Piece(paths, draws if self._random_parts else None)

    def _chosen(self, seed: int, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        return chosen_images(
            self.n_images,
            seed=seed,
            start=start,
            stop=stop,
            batch_size=batch_size,
            device=_CPU,
            balanced_by=self._balanced_by,
        )
