"""The training loop: every random draw is a function of the seed and the step, so a run can stop anywhere.

On CIFAR-100-LT (ratio 100, ResNet-32, a tenth held out) see docs/results.md for what it reaches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.augment import shrink
from training.averaging import Average
from training.batches import Batches
from training.exceptions import RunError
from training.losses import Loss
from training.networks import decayed_parameters
from training.ranks import ALONE, Ranks
from training.recipes import Recipe
from training.step import Step
from training.streams import Stream, number


@dataclass
class Trainee:
    """What training changes: weights, momentum, the mean of the weights, and the number of steps taken."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average | None = None  # None where the recipe keeps the last weights
    step: int = 0


@dataclass(frozen=True)
class StepRecord:
    """One step just taken: `step` counts from 1, `loss` is the batch's mean, still on the device."""

    step: int
    loss: Tensor
    rate: float
    images: int


def new_trainee(network: nn.Module, recipe: Recipe, device: torch.device) -> Trainee:
    """Return the network on its device, in channels_last memory, with the recipe's optimiser."""
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = Average(network, recipe.averaging) if recipe.averaging else None
    return Trainee(network, _optimizer(network, recipe), average)


def fit(
    trainee: Trainee,
    batches: Batches,
    loss: Loss,
    recipe: Recipe,
    *,
    total_steps: int,
    seed: int,
    ranks: Ranks = ALONE,
) -> Iterator[StepRecord]:
    """Train up to `total_steps`, yielding after every step; stop iterating to stop, call again to go on.

    The same seed, data, number of ranks and of steps give the same weights, however often it was stopped.
    Nothing waits for a GPU: several runs may be iterated in turn.
    """
    trainee.network.train()
    step_taker = Step(trainee.network, trainee.optimizer, batches.device, ranks=ranks)
    stream = batches.stream(
        seed=seed,
        start=trainee.step,
        stop=total_steps,
        batch_size=recipe.batch_size,
        share=ranks.share,
    )
    for step, (inputs, labels) in enumerate(stream, trainee.step):
        rate = recipe.rate(step, total_steps)
        value = step_taker.take(
            shrink(inputs, recipe.side(batches.image_size, step, total_steps)),
            labels,
            loss.at(step / total_steps),
            rate=rate,
            draw=number(seed, Stream.LOSS, step),
        )
        if trainee.average is not None:
            trainee.average.follow(step)
        trainee.step = step + 1
        yield StepRecord(step + 1, value, rate, len(labels) * ranks.size)


def load_optimizer(trainee: Trainee, saved: dict[str, Any]) -> None:
    """Take the moments out of a saved optimiser; rate, decay and the like are the recipe's."""
    own = trainee.optimizer.state_dict()["param_groups"]
    trainee.optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


def seed_weights(seed: int) -> None:
    """Seed torch's global generator, which draws a new network's weights and nothing else."""
    torch.manual_seed(number(seed, Stream.WEIGHTS, 0))


def choose_device(name: str, place: int = 0) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` names here; raises RunError where there is no GPU.

    `place` is the number of the GPU, for one of several ranks on this machine.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: torch finds no usable GPU here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if place >= torch.cuda.device_count():
        raise RunError(f"rank {place} of this machine has no GPU: there are {torch.cuda.device_count()}")
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def _optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    decayed, plain = decayed_parameters(network)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.peak_rate, fused=True)
    return torch.optim.SGD(
        groups, lr=recipe.peak_rate, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True
    )
