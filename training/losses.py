"""The losses that can be trained, by name, and the offset that each leaves behind to calibrate its logits.

A loss is a function of logits, labels and constants that `training/margins.py` makes from the class counts.
`make_loss` puts the constants on the device once; what it returns never waits for the device and never
branches on data, so that a whole step can be captured. Another loss is a function there and an entry in
`LOSSES`.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from training import margins
from training.exceptions import RunError
from training.margins import Floats, Margins

DEFERRED_FROM = 0.8  # share of the steps after which re-weighting starts: epoch 160 of Cao et al.'s 200

LossFunction = Callable[[Tensor, Tensor, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class LossOptions:
    """What a loss may be told beside tau, as the command line says it; None is the loss's own default."""

    tau1: float | None = None
    tau2: float | None = None
    beta: float | None = None
    gamma: float | None = None
    rare_below: float | None = None
    margin: float | None = None
    label_smoothing: float | None = None
    deferred_reweighting: bool = False


@dataclass(frozen=True)
class Loss:
    """A loss closed over its constants.

    `function(logits (B, L), labels (B,), generator)` is the mean loss, in float32 or better whatever the
    logits are in; only a loss that draws uses the generator (of the logits' device, None for the global one).
    `deferred` replaces it for the last fifth of the steps. `logits + logit_offset` is calibrated, up to a
    temperature, to the prior of the images trained on; "fitted" says that the offset is a start only, to be
    fitted on held-out images. `head` is what the network must end in.
    """

    name: str
    tau: float | None
    function: LossFunction
    logit_offset: Floats
    offset_status: Literal["known", "fitted"] = "known"
    head: str = "linear"
    deferred: LossFunction | None = None
    options: dict[str, float | bool] = field(default_factory=dict)  # what it was made with, defaults included

    def at(self, progress: float) -> LossFunction:
        """Return the function for the step taken when this share of the steps lies behind."""
        if self.deferred is not None and progress >= DEFERRED_FROM:
            return self.deferred
        return self.function


def make_loss(
    name: str,
    class_counts: npt.ArrayLike,
    tau: float | None,
    device: torch.device,
    *,
    options: LossOptions | None = None,
    head: str | None = None,
) -> Loss:
    """Return the named loss for the counts (L,) of the images trained on; `head` is None for its own.

    Raises RunError for an unknown name, a class without an image, and an option that is out of range or that
    the loss does not take.
    """
    options = options or LossOptions()
    _check(name, tau, options, head)
    kind = LOSSES[name]
    counts = np.asarray(class_counts, dtype=np.float64)
    if not (counts > 0).all():
        raise RunError(f"class {int((counts <= 0).argmax())} has no image to train on")
    given = _given(tau, options)
    settings = {key: given.get(key, default) for key, default in kind.takes.items()}
    if "rare_below" in settings and settings["rare_below"] is None:
        settings["rare_below"] = 0.5 / len(counts)
    smoothing, beta = given.get("label_smoothing", 0.0), given.get("beta", _BETA)
    first = kind.margins(counts, **settings)
    last, deferred = first, None
    if options.deferred_reweighting:
        last = margins.reweighted(first, margins.effective_number_weights(counts, beta), counts)
        deferred = _function(kind, last, smoothing, device)
    said = {key: value for key, value in settings.items() if value is not None and key != "tau"}
    if settings.get("gamma", 0) is None:  # F(p) = p has no threshold
        del said["rare_below"]
    if options.deferred_reweighting:
        said |= {"deferred_reweighting": True, "beta": beta}
    if smoothing:
        said["label_smoothing"] = smoothing
    return Loss(
        name=name,
        tau=settings.get("tau"),
        function=_function(kind, first, smoothing, device),
        logit_offset=last.logit_offset,
        # A fifth of the steps does not bring a network all the way to the minimiser of the re-weighted loss.
        offset_status="known" if last.offset_is_exact and deferred is None else "fitted",
        head=head or kind.head,
        deferred=deferred,
        options=said,
    )


def default_tau(name: str) -> float | None:
    """Return the tau that the named loss has when none is given, None where it has no tau."""
    return _kind(name).takes.get("tau")


def shifted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    weights: Tensor,
    others: Tensor,
    own: Tensor,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the mean of weights_y times the cross-entropy of f raised by own_y at y, by others_j elsewhere.

    Constants are (L,). This is the pairwise loss with D[y, j] = others_j - own_y.
    """
    raw = _at_least_float32(logits)
    shifted = torch.where(_at_label(raw, labels), raw + own, raw + others)
    return _weighted_mean(shifted, labels, weights, label_smoothing)


def masked_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    weights: Tensor,
    drop_rate: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean of weights_y times the cross-entropy among the classes that a random mask keeps.

    Each class but the sample's own is dropped with its chance drop_rate_j (L,), for each sample anew
    (Tan et al., 2020). Dropped logits become -inf before the log-sum-exp, so that nothing overflows.
    """
    raw = _at_least_float32(logits)
    drawn = torch.rand(raw.shape, generator=generator, device=raw.device) < drop_rate
    kept = raw.masked_fill(drawn & ~_at_label(raw, labels), -torch.inf)
    return _weighted_mean(kept, labels, weights, 0.0)


