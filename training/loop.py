"""The training loop: every random draw is a function of the seed and the step, so a run can stop anywhere.

On CIFAR-100-LT (ratio 100, ResNet-32, a tenth held out) see docs/results.md for what it reaches.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from training.augment import crop_and_flip, normalise
from training.exceptions import RunError
from training.losses import Loss
from training.networks import decayed_parameters
from training.recipes import Recipe

_ORDER, _AUGMENTATION, _WEIGHTS, _LOSS = range(4)  # the streams that a seed is split into


@dataclass(frozen=True)
class TrainingData:
    """What the loop reads, on its device: images uint8 (N, H, W, 3), labels int64 (N,), mean and std (3,)."""

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor


@dataclass
class Trainee:
    """What training changes: weights, momentum, and the number of steps taken."""

    network: nn.Module
    optimizer: torch.optim.SGD
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
    decayed, plain = decayed_parameters(network)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(
        groups, lr=recipe.peak_rate, momentum=recipe.momentum, nesterov=recipe.nesterov
    )
    return Trainee(network, optimizer)


def fit(
    trainee: Trainee, data: TrainingData, loss: Loss, recipe: Recipe, *, total_steps: int, seed: int
) -> Iterator[StepRecord]:
    """Train up to `total_steps`, yielding after every step; stop iterating to stop, call again to go on.

    The same seed, data and number of steps give the same weights, however often it was stopped.
    """
    device = data.images.device
    padding = math.ceil(recipe.crop_padding * data.images.shape[1])
    epoch_steps = steps_per_epoch(len(data.images), recipe.batch_size)
    bf16 = has_bf16(device)
    trainee.network.train()
    order = torch.empty(0)
    for step in range(trainee.step, total_steps):
        epoch, place = divmod(step, epoch_steps)
        if place == 0 or len(order) == 0:
            order = torch.randperm(
                len(data.images), generator=_stream(seed, _ORDER, epoch, device), device=device
            )
        chosen = order[place * recipe.batch_size :][: recipe.batch_size]
        pixels = crop_and_flip(data.images[chosen], padding, _stream(seed, _AUGMENTATION, step, device))
        rate = recipe.rate(step, total_steps)
        for group in trainee.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = trainee.network(normalise(pixels, data.mean, data.std))
        drawn = _stream(seed, _LOSS, step, device)
        value = loss.at(step / total_steps)(logits, data.labels[chosen], drawn)
        trainee.optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        trainee.optimizer.step()
        trainee.step = step + 1
        yield StepRecord(step + 1, value.detach(), rate, len(chosen))


def steps_per_epoch(n_images: int, batch_size: int) -> int:
    """Return the full batches in an epoch, at least 1; the rest of each epoch's order is left out."""
    return max(1, n_images // batch_size)


def seed_weights(seed: int) -> None:
    """Seed torch's global generator, which draws a new network's weights and nothing else."""
    torch.manual_seed(_number(seed, _WEIGHTS, 0))


def choose_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` names here; raises RunError where there is no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: torch finds no usable GPU here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return torch.device("cuda")


def has_bf16(device: torch.device) -> bool:
    """Say whether bfloat16 is faster than float32 here: on a GPU that has it, or AVX512_BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _number(seed: int, stream: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, stream, index]).generate_state(1, np.uint64)[0] >> 1)


def _stream(seed: int, stream: int, index: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(_number(seed, stream, index))
