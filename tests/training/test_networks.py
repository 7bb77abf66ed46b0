"""The networks are the paper's: counted weight by weight."""

import pytest
import torch
from torch import nn

from training.exceptions import RunError
from training.networks import NETWORKS, CifarResNet, count_weights, decayed_parameters, make_network


@pytest.mark.parametrize(
    ("name", "classes", "weights"),
    [
        ("resnet8", 10, 75_290),
        ("resnet20", 10, 269_722),  # He et al., table 6: 0.27 M
        ("resnet32", 10, 464_154),
        ("resnet32", 100, 470_004),
        ("resnet56", 10, 853_018),  # 0.85 M
        ("resnet18", 1000, 11_689_512),
        ("resnet50", 1000, 25_557_032),
        ("resnet152", 1000, 60_192_808),
    ],
)
def test_weights_are_counted_as_published(name, classes, weights):
    with torch.device("meta"):
        assert count_weights(make_network(name, classes)) == weights


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_every_network_gives_one_logit_a_class(name):
    assert make_network(name, 7).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_an_odd_image_size_goes_through_the_parameter_free_shortcut():
    assert CifarResNet(1, 4)(torch.zeros(2, 3, 19, 19)).shape == (2, 4)


def test_the_shortcut_carries_every_second_pixel_and_fills_new_channels_with_zeros():
    block = CifarResNet(1, 2).blocks[1].eval()
    with torch.no_grad():
        block.second_norm.weight.zero_()  # the convolutions now add nothing
        features = torch.rand(1, 16, 8, 8)
        out = block(features)
    torch.testing.assert_close(out[:, 8:24], features[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_weight_decay_spares_biases_and_batch_normalisation():
    network = make_network("resnet20", 10)
    decayed, plain = decayed_parameters(network)
    assert len(decayed) == 20  # 19 convolutions and the head
    assert len(decayed) + len(plain) == len(list(network.parameters()))
    spared = {
        name.rsplit(".", 1)[0] for name, weight in network.named_parameters() for p in plain if p is weight
    }
    layers = dict(network.named_modules())
    assert all(isinstance(layers[name], nn.BatchNorm2d) or name == "head" for name in spared)


def test_an_unknown_network_is_refused_with_the_known_ones():
    with pytest.raises(RunError, match="unknown network 'vgg'; known are resnet8"):
        make_network("vgg", 10)
    assert list(NETWORKS) == [
        *("resnet8", "resnet20", "resnet32", "resnet56"),
        *("resnet18", "resnet50", "resnet152"),
    ]
