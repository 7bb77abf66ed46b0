"""The cuts that every figure depends on: which images are in the tail, and which are held out."""

import hashlib

import numpy as np
import pytest

from training import data
from training.calibrate import groups_of
from training.data import (
    Dataset,
    Examples,
    channel_statistics,
    long_tail,
    normalisation_of,
    profile_counts,
    rounded_share,
    split,
)
from training.exceptions import DataError


def dataset(counts, **more) -> Dataset:
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.arange(len(labels) * 12, dtype=np.uint32).astype(np.uint8).reshape(-1, 2, 2, 3)
    names = tuple(f"class {c}" for c in range(len(counts)))
    return Dataset("made", names, Examples(images, labels), Examples(images[:0], labels[:0]), **more)


@pytest.mark.parametrize(
    ("classes", "largest", "ratio", "total", "smallest"),
    [
        (10, 5000, 10, 20_431, 500),
        (10, 5000, 50, 13_996, 100),
        (10, 5000, 100, 12_406, 50),
        (10, 5000, 200, 11_203, 25),
        (100, 500, 10, 19_573, 50),
        (100, 500, 50, 12_608, 10),
        (100, 500, 100, 10_847, 5),
        (100, 500, 200, 9_502, 2),
    ],
)
def test_exponential_counts_are_the_published_ones(classes, largest, ratio, total, smallest):
    counts = profile_counts("exp", largest, ratio, classes)
    assert (sum(counts), counts[0], counts[-1]) == (total, largest, smallest)


@pytest.mark.parametrize(
    ("classes", "largest", "ratio", "total"),
    [
        (10, 5000, 10, 27_500),
        (10, 5000, 50, 25_500),
        (10, 5000, 100, 25_250),
        (10, 5000, 200, 25_125),
        (100, 500, 10, 27_500),
        (100, 500, 50, 25_500),
        (100, 500, 100, 25_250),
        (100, 500, 200, 25_100),
    ],
)
def test_step_counts_are_the_published_ones(classes, largest, ratio, total):
    assert sum(profile_counts("step", largest, ratio, classes)) == total


