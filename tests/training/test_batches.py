"""Which images a step sees: whole orders, or classes that come equally often."""

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from training.batches import chosen_images

CPU = torch.device("cpu")
COUNTS = (80, 30, 8, 0, 2)  # of class 3 there is no image
SHUFFLED = torch.randperm(120, generator=torch.Generator().manual_seed(0))
LABELS = torch.repeat_interleave(torch.arange(5), torch.tensor(COUNTS))[SHUFFLED]
STEPS = {"seed": 3, "start": 0, "stop": 500, "batch_size": 24, "device": CPU}


def chosen(**changed):
    return list(chosen_images(len(LABELS), **{**STEPS, "balanced_by": LABELS, **changed}))


def test_balanced_batches_draw_every_class_equally_often_and_every_image_of_it():
    places = torch.cat(chosen())
    assert len(places) == 500 * 24
    drawn = torch.bincount(LABELS[places], minlength=5)
    assert drawn[3] == 0
    assert chisquare(drawn[drawn > 0]).pvalue > 0.001
    for label in (0, 1, 2, 4):
        images = Counter(places[LABELS[places] == label].tolist())
        assert len(images) == COUNTS[label]
        assert chisquare(list(images.values())).pvalue > 0.001


@pytest.mark.parametrize("start", [1, 7, 499])
def test_a_balanced_step_is_a_function_of_the_seed_and_its_number(start):
    whole = chosen()
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], chosen(start=start), strict=True))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0], chosen(seed=4)[0])


def test_a_batch_is_at_most_as_large_as_the_data_set():
    assert {len(places) for places in chosen(stop=3, batch_size=500)} == {120}
    assert {len(places) for places in chosen(stop=3, batch_size=500, balanced_by=None)} == {120}