def pairwise_cross_entropy(
    logits: Tensor, labels: Tensor, *, weights: Tensor, table: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Return the mean general pairwise loss (Menon et al., 2021, eq. 11) for any margins D = table (L, L).

    weights_y log(1 + sum_{j != y} exp(D[y, j] + f_j - f_y)); the diagonal of D must be zero.
    """
    return _weighted_mean(_at_least_float32(logits) + table[labels], labels, weights, label_smoothing)


def _weighted_mean(logits: Tensor, labels: Tensor, weights: Tensor, label_smoothing: float) -> Tensor:
    """Average weighted terms over the batch, as eq. 4 does: never divided by the batch's own weights."""
    terms = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return (weights[labels] * terms).mean()


def _at_label(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.arange(logits.shape[1], device=logits.device) == labels[:, None]


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True)
class _Kind:
    """How a named loss makes its constants: `takes` are its options with their defaults."""

    margins: Callable[..., Margins]
    takes: dict[str, float | None] = field(default_factory=dict)
    head: str = "linear"
    form: Literal["shifted", "masked", "table"] = "shifted"


_BETA = 0.9999  # Cui et al.'s scripts, and Cao et al.'s for deferred re-weighting
_GAMMA = 0.9  # with rare_below = 1 / (2 L), BagofTricks' choice for CIFAR-10 (0.05) and CIFAR-100 (0.005)

LOSSES: dict[str, _Kind] = {
    "cross-entropy": _Kind(margins.cross_entropy),
    "balanced": _Kind(margins.balanced),
    "class-balanced": _Kind(margins.class_balanced, {"beta": _BETA}),
    "adaptive": _Kind(margins.adaptive),
    "ldam": _Kind(margins.ldam, {"margin": 0.5}, head="cosine"),
    "equalised": _Kind(margins.equalised, {"gamma": None, "rare_below": None}),
    "equalised-mask": _Kind(margins.equalised_mask, {"gamma": _GAMMA, "rare_below": None}, form="masked"),
    "logit-adjusted": _Kind(margins.logit_adjusted, {"tau": 1.0}),
    "logit-adjusted-adaptive": _Kind(margins.logit_adjusted_adaptive, {"tau": 1.0}),
    "pairwise": _Kind(margins.pairwise, {"tau1": 1.0, "tau2": 1.0}, form="table"),
}


def _kind(name: str) -> _Kind:
    try:
        return LOSSES[name]
    except KeyError:
        raise RunError(f"unknown loss '{name}'; known are {', '.join(LOSSES)}") from None


def _function(kind: _Kind, chosen: Margins, label_smoothing: float, device: torch.device) -> LossFunction:
    """Close the loss over its constants, float32 on the device."""

    def constant(values: Floats) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    weights = constant(chosen.weights)
    if kind.form == "masked":
        drop_rate = constant(chosen.drop_rate)

        def masked(logits: Tensor, labels: Tensor, generator: torch.Generator | None) -> Tensor:
            return masked_cross_entropy(
                logits, labels, weights=weights, drop_rate=drop_rate, generator=generator
            )

        return masked
    if kind.form == "table":
        table = constant(chosen.table)

        def general(logits: Tensor, labels: Tensor, _generator: torch.Generator | None) -> Tensor:
            return pairwise_cross_entropy(
                logits, labels, weights=weights, table=table, label_smoothing=label_smoothing
            )

        return general
    others, own = constant(chosen.others), constant(chosen.own)

    def shifted(logits: Tensor, labels: Tensor, _generator: torch.Generator | None) -> Tensor:
        return shifted_cross_entropy(
            logits, labels, weights=weights, others=others, own=own, label_smoothing=label_smoothing
        )

    return shifted


def _check(name: str, tau: float | None, options: LossOptions, head: str | None) -> None:
    """Raise RunError for an unknown loss, and for options out of range or that it does not take."""
    kind = _kind(name)
    given = _given(tau, options)
    for key, value in given.items():
        allowed, words = _RANGES[key]
        if not (math.isfinite(value) and allowed(value)):
            raise RunError(f"{_option(key)} must be {words}, not {value:g}")
    if given.pop("label_smoothing", 0.0) and kind.form == "masked":
        raise RunError(f"--label-smoothing does not go with --loss {name}: it gives dropped classes a share")
    if options.deferred_reweighting:
        given.pop("beta", None)
    for key in given:
        if key not in kind.takes:
            raise RunError(f"{_option(key)} does not go with --loss {name}, but with {_takers(key)}")
    if name == "equalised" and "rare_below" in given and "gamma" not in given:
        raise RunError("--rare-below needs --gamma with --loss equalised: F(p) = p has no threshold")
    if kind.head == "cosine" and head not in (None, "cosine"):
        raise RunError(f"--head {head} does not go with --loss {name}: its margin is on cosines")


def _given(tau: float | None, options: LossOptions) -> dict[str, float]:
    """Return the numbers that were asked for, by name."""
    words = {"tau": tau, **asdict(options)}
    del words["deferred_reweighting"]
    return {key: value for key, value in words.items() if value is not None}


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(("tau", "tau1", "tau2"), (lambda v: v >= 0, "a finite number, zero or more")),
    **dict.fromkeys(("beta", "gamma", "label_smoothing"), (lambda v: 0 <= v < 1, "at least 0 and below 1")),
    "rare_below": (lambda v: 0 <= v <= 1, "a share between 0 and 1"),
    "margin": (lambda v: v >= 0, "a finite number, zero or more"),
}


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _takers(key: str) -> str:
    names = [f"--loss {name}" for name, kind in LOSSES.items() if key in kind.takes]
    return " or ".join([*names, *(["--deferred-reweighting"] if key == "beta" else [])])
