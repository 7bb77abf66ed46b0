"""The words that choose a loss: what it says of itself, and which words are refused in one line."""

import pytest

from tests.training.made_losses import COUNTS, CPU, made
from training.exceptions import RunError
from training.losses import LOSSES, LossOptions, default_tau, make_loss


def test_a_loss_says_what_it_was_made_with_and_which_head_it_needs():
    assert made("cross-entropy").options == {}
    assert made("equalised").options == {}
    assert made("equalised", gamma=0.5).options == {"gamma": 0.5, "rare_below": 0.125}
    assert made("ldam", deferred_reweighting=True, label_smoothing=0.1).options == {
        "margin": 0.5,
        "deferred_reweighting": True,
        "beta": 0.9999,
        "label_smoothing": 0.1,
    }
    assert {name for name in LOSSES if made(name).head != "linear"} == {"ldam"}
    assert made("ldam").head == "cosine"
    assert make_loss("balanced", COUNTS, None, CPU, head="normalised").head == "normalised"
    assert (default_tau("logit-adjusted"), default_tau("cross-entropy")) == (1.0, None)


@pytest.mark.parametrize(
    ("name", "words", "reason"),
    [
        ("hinge", {"tau": 1.0}, "unknown loss 'hinge'; known are cross-entropy, balanced, class-balanced"),
        ("logit-adjusted", {"tau": -0.1}, "--tau must be a finite number, zero or more, not -0.1"),
        ("logit-adjusted", {"tau": float("nan")}, "--tau must be a finite number"),
        ("logit-adjusted", {"tau": float("inf")}, "--tau must be a finite number"),
        ("pairwise", {"tau1": -1.0}, "--tau1 must be a finite number, zero or more, not -1"),
        ("pairwise", {"tau2": float("inf")}, "--tau2 must be a finite number"),
        ("class-balanced", {"beta": 1.0}, "--beta must be at least 0 and below 1, not 1"),
        ("class-balanced", {"beta": -0.5}, "--beta must be at least 0 and below 1"),
        (
            "cross-entropy",
            {"beta": 2.0, "deferred_reweighting": True},
            "--beta must be at least 0 and below 1",
        ),
        ("equalised-mask", {"gamma": 1.0}, "--gamma must be at least 0 and below 1"),
        ("equalised-mask", {"rare_below": 1.5}, "--rare-below must be a share between 0 and 1"),
        ("ldam", {"margin": -1.0}, "--margin must be a finite number, zero or more"),
        ("cross-entropy", {"label_smoothing": 1.0}, "--label-smoothing must be at least 0 and below 1"),
        (
            "equalised-mask",
            {"label_smoothing": 0.1},
            "--label-smoothing does not go with --loss equalised-mask",
        ),
        ("equalised", {"rare_below": 0.1}, "--rare-below needs --gamma with --loss equalised"),
        (
            "cross-entropy",
            {"tau": 1.0},
            "--tau does not go with --loss cross-entropy,"
            " but with --loss logit-adjusted or --loss logit-adjusted-adaptive",
        ),
        ("balanced", {"beta": 0.9}, "but with --loss class-balanced or --deferred-reweighting"),
        (
            "logit-adjusted",
            {"tau1": 1.0},
            "--tau1 does not go with --loss logit-adjusted, but with --loss pairwise",
        ),
        ("adaptive", {"margin": 0.5}, "--margin does not go with --loss adaptive, but with --loss ldam"),
        ("ldam", {"gamma": 0.5}, "--gamma does not go with --loss ldam"),
    ],
)
def test_bad_words_are_refused_in_one_line_that_names_them(name, words, reason):
    tau = words.pop("tau", None)
    with pytest.raises(RunError) as refusal:
        make_loss(name, COUNTS, tau, CPU, options=LossOptions(**words))
    assert reason in str(refusal.value)


def test_a_class_without_an_image_and_a_head_without_cosines_are_refused():
    with pytest.raises(RunError, match="class 1 has no image to train on"):
        make_loss("cross-entropy", [3, 0, 2], None, CPU)
    with pytest.raises(
        RunError, match="--head linear does not go with --loss ldam: its margin is on cosines"
    ):
        make_loss("ldam", COUNTS, None, CPU, head="linear")
