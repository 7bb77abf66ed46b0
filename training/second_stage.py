"""The second stage: a classifier trained anew on class-balanced batches, over a backbone that stays as it is.

Kang et al. (2020), Table 3 of the paper. cRT trains a new linear head; LWS keeps the head and learns a scale
for each class. The backbone is in eval mode throughout, so that its batch statistics stay those it was
trained with; Kang's code leaves it in train mode, where they drift to the balanced mix.
"""

import hashlib
from collections.abc import Mapping
from typing import Final, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from training.checkpoint import Checkpoint, Plan, SecondStage
from training.exceptions import RunError
from training.networks import head_name, make_network

Weights = Mapping[str, Tensor]
Classifier = Literal["crt", "lws"]

CLASSIFIERS: Final[tuple[Classifier, ...]] = get_args(Classifier)
OFFSET_STATUS: Final[dict[str, Literal["known", "fitted"]]] = {"crt": "known", "lws": "fitted"}


def stage_on(backbone: Checkpoint, run: str, classifier: str) -> SecondStage:
    """Return the second stage on a finished run; `run` is what a person calls it. Raises RunError."""
    if not backbone.finished:
        raise RunError(
            f"--backbone {run} has taken {backbone.step} of {backbone.total_steps} steps: resume it first"
        )
    if backbone.plan.second_stage is not None:
        raise RunError(f"--backbone {run} is a second stage itself; name the run that it stands on")
    if classifier == "lws" and not _has_linear_head(backbone):
        raise RunError(
            f"--backbone {run} does not end in a plain linear layer, whose weights lws would scale"
        )
    return SecondStage(classifier, _digest(backbone.weights), run)


def stage_network(plan: Plan, n_classes: int, head: str, backbone: Weights | None) -> nn.Module:
    """Return the network that a plan trains, fresh weights drawn from torch's global generator.

    A second stage stands on `backbone`, the weights of its first. Raises RunError where they do not fit.
    """
    network = make_network(plan.network, n_classes, head)
    if plan.second_stage is None:
        return network
    if backbone is None or _digest(backbone) != plan.second_stage.backbone:
        raise RunError("the second stage stands on other weights than those of its backbone")
    place = head_name(network)
    own = {name: tensor for name, tensor in backbone.items() if not name.startswith(f"{place}.")}
    fresh = network.state_dict()
    if plan.second_stage.classifier == "crt":
        loaded = own | {name: tensor for name, tensor in fresh.items() if name.startswith(f"{place}.")}
    else:
        loaded = dict(backbone)
    try:
        network.load_state_dict(loaded)
    except RuntimeError as failure:
        raise RunError(
            f"the backbone's weights do not fit a {plan.network} of {n_classes} classes"
        ) from failure
    return _split_up(network, plan.second_stage)


def plain_network(plan: Plan, n_classes: int, head: str, weights: Weights) -> nn.Module:
    """Return the network of a run with these weights, as `make_network` builds it: what a bundle holds.

    A scale that LWS learned is multiplied into the head's weights and bias.
    """
    network = make_network(plan.network, n_classes, head)
    if plan.second_stage is None:
        network.load_state_dict(weights)
        return network
    staged = _split_up(network, plan.second_stage)
    staged.load_state_dict(weights)
    setattr(staged.backbone, head_name(staged.backbone), staged.plain_head())
    return staged.backbone.requires_grad_(True)


def logit_offset(source_prior: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return log p: balanced batches leave logits calibrated to a uniform prior, up to a constant.

    Exactly so for a head that cross-entropy trains; for LWS, whose weights keep their direction, a start.
    """
    return np.asarray(np.log(source_prior))


class ScaledLinear(nn.Module):
    """LWS's head, s_y (w_y h + c_y): only the scales s train, from 1."""

    def __init__(self, layer: nn.Linear) -> None:
        """Take the layer, and freeze it."""
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(layer.out_features))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, n_classes) of features (B, in_features)."""
        logits: Tensor = self.layer(features) * self.scale
        return logits

    def folded(self) -> nn.Linear:
        """Return the linear layer that answers the same."""
        layer = nn.Linear(self.layer.in_features, self.layer.out_features)
        with torch.no_grad():
            layer.weight.copy_(self.layer.weight * self.scale[:, None])
            layer.bias.copy_(self.layer.bias * self.scale)
        return layer


class OnFrozenBackbone(nn.Module):
    """A head that trains, over a backbone that neither trains nor follows its batches."""

    def __init__(self, backbone: nn.Module, head: nn.Linear | ScaledLinear) -> None:
        """Take a network without its head, and freeze it."""
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.head = head

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the head; the backbone's is always eval."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, n_classes)."""
        logits: Tensor = self.head(self.backbone(images))
        return logits

    def plain_head(self) -> nn.Linear:
        """Return the head as one linear layer."""
        return self.head.folded() if isinstance(self.head, ScaledLinear) else self.head


def _split_up(network: nn.Module, stage: SecondStage) -> OnFrozenBackbone:
    place = head_name(network)
    layer = getattr(network, place)
    setattr(network, place, nn.Identity())
    return OnFrozenBackbone(network, layer if stage.classifier == "crt" else ScaledLinear(layer))


def _has_linear_head(backbone: Checkpoint) -> bool:
    """Only a plain head has a bias: that of the normalised ones would be one more way to favour a class."""
    return any(name in backbone.weights for name in ("head.bias", "fc.bias"))


def _digest(weights: Weights) -> str:
    """Return the sha256 of weights, by name."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + b"\0")
        found.update(weights[name].cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
