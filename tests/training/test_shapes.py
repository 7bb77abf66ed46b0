"""shapes-lt as the issue of a data set: sizes, groups, variety, and the same images every time."""

import numpy as np

from training import shapes
from training.calibrate import groups_of
from training.shapes import CLASS_LABELS, draw_shapes


def test_it_has_24_classes_in_all_three_groups_and_100_test_images_each():
    made = draw_shapes("exp", 100.0)
    counts = made.class_counts
    assert len(set(made.class_labels)) == 24
    assert (counts[0], counts[-1]) == (500, 5)
    assert (np.diff(counts) < 0).all()
    assert [group.name for group in groups_of(counts)] == ["many", "medium", "few"]
    assert np.bincount(made.test.labels).tolist() == [100] * 24
    assert made.train.images.shape == (2725, 32, 32, 3)
    images = made.train.images.reshape(2725, -1)
    assert len(np.unique(images, axis=0)) == 2725  # no image twice
    assert not set(map(bytes, images)) & set(map(bytes, made.test.images.reshape(2400, -1)))


def test_it_is_the_same_in_every_run_and_a_steeper_tail_lies_inside_it(monkeypatch):
    monkeypatch.setattr(shapes, "LARGEST", 50)
    monkeypatch.setattr(shapes, "TEST_PER_CLASS", 1)
    steep, flat = draw_shapes("exp", 25.0), draw_shapes("exp", 12.5)
    for index in range(len(CLASS_LABELS)):
        few = steep.train.images[steep.train.labels == index]
        np.testing.assert_array_equal(few, flat.train.images[flat.train.labels == index][: len(few)])


def test_outlines_and_fills_are_spread_over_the_tail():
    for part in (0, 1):
        words = [label.split()[part] for label in CLASS_LABELS]
        for word in set(words):
            places = [place for place, other in enumerate(words) if other == word]
            assert min(places) < 8
            assert max(places) >= 16
