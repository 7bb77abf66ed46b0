"""The running mean of a network: a step at a high rate is half noise, and the mean over steps is not."""

from typing import Any

import torch
from torch import nn


class Average:
    """An exponential mean of a network's weights and batch statistics over its steps, on its device.

    While few steps have been taken the mean reaches less far back, so that the first weights, which are
    random, soon leave it.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Start from the network as it is; `decay` in (0, 1) is what each step leaves of the mean."""
        self.state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        self._decay = decay
        follows = network.state_dict()  # the network's own memory: it changes as the network does
        means = [name for name, tensor in follows.items() if tensor.is_floating_point()]
        self._means = [self.state[name] for name in means], [follows[name] for name in means]
        self._counts = [(self.state[name], follows[name]) for name in follows if name not in means]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take in the network after step `step`, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._means, 1 - decay)
        for count, new in self._counts:
            count.copy_(new)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
