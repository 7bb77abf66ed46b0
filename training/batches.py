"""Where the loop gets its batches: each is a function of seed and step, so a run can go on at any step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from training.augment import Augmentation, augment
from training.streams import Stream, generator


@dataclass(frozen=True)
class Share:
    """The part of each batch that one of `ranks` processes trains on: every `ranks`-th image, from `rank`."""

    rank: int = 0
    ranks: int = 1


WHOLE = Share()


class Batches(Protocol):
    """Batches of training images, in an order and augmentation that seed and step decide."""

    n_images: int
    image_size: int  # side in pixels
    device: torch.device

    def stream(
        self, *, seed: int, start: int, stop: int, batch_size: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for each step from `start` to `stop` - 1, inputs (B, 3, H, W) and labels (B,) on the device.

        Inputs are normalised float32 in channels_last memory. Order and augmentation are drawn for the whole
        batch and then shared out: one process that takes two shares in turn sees what two processes see.
        """
        ...


class MemoryBatches:
    """Batches gathered and augmented on the device that holds all images: uint8 (N, H, W, 3), labels (N,)."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Tensor,
        std: Tensor,
        *,
        augmentation: Augmentation,
        class_balanced: bool = False,
    ) -> None:
        """Take everything on one device; mean and std are (3,)."""
        self.n_images = len(images)
        self.image_size = images.shape[1]
        self.device = images.device
        self._images, self._labels, self._mean, self._std = images, labels, mean, std
        self._augmentation = augmentation
        self._balanced_by = labels if class_balanced else None

    def stream(
        self, *, seed: int, start: int, stop: int, batch_size: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of these steps, as `Batches` says."""
        positions = chosen_images(
            self.n_images,
            seed=seed,
            start=start,
            stop=stop,
            batch_size=batch_size,
            device=self.device,
            balanced_by=self._balanced_by,
        )
        for step, chosen in enumerate(positions, start):
            draws = generator(seed, Stream.AUGMENTATION, step, self.device)
            inputs = augment(self._images[chosen], self._augmentation, self._mean, self._std, draws)
            labels = self._labels[chosen]
            if share.ranks > 1:
                inputs = inputs[share.rank :: share.ranks].contiguous(memory_format=torch.channels_last)
                labels = labels[share.rank :: share.ranks]
            yield inputs, labels


def chosen_images(
    n_images: int,
    *,
    seed: int,
    start: int,
    stop: int,
    batch_size: int,
    device: torch.device,
    balanced_by: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the positions of each step's images, (B,): a new random order each epoch, full batches only.

    With `balanced_by`, the labels (N,) on the device, classes come equally often instead: each place of a
    batch draws a class, then one of its images, both evenly and with replacement.
    """
    if balanced_by is not None:
        yield from _balanced(balanced_by, seed, range(start, stop), min(batch_size, n_images))
        return
    epoch_steps = steps_per_epoch(n_images, batch_size)
    order = torch.empty(0)
    for step in range(start, stop):
        epoch, place = divmod(step, epoch_steps)
        if place == 0 or step == start:
            draws = generator(seed, Stream.ORDER, epoch, device)
            order = torch.randperm(n_images, generator=draws, device=device)
        yield order[place * batch_size :][:batch_size]


def _balanced(labels: Tensor, seed: int, steps: range, batch: int) -> Iterator[Tensor]:
    by_class = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    counts = counts[counts > 0]
    first = counts.cumsum(0) - counts
    for step in steps:
        draws = generator(seed, Stream.ORDER, step, labels.device)
        classes, places = torch.rand((2, batch), generator=draws, device=labels.device, dtype=torch.float64)
        drawn = (classes * len(counts)).long()  # of [0, 1), so below the number of classes
        yield by_class[first[drawn] + (places * counts[drawn]).long()]


def steps_per_epoch(n_images: int, batch_size: int) -> int:
    """Return the full batches in an epoch, at least 1; the rest of each epoch's order is left out."""
    return max(1, n_images // batch_size)
