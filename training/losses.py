"""The losses, and what each leaves behind: the offset that makes its logits calibrated to the training prior.

A loss is a function of logits, labels and named priors. `Loss` closes one over its priors for the training
loop, beside the `logit_offset` that the bundle must carry so that nothing is adjusted twice. Another loss is
a function here and an entry in `LOSSES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from training.exceptions import RunError

Prior = NDArray[np.float64]
LossFunction = Callable[[Tensor, Tensor, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss closed over its priors.

    `function(logits (B, L), labels (B,))` is the mean loss, in float32 or better whatever the logits are in.
    `logits + logit_offset` is calibrated, up to a temperature, to the prior that the loss was made with.
    """

    name: str
    tau: float | None
    function: LossFunction
    logit_offset: Prior

    def at(self, progress: float) -> LossFunction:  # noqa: ARG002
        """Return the function for the step taken when this share of the steps lies behind."""
        return self.function


def make_loss(name: str, source_prior: Prior, tau: float | None, device: torch.device) -> Loss:
    """Return the named loss for the prior of the images trained on; raises RunError for an unknown name."""
    try:
        return LOSSES[name](source_prior, tau, device)
    except KeyError:
        raise RunError(f"unknown loss '{name}'; known are {', '.join(LOSSES)}") from None


def default_tau(name: str) -> float | None:
    """Return the tau that the named loss has when none is given, None where it has no tau."""
    return 1.0 if name == "logit-adjusted" else None


def cross_entropy(logits: Tensor, labels: Tensor, _generator: torch.Generator | None = None) -> Tensor:
    """Return the mean softmax cross-entropy (Menon et al., 2021, eq. 1). Leaves logit_offset 0."""
    return functional.cross_entropy(_at_least_float32(logits), labels)


def logit_adjusted(logits: Tensor, labels: Tensor, source_prior: Tensor, tau: float) -> Tensor:
    """Return the mean logit-adjusted loss (Menon et al., 2021, eq. 10), source_prior (L,).

    The cross-entropy of f + tau log pi. Leaves logit_offset tau log pi: the loss makes that sum, not f,
    calibrated to pi. At tau = 1 the argmax of f itself minimises the balanced error.
    """
    return functional.cross_entropy(_at_least_float32(logits) + tau * source_prior.log(), labels)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _cross_entropy_loss(source_prior: Prior, tau: float | None, device: torch.device) -> Loss:  # noqa: ARG001
    if tau is not None:
        raise RunError("--tau belongs to the logit-adjusted loss; cross-entropy has none")
    return Loss("cross-entropy", None, cross_entropy, np.zeros(len(source_prior)))


def _logit_adjusted_loss(source_prior: Prior, tau: float | None, device: torch.device) -> Loss:
    if tau is None:
        raise RunError("the logit-adjusted loss needs a tau")
    if not (np.isfinite(tau) and tau >= 0):
        raise RunError(f"--tau must be a finite number, zero or more, not {tau}")
    prior = torch.tensor(source_prior, dtype=torch.float32, device=device)

    def function(logits: Tensor, labels: Tensor, _generator: torch.Generator | None = None) -> Tensor:
        return logit_adjusted(logits, labels, source_prior=prior, tau=tau)

    return Loss("logit-adjusted", tau, function, tau * np.log(source_prior))


LOSSES: dict[str, Callable[[Prior, float | None, torch.device], Loss]] = {
    "cross-entropy": _cross_entropy_loss,
    "logit-adjusted": _logit_adjusted_loss,
}
