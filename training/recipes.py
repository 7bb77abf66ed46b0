"""How a network is trained, as plain values, so that a checkpoint and a manifest can say it in full."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from training.augment import Augmentation
from training.exceptions import RunError

OptimizerName = Literal["sgd", "adam"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)


@dataclass(frozen=True)
class Recipe:
    """An optimiser under a warm-up and one schedule.

    Everything about time is a share of the run, so that a longer run stretches the same shape. Weight decay
    falls on the weights of convolutions and linear layers only, not on biases and batch normalisation.
    """

    name: str
    epochs: int
    batch_size: int
    peak_rate: float
    warm_up: float  # share of the steps over which the rate climbs linearly
    drops: tuple[float, ...]  # shares at which the rate falls to a tenth; none means one half cosine to zero
    weight_decay: float
    momentum: float = 0.9
    nesterov: bool = True
    crop_padding: float = 1 / 8  # of the image's side: 4 pixels at 32
    optimizer: OptimizerName = "sgd"  # Adam has betas of 0.9 and 0.999 and knows no momentum or nesterov
    distortion: float = 0.0  # strength of TrivialAugment's operations, 1 for its wide space; 0 without
    cutout: float = 0.0  # side of the square hidden in each image, as a share of the image's; 0 without
    small_side: float = 1.0  # the side that images are shrunk to at first, as a share: cheaper steps
    small_until: float = 0.0  # share of the steps that see images so
    averaging: float = 0.0  # what a step leaves of the running mean of the weights; 0 keeps the last weights

    @property
    def augmentation(self) -> Augmentation:
        """What happens to each image on its way to the network."""
        return Augmentation(self.crop_padding, self.distortion, self.cutout)

    def side(self, image_size: int, step: int, total_steps: int) -> int:
        """Return the side in pixels that images of `image_size` have at the given step."""
        small = step < round(self.small_until * total_steps)
        return max(1, round(self.small_side * image_size)) if small else image_size

    def rate(self, step: int, total_steps: int) -> float:
        """Return the learning rate of the given step, counted from 0."""
        warm_up_steps = round(self.warm_up * total_steps)
        if step < warm_up_steps:
            return self.peak_rate * (step + 1) / warm_up_steps
        if self.drops:
            return self.peak_rate * 0.1 ** sum(step >= round(drop * total_steps) for drop in self.drops)
        progress = (step - warm_up_steps) / max(1, total_steps - warm_up_steps)
        return self.peak_rate * 0.5 * (1 + math.cos(math.pi * progress))


def with_optimizer(recipe: Recipe, optimizer: OptimizerName | None) -> Recipe:
    """Return the recipe with another optimiser, None for its own.

    Adam peaks at a rate of 1e-3, under the same schedule and decay: the paper (Figure 1) names neither.
    """
    if optimizer is None or optimizer == recipe.optimizer:
        return recipe
    if optimizer == "adam":
        return replace(recipe, optimizer="adam", peak_rate=ADAM_RATE)
    raise RunError(f"the recipe '{recipe.name}' has a learning rate for Adam, not for SGD")


ADAM_RATE = 1e-3

# One short cosine cycle with crops and flips alone: what `fast` is measured against.
COSINE = Recipe("cosine", 40, 128, 0.2, 0.1, (), 5e-4)

# Our default: below the paper's error on CIFAR-100-LT after a thirtieth of its steps (docs/recipes.md).
FAST = Recipe(
    "fast",
    epochs=50,
    batch_size=128,
    peak_rate=0.2,
    warm_up=0.1,
    drops=(),
    weight_decay=1e-3,
    distortion=0.5,
    small_side=0.75,
    small_until=0.5,
    averaging=0.998,
)

# For the lowest error of one small network, whatever the time: eight times as long, twice as distorted.
STRONG = Recipe(
    "strong",
    epochs=400,
    batch_size=128,
    peak_rate=0.2,
    warm_up=5 / 400,
    drops=(),
    weight_decay=5e-4,
    distortion=1.0,
    cutout=0.5,
    averaging=0.999,
)

# Menon et al. (2021), appendix C. The CIFAR recipe is given in steps, and 1,416 epochs of CIFAR-100-LT at
# ratio 100 are its 120,000; the paper's footnote and the second arXiv version name two shorter ones.
PAPER = Recipe("paper", 1416, 128, 0.1, 1 / 60, (60 / 120, 90 / 120, 110 / 120), 1e-4)
PAPER_256 = Recipe("paper-256-epochs", 256, 128, 0.4, 15 / 256, (96 / 256, 192 / 256, 224 / 256), 1e-4)
PAPER_200 = Recipe("paper-200-epochs", 200, 128, 0.1, 5 / 200, (160 / 200, 180 / 200), 1e-4)
PAPER_IMAGENET = Recipe("paper-imagenet", 90, 512, 0.4, 5 / 90, (), 5e-4)
PAPER_INATURALIST = Recipe("paper-inaturalist", 90, 1024, 0.4, 5 / 90, (), 1e-4)
PAPER_INATURALIST_152 = replace(PAPER_INATURALIST, name="paper-inaturalist-resnet152", batch_size=512)

# Second stages (cRT, LWS) on a frozen backbone. An epoch of the code of Kang et al. (2020) is n_max images of
# every class: its 10 of ImageNet-LT (5 for LWS) and 30 of iNaturalist are these many of ours.
SECOND_STAGE = Recipe("second-stage", 30, 128, 0.1, 0.0, (1 / 3, 2 / 3), 5e-4)
SECOND_STAGE_IMAGENET = Recipe("second-stage-imagenet", 111, 512, 0.2, 0.0, (), 5e-4, nesterov=False)
SECOND_STAGE_INATURALIST = Recipe("second-stage-inaturalist", 558, 512, 0.2, 0.0, (), 1e-4, nesterov=False)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        FAST,
        STRONG,
        COSINE,
        PAPER,
        PAPER_256,
        PAPER_200,
        PAPER_IMAGENET,
        PAPER_INATURALIST,
        PAPER_INATURALIST_152,
        SECOND_STAGE,
        SECOND_STAGE_IMAGENET,
        SECOND_STAGE_INATURALIST,
    )
}
