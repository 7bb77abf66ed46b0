"""The random streams that a seed is split into: every draw is a function of seed, purpose and place."""

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What is drawn. The numbers are part of what a seed means: they never change."""

    ORDER = 0  # place: the epoch
    AUGMENTATION = 1  # place: the step
    WEIGHTS = 2  # place: 0
    LOSS = 3  # place: the step


def number(seed: int, stream: Stream, place: int) -> int:
    """Return the number, in [0, 2^63), that seeds one draw."""
    return int(np.random.SeedSequence([seed, stream, place]).generate_state(1, np.uint64)[0] >> 1)


def generator(seed: int, stream: Stream, place: int, device: torch.device) -> torch.Generator:
    """Return a generator on the device for one draw."""
    return torch.Generator(device).manual_seed(number(seed, stream, place))
