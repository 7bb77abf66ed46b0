"""The networks that can be trained, so that a name in a recipe and a name in a manifest mean the same layers.

He et al. (2016), section 4.2, for CIFAR; torchvision's ResNets for larger images.
"""

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from training.exceptions import RunError
from training.margins import COSINE_SCALE


def make_network(name: str, n_classes: int, head: str = "linear") -> nn.Module:
    """Return the named network with fresh weights: float32 (B, 3, H, W) in, logits (B, n_classes) out.

    Weights are drawn from torch's global generator: seed it first.
    """
    if name not in NETWORKS:
        raise RunError(f"unknown network '{name}'; known are {', '.join(NETWORKS)}")
    if head not in HEADS:
        raise RunError(f"unknown head '{head}'; known are {', '.join(HEADS)}")
    network = NETWORKS[name](n_classes)
    if head != "linear":
        place = head_name(network)
        setattr(network, place, HEADS[head](getattr(network, place).in_features, n_classes))
    return network


class CifarResNet(nn.Module):
    """The 6n+2-layer ResNet for 32x32 images, widths 16-32-64, with the paper's parameter-free shortcuts.

    With n = 5 (32 layers) it has 464,154 weights for 10 classes and 470,004 for 100.
    """

    def __init__(self, blocks_per_stage: int, n_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        channels = 16
        for width in (16, 32, 64):
            for place in range(blocks_per_stage):
                stride = 2 if width > 16 and place == 0 else 1
                blocks.append(_BasicBlock(channels, width, stride))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, n_classes)
        # The head keeps torch's own, smaller weights: Kaiming's (norm 1.4 a class) stay in a tail class's row
        # for the whole of a short run, and cost 4 points of balanced error after 10 epochs of CIFAR-100-LT.
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, n_classes)."""
        features: Tensor = self.blocks(functional.relu_(self.stem_norm(self.stem(images))))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside option A's shortcut: every second pixel, new channels filled with zeros."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.stride = stride
        self.new_channels = width - channels

    def forward(self, features: Tensor) -> Tensor:
        # In place: normalisation keeps its input, not its output, so nothing is lost and memory is spared.
        out = functional.relu_(self.first_norm(self.first(features)))
        out = self.second_norm(self.second(out))
        shortcut = features
        if self.stride != 1:
            halves = self.new_channels // 2, self.new_channels - self.new_channels // 2
            if torch.compiler.is_exporting():
                # The same as one operator: ONNX Runtime then keeps its blocked layout to the end of the
                # network, and a ResNet-32 takes 4 to 11 % less time. In training it would be slower.
                carried = functional.pad(torch.eye(features.shape[1]), (0, 0, *halves))
                shortcut = functional.conv2d(features, carried[:, :, None, None], stride=self.stride)
            else:
                strided = features[:, :, :: self.stride, :: self.stride]
                shortcut = functional.pad(strided, (0, 0, 0, 0, *halves))
        return functional.relu_(out.add_(shortcut))


class NormalisedLinear(nn.Linear):
    """A head whose class weights all have norm 1, without a bias: w_y / |w_y| . h.

    No class can win by the length of its weights, which under SGD follows its count; nor by a bias.
    """

    def __init__(self, in_features: int, n_classes: int) -> None:
        super().__init__(in_features, n_classes, bias=False)
        with torch.no_grad():
            self.weight.normal_()
            self.weight.copy_(functional.normalize(self.weight))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, n_classes) of features (B, in_features)."""
        return functional.linear(features, functional.normalize(self.weight))


class CosineLinear(NormalisedLinear):
    """LDAM's head (Cao et al., 2019): s cos(w_y, h), s = 30. What leaves it is s cos, not the bare cosine."""

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, n_classes) of features (B, in_features)."""
        return COSINE_SCALE * super().forward(functional.normalize(features))


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "normalised": NormalisedLinear,
    "cosine": CosineLinear,
}

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet8": lambda n_classes: CifarResNet(1, n_classes),
    "resnet20": lambda n_classes: CifarResNet(3, n_classes),
    "resnet32": lambda n_classes: CifarResNet(5, n_classes),
    "resnet56": lambda n_classes: CifarResNet(9, n_classes),
    "resnet18": lambda n_classes: torchvision.models.resnet18(num_classes=n_classes),
    "resnet50": lambda n_classes: torchvision.models.resnet50(num_classes=n_classes),
    "resnet152": lambda n_classes: torchvision.models.resnet152(num_classes=n_classes),
}


def head_name(network: nn.Module) -> str:
    """Return the name of the last layer, by which its weights are called too."""
    return "head" if isinstance(network, CifarResNet) else "fc"


def linear_layer(network: nn.Module) -> nn.Linear | None:
    """Return the last layer where it is a plain linear one, whose weights' norms are free."""
    layer = getattr(network, head_name(network))
    return layer if type(layer) is nn.Linear else None


def default_image_size(name: str) -> int:
    """Return the side in pixels that the named network was designed for."""
    return 32 if name in {"resnet8", "resnet20", "resnet32", "resnet56"} else 224


def count_weights(network: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def decayed_parameters(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return what trains: (weights of convolutions and linear layers, the rest); only the first decay."""
    layers = [layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    decayed: list[Tensor] = [weight for weight in layers if weight.requires_grad]
    chosen = {id(parameter) for parameter in decayed}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return decayed, [parameter for parameter in trained if id(parameter) not in chosen]
