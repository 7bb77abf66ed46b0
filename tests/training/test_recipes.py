"""Schedules, step by step."""

from dataclasses import replace
from itertools import pairwise

import pytest

from training.exceptions import RunError
from training.recipes import COSINE, PAPER, PAPER_200, RECIPES, with_optimizer


def test_the_cosine_climbs_for_a_tenth_and_then_falls_to_zero():
    rates = [COSINE.rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.2 / 100)
    assert max(rates) == pytest.approx(0.2)
    assert rates.index(max(rates)) in (99, 100)
    assert rates[550] == pytest.approx(0.1, abs=1e-3)
    assert rates[-1] < 1e-5
    assert all(later < earlier for earlier, later in pairwise(rates[100:]))


def test_the_papers_recipe_warms_up_for_2000_of_120000_steps_and_drops_three_times():
    rate = lambda step: PAPER.rate(step, 120_000)  # noqa: E731
    assert rate(1_999) == pytest.approx(0.1)
    assert rate(999) == pytest.approx(0.05)
    for drop, before, after in ((60_000, 0.1, 0.01), (90_000, 0.01, 0.001), (110_000, 0.001, 0.0001)):
        assert rate(drop - 1) == pytest.approx(before)
        assert rate(drop) == pytest.approx(after)


def test_the_200_epoch_recipe_drops_at_160_and_180():
    assert [round(PAPER_200.rate(epoch, 200), 6) for epoch in (159, 160, 179, 180)] == [
        0.1,
        0.01,
        0.01,
        0.001,
    ]


def test_a_run_of_one_step_has_a_rate():
    assert all(recipe.rate(0, 1) > 0 for recipe in RECIPES.values())


def test_images_are_small_for_the_first_share_of_the_steps_and_whole_after_it():
    recipe = replace(COSINE, small_side=0.75, small_until=0.4)
    sides = [recipe.side(32, step, 10) for step in range(10)]
    assert sides == [24] * 4 + [32] * 6
    assert recipe.side(1, 0, 10) == 1
    assert {COSINE.side(32, step, 10) for step in range(10)} == {32}


def test_adam_changes_the_optimiser_and_the_peak_and_nothing_else():
    adam = with_optimizer(PAPER, "adam")
    assert (adam.optimizer, adam.peak_rate) == ("adam", 1e-3)
    assert adam.__dict__ | {"optimizer": "sgd", "peak_rate": PAPER.peak_rate} == PAPER.__dict__
    assert with_optimizer(PAPER, None) is with_optimizer(PAPER, "sgd") is PAPER
    with pytest.raises(RunError, match="a learning rate for Adam, not for SGD"):
        with_optimizer(adam, "sgd")
