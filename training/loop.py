"""The training loop: every random draw is a function of the seed and the step, so a run can stop anywhere.

On CIFAR-100-LT (ratio 100, ResNet-32, a tenth held out) see docs/results.md for what it reaches.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.augment import shrink
from training.batches import Batches
from training.exceptions import RunError
from training.losses import Loss
from training.networks import decayed_parameters
from training.recipes import Recipe
from training.streams import Stream, generator, number


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
    trainee: Trainee, batches: Batches, loss: Loss, recipe: Recipe, *, total_steps: int, seed: int
) -> Iterator[StepRecord]:
    """Train up to `total_steps`, yielding after every step; stop iterating to stop, call again to go on.

    The same seed, data and number of steps give the same weights, however often it was stopped.
    """
    device = batches.device
    bf16 = has_bf16(device)
    trainee.network.train()
    stream = batches.stream(seed=seed, start=trainee.step, stop=total_steps, batch_size=recipe.batch_size)
    for step, (inputs, labels) in enumerate(stream, trainee.step):
        rate = recipe.rate(step, total_steps)
        for group in trainee.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = trainee.network(shrink(inputs, recipe.side(batches.image_size, step, total_steps)))
        drawn = generator(seed, Stream.LOSS, step, device)
        value = loss.at(step / total_steps)(logits, labels, drawn)
        trainee.optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        trainee.optimizer.step()
        trainee.step = step + 1
        yield StepRecord(step + 1, value.detach(), rate, len(labels))


def seed_weights(seed: int) -> None:
    """Seed torch's global generator, which draws a new network's weights and nothing else."""
    torch.manual_seed(number(seed, Stream.WEIGHTS, 0))


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