@pytest.mark.parametrize(
    ("profile", "classes", "ratio", "sizes"),
    [
        ("exp", 100, 10, (70, 30, 0)),
        ("exp", 100, 50, (41, 40, 19)),
        ("exp", 100, 100, (35, 34, 31)),
        ("exp", 100, 200, (31, 29, 40)),
        ("exp", 10, 10, (10, 0, 0)),
        ("exp", 10, 50, (10, 0, 0)),
        ("exp", 10, 100, (8, 2, 0)),
        ("exp", 10, 200, (7, 3, 0)),
        ("step", 10, 100, (5, 5, 0)),
        ("step", 100, 100, (50, 0, 50)),
    ],
)
def test_groups_have_the_sizes_that_the_counts_give(profile, classes, ratio, sizes):
    counts = np.array(profile_counts(profile, 50_000 // classes, ratio, classes))
    found = {group.name: len(group.indices) for group in groups_of(counts)}
    assert tuple(found.get(name, 0) for name in ("many", "medium", "few")) == sizes


def test_cifar10_counts_at_ratio_100_are_listed_right():
    expected = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert profile_counts("exp", 5000, 100, 10) == expected


@pytest.mark.parametrize(
    ("classes", "each", "index", "ranks"),
    [
        (10, 5000, 0, [398, 3833, 4836, 4572, 636]),
        (10, 5000, 9, [2204, 3816, 2206, 2507, 1926]),
        (100, 500, 0, [90, 254, 283, 445, 461]),
        (100, 500, 99, [348, 153, 363, 361, 299]),
    ],
)
def test_the_images_kept_are_those_of_the_published_selection(classes, each, index, ranks):
    labels = np.repeat(np.arange(classes), each)
    kept = long_tail(labels, [each] * classes)
    assert (kept[labels[kept] == index][:5] - index * each).tolist() == ranks


def test_the_selection_neither_reads_nor_moves_numpys_global_stream():
    labels = np.repeat(np.arange(3), 50)
    np.random.seed(1)
    first, drawn = long_tail(labels, [50, 20, 5]), np.random.random()
    np.random.seed(1)
    assert np.random.random() == drawn
    np.testing.assert_array_equal(first, long_tail(labels, [50, 20, 5]))


def test_a_steeper_tail_lies_inside_a_flatter_one():
    labels = np.repeat(np.arange(10), 500)
    flat = long_tail(labels, profile_counts("exp", 500, 10, 10))
    steep = long_tail(labels, profile_counts("exp", 500, 100, 10))
    assert set(steep) < set(flat)


@pytest.mark.parametrize("ratio", [0.5, 0, -1, float("nan"), float("inf")])
def test_an_imbalance_ratio_below_one_is_refused(ratio):
    with pytest.raises(DataError, match="imbalance ratio"):
        profile_counts("exp", 500, ratio, 10)


def test_an_unknown_profile_is_refused_by_name():
    with pytest.raises(DataError, match="unknown profile 'linear'; known are exp, step"):
        profile_counts("linear", 500, 10, 10)


def test_a_tenth_rounded_half_up_is_held_out_and_nothing_below_five_images():
    counts = [500, 44, 25, 15, 14, 5, 4, 1]
    cut = split(dataset(counts), 0.1, seed=0)
    assert np.bincount(cut.holdout.labels, minlength=8).tolist() == [50, 4, 3, 2, 1, 1, 0, 0]
    assert len(cut.trained) + len(cut.holdout) == sum(counts)


def test_half_held_out_still_leaves_an_image_of_each_class():
    cut = split(dataset([9, 5, 1]), 0.5, seed=0)
    assert np.bincount(cut.trained.labels, minlength=3).tolist() == [4, 2, 1]


def test_held_out_and_trained_images_do_not_overlap():
    made = dataset([40, 30])
    cut = split(made, 0.2, seed=5)
    together = np.concatenate([cut.trained.images, cut.holdout.images]).reshape(70, -1)
    np.testing.assert_array_equal(
        np.sort(together.view("u1,u1,u1,u1,u1,u1,u1,u1,u1,u1,u1,u1").ravel()),
        np.sort(made.train.images.reshape(70, -1).view("u1,u1,u1,u1,u1,u1,u1,u1,u1,u1,u1,u1").ravel()),
    )


def test_the_seed_decides_which_images_are_held_out():
    made = dataset([100, 50])
    one, same, other = (split(made, 0.1, seed).holdout.images for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_holding_nothing_out_trains_on_all():
    cut = split(dataset([10, 5]), 0.0, seed=0)
    assert (len(cut.trained), len(cut.holdout)) == (15, 0)


def test_a_data_sets_own_held_out_images_are_kept_and_count_for_the_groups():
    own = Examples(np.zeros((3, 2, 2, 3), np.uint8), np.array([0, 0, 1]))
    made = dataset([10, 5], holdout=own)
    assert made.class_counts.tolist() == [12, 6]
    assert len(split(made, 0.1, seed=0).holdout) == 3
    assert len(split(made, 0.0, seed=0).trained) == 18


@pytest.mark.parametrize("share", [-0.1, 0.6, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(DataError, match="held-out share"):
        split(dataset([10, 5]), share, seed=0)


def test_a_class_without_an_image_is_named():
    with pytest.raises(DataError, match="class 'class 1' has no training image"):
        dataset([4, 0, 2])


@pytest.mark.parametrize(
    ("names", "reason"),
    [(("a", "a"), "the same name"), (("a", ""), "1 to 1,000 characters"), (("a", "b" * 1001), "1 to 1,000")],
)
def test_names_that_a_manifest_could_not_hold_are_refused_before_training(names, reason):
    made = dataset([3, 2])
    with pytest.raises(DataError, match=reason):
        Dataset("made", names, made.train, made.test)


def test_one_class_is_no_classifier():
    with pytest.raises(DataError, match="at least two classes"):
        dataset([4])


def test_a_changed_pixel_or_label_changes_the_fingerprint():
    made = dataset([4, 2])
    pixel, label = dataset([4, 2]), dataset([4, 2])
    pixel.train.images[0, 0, 0, 0] += 1
    label.train.labels[0] = 1
    assert len({made.fingerprint(), pixel.fingerprint(), label.fingerprint()}) == 3


def test_images_in_memory_keep_the_fingerprint_that_older_checkpoints_carry():
    made = dataset([4, 2])
    content = b"class 0\0class 1" + made.train.images.tobytes() + made.train.labels.astype("<i8").tobytes()
    assert made.fingerprint() == hashlib.sha256(content).hexdigest()


def test_a_customary_normalisation_goes_before_the_images_own():
    made = dataset([4, 2], normalisation=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    assert normalisation_of(made, made.train) == made.normalisation
    assert normalisation_of(dataset([4, 2]), made.train) == channel_statistics([made.train.images])


def test_of_very_many_images_some_spread_over_all_are_looked_at(monkeypatch):
    monkeypatch.setattr(data, "_STATISTICS_IMAGES", 3)
    made = dataset([4, 1])
    assert normalisation_of(made, made.train) == channel_statistics([made.train.images[[0, 2, 4]]])


def test_channel_statistics_are_numpys_to_four_decimals():
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    images[..., 2] = 9  # a constant channel
    mean, std = channel_statistics([images[:20], images[20:]])
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), atol=5.1e-5)
    np.testing.assert_allclose(std[:2], (images / 255).std((0, 1, 2))[:2], atol=5.1e-5)
    assert std[2] == round(1 / 255, 4)


@pytest.mark.parametrize(("n", "expected"), [(4, 0), (5, 1), (14, 1), (15, 2), (25, 3)])
def test_shares_are_rounded_half_up(n, expected):
    assert rounded_share(n, 0.1) == expected
