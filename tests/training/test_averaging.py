"""The running mean of a network against its sum written out."""

import numpy as np
import pytest
import torch
from torch import nn

from training.averaging import Average


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def walk(network, step):
    """Move the weights and the batch statistics, as a training step would."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    network(torch.randn(8, 3, generator=generator))


def test_the_mean_weights_each_step_by_what_the_later_ones_left_of_it():
    network = small_network()
    average = Average(network, decay=0.6)
    seen = [{name: tensor.clone() for name, tensor in network.state_dict().items()}]
    for step in range(12):
        walk(network, step)
        average.follow(step)
        seen.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
    kept = np.minimum(0.6, (1 + np.arange(12)) / (10 + np.arange(12)))
    shares = [np.prod(kept), *((1 - kept[i]) * np.prod(kept[i + 1 :]) for i in range(12))]
    assert sum(shares) == pytest.approx(1)
    for name in ("0.weight", "1.bias", "1.running_mean", "1.running_var"):
        expected = sum(share * state[name].double() for share, state in zip(shares, seen, strict=True))
        torch.testing.assert_close(average.state[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert average.state["1.num_batches_tracked"] == 12


def test_the_mean_leaves_the_network_alone_and_goes_on_from_a_saved_state():
    network, other = small_network(), small_network()
    average = Average(network, decay=0.9)
    walk(network, 0)
    walk(other, 0)
    average.follow(0)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])
    resumed = Average(other, decay=0.9)
    resumed.load({name: tensor.clone() for name, tensor in average.state.items()})
    for one, mean in ((network, average), (other, resumed)):
        walk(one, 1)
        mean.follow(1)
    assert all(torch.equal(tensor, resumed.state[name]) for name, tensor in average.state.items())


def test_a_network_that_stands_still_is_its_own_mean():
    network = small_network()
    average = Average(network, decay=0.99)
    for step in range(5):
        average.follow(step)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(average.state[name], tensor)
