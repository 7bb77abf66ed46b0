"""What is chosen after training, as a bundle is written: the rule for tau*, and the divisor of weights."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

import numpy as np

from bundle.manifest import Metrics, WeightNormalisation
from longtail.normalisation import BiasRule
from longtail.tau import (
    GRID,
    RANKING_RULES,
    TAU_RULES,
    TauRule,
    choose_normalisation_tau,
    normalisation_curve,
)
from training.calibrate import class_lists, manifest_curve, manifest_points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bundle.manifest import Group, TauPoint

Nu = Literal["norm", "prior"]

BIAS_RULES: Final[tuple[BiasRule, ...]] = get_args(BiasRule)
NUS: Final[tuple[Nu, ...]] = get_args(Nu)


@dataclass(frozen=True)
class PostHoc:
    """The choices, as the command line names them. They change no weight of the network."""

    tau_rule: TauRule = "class-mean-log-loss"
    nu: Nu = "norm"
    nu_bias: BiasRule = "divide"


USUAL: Final = PostHoc()


@dataclass(frozen=True, eq=False)
class Head:
    """A linear last layer f = W h + c: the norm of each class's weights and the biases, (L,) each."""

    norms: NDArray[np.float64]
    biases: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Labelled:
    """Logits f (n, L) of images that the weights never saw, with their labels (n,)."""

    logits: NDArray[np.floating]
    labels: NDArray[np.integer]


@dataclass(frozen=True)
class Normalised:
    """What the manifest says of weight normalisation, and its errors on the test images at each tau."""

    part: WeightNormalisation
    test_curve: list[TauPoint]


def normalised(
    head: Head,
    choices: PostHoc,
    *,
    holdout: Labelled,
    test: Labelled,
    source_prior: NDArray[np.float64],
    groups: Sequence[Group],
) -> Normalised:
    """Choose the tau of weight normalisation on held-out images, and measure it.

    Menon et al. (2021), eq. 3; nu is the norm (Kang et al., 2020) or the prior (Kim and Kim, 2020). Scores
    f / nu^tau stand for no posterior, so a rule of calibration says nothing of them: tau* is by class-mean
    log loss then. Without held-out images there is none.
    """
    norms = head.norms if choices.nu == "norm" else source_prior
    rule = next((one for one in RANKING_RULES if one == choices.tau_rule), RANKING_RULES[0])
    members = class_lists(groups)
    tau, at_edge, curve = None, False, []
    if len(holdout.labels):
        chosen = choose_normalisation_tau(
            holdout.logits,
            holdout.labels,
            norms,
            biases=head.biases,
            bias=choices.nu_bias,
            groups=members,
            rule=rule,
        )
        tau, at_edge, curve = chosen.tau, chosen.at_edge, manifest_curve(chosen)
    test_curve: list[TauPoint] = []
    if len(test.labels):
        test_curve = manifest_points(
            normalisation_curve(
                test.logits,
                test.labels,
                norms,
                GRID,
                biases=head.biases,
                bias=choices.nu_bias,
                groups=members,
            )
        )
    shown = {0.0, 1.0, tau}
    part = WeightNormalisation(
        nu=choices.nu,
        norms=norms.tolist(),
        biases=head.biases.tolist(),
        bias=choices.nu_bias,
        tau=tau,
        tau_rule=None if tau is None else rule,
        tau_at_edge=at_edge,
        tau_curve=curve,
        metrics=Metrics(
            holdout=[point for point in curve if point.tau in shown],
            test=[point for point in test_curve if point.tau in shown],
        ),
    )
    return Normalised(part, test_curve)


def add_tau_rule(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the rule for tau*."""
    parser.add_argument(
        "--tau-rule",
        choices=TAU_RULES,
        default=USUAL.tau_rule,
        help="how tau* is chosen on held-out images (default %(default)s)",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each choice."""
    add_tau_rule(parser)
    parser.add_argument(
        "--nu",
        choices=NUS,
        default=USUAL.nu,
        help="what weight normalisation divides a logit by: the norm of its class's weights, or its prior"
        " (default %(default)s)",
    )
    parser.add_argument(
        "--nu-bias",
        choices=BIAS_RULES,
        default=USUAL.nu_bias,
        help="what it does with the head's bias (default %(default)s)",
    )


def choices_of(options: argparse.Namespace) -> PostHoc:
    """Return the choices that the command line made."""
    return PostHoc(tau_rule=options.tau_rule, nu=options.nu, nu_bias=options.nu_bias)
