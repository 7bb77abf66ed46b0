"""The networks are the paper's: counted weight by weight."""

import pytest
import torch
from torch import nn

from training.exceptions import RunError
from training.networks import (
    HEADS,
    NETWORKS,
    CifarResNet,
    NormalisedLinear,
    count_weights,
    decayed_parameters,
    make_network,
)


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


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
@pytest.mark.parametrize("head", ["normalised", "cosine"])
def test_the_length_of_a_class_weight_says_nothing_to_a_head_of_unit_norm(name, head):
    network = make_network(name, 5, head).eval()
    (layer,) = [part for part in network.modules() if isinstance(part, NormalisedLinear)]
    assert type(layer) is HEADS[head]
    assert layer.bias is None
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(5))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = network(images)
        layer.weight *= torch.tensor([0.1, 1, 3, 10, 50])[:, None]
        torch.testing.assert_close(network(images), before)
    assert before.shape == (2, 5)


def test_the_cosine_head_gives_thirty_times_the_cosine_of_features_and_class_weights():
    layer = HEADS["cosine"](8, 3)
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    cosines = torch.nn.functional.cosine_similarity(features[:, None], layer.weight[None], dim=2)
    torch.testing.assert_close(layer(features), 30 * cosines)
    torch.testing.assert_close(layer(7 * features), layer(features))
    assert layer(torch.zeros(1, 8)).isfinite().all()


def test_the_weights_of_every_head_are_decayed():
    for head in HEADS:
        decayed, _ = decayed_parameters(make_network("resnet20", 10, head))
        assert len(decayed) == 20


def test_an_unknown_head_is_refused_with_the_known_ones():
    with pytest.raises(RunError, match="unknown head 'mlp'; known are linear, normalised, cosine"):
        make_network("resnet20", 10, "mlp")
