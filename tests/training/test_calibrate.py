"""What held-out logits decide, on networks whose right answers are known."""

import numpy as np
import pytest

from longtail.adjustment import scores
from longtail.metrics import balanced_error
from training.calibrate import calibrate, errors_at, groups_of, offset_of, prior_weights

COUNTS = np.array([900, 300, 100, 99, 21, 20, 1])
PRIOR = COUNTS / COUNTS.sum()


def sample(n, offset, temperature, seed=0):
    """Logits f with softmax((f + offset) / temperature) calibrated to PRIOR, and labels drawn from it."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(PRIOR), n, p=PRIOR)
    x = rng.normal(0, 1, (n, len(PRIOR)))
    x[np.arange(n), labels] += 2.0
    # Gaussian classes of equal spread: log p(y | x) = 2 x_y + constant
    return temperature * (2 * x + np.log(PRIOR)) - offset, labels


def test_groups_are_the_papers_with_their_bounds():
    groups = groups_of(COUNTS)
    assert [(g.name, g.at_least, g.at_most, g.indices) for g in groups] == [
        ("many", 100, None, [0, 1, 2]),
        ("medium", 21, 99, [3, 4]),
        ("few", None, 20, [5, 6]),
    ]


def test_a_group_without_a_class_is_left_out():
    assert [group.name for group in groups_of(np.array([500, 5]))] == ["many", "few"]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("offset", [np.zeros(7), np.log(PRIOR)])
def test_temperature_and_tau_of_a_calibrated_network_are_found(temperature, offset):
    logits, labels = sample(6_000, offset, temperature)
    found = calibrate(logits, labels, logit_offset=offset, source_prior=PRIOR, groups=groups_of(COUNTS))
    assert found.temperature == pytest.approx(temperature, rel=0.08)
    assert found.tau == pytest.approx(temperature, abs=0.31)  # tau = T is Bayes' rule here
    assert found.calibration.temperature == "fitted"
    assert found.calibration.images == 6_000
    assert not found.calibration.tau_at_edge


def test_a_pick_at_the_end_of_the_grid_is_said():
    logits, labels = sample(6_000, np.zeros(7), 6.0)
    found = calibrate(logits, labels, logit_offset=np.zeros(7), source_prior=PRIOR, groups=groups_of(COUNTS))
    assert (found.tau, found.calibration.tau_at_edge) == (4.0, True)


def test_the_curve_holds_the_errors_of_the_formula_at_each_tau():
    logits, labels = sample(3_000, np.zeros(7), 1.0)
    found = calibrate(logits, labels, logit_offset=np.zeros(7), source_prior=PRIOR, groups=groups_of(COUNTS))
    assert [point.tau for point in found.tau_curve] == [step / 10 for step in range(41)]
    for point in found.tau_curve[::10]:
        ranked = scores(logits, np.zeros(7), PRIOR, np.full(7, 1 / 7), point.tau)
        assert point.balanced_error.error == pytest.approx(balanced_error(labels, ranked.argmax(1), 7))
        assert point.balanced_error.low <= point.balanced_error.error <= point.balanced_error.high
    chosen = next(point for point in found.tau_curve if point.tau == found.tau)
    assert chosen.log_loss == min(point.log_loss for point in found.tau_curve)


def test_without_held_out_images_the_temperature_is_one_and_there_is_no_tau():
    found = calibrate(
        np.empty((0, 7)),
        np.empty(0, dtype=np.int64),
        logit_offset=np.zeros(7),
        source_prior=PRIOR,
        groups=groups_of(COUNTS),
    )
    assert (found.temperature, found.tau, found.tau_curve) == (1.0, None, [])
    assert found.calibration.temperature == "unfitted"


def test_a_class_without_an_image_has_no_error_and_the_mean_says_how_many_it_covers():
    logits, labels = sample(500, np.zeros(7), 1.0)
    keep = labels != 6
    (point,) = errors_at(
        [1.0],
        logits[keep],
        labels[keep],
        logit_offset=np.zeros(7),
        source_prior=PRIOR,
        groups=groups_of(np.array([900, 300, 100, 99, 99, 99, 1])),
    )
    few = next(mean for mean in point.groups if mean.group == "few")
    assert (few.error, few.low, few.high, few.labels) == (None, 0, 1, 0)
    assert (point.balanced_error.classes, point.balanced_error.classes_with_labels) == (7, 6)


def test_a_known_offset_is_kept_whatever_the_held_out_images_say():
    logits, labels = sample(2_000, np.log(PRIOR), 1.0)
    assert offset_of(np.zeros(7), "known", logits, labels) == (pytest.approx(np.zeros(7)), "known")


def test_an_offset_to_be_fitted_is_found_and_held_near_its_start_where_labels_are_few():
    offset = np.array([0.0, 0.4, -0.8, 0.5, -1.0, 0.7, 3.0])
    logits, labels = sample(20_000, offset, 1.0)
    found, origin = offset_of(np.zeros(7), "fitted", logits, labels)
    assert origin == "fitted"
    often = PRIOR > 0.01
    np.testing.assert_allclose(
        (found - found[0])[often], (offset - offset[0])[often], atol=0.15
    )  # 280 labels or more a class
    few, origin = offset_of(np.zeros(7), "fitted", logits[:300], labels[:300])
    assert origin == "fitted"
    assert np.abs(few - few[0]).max() < 0.5 * np.ptp(offset)  # not a label of the class that is 3 off


def test_an_offset_that_nothing_can_be_fitted_on_stays_and_is_called_assumed():
    start = np.arange(7.0)
    for logits, labels in (
        (np.empty((0, 7)), np.empty(0, dtype=np.int64)),
        (20 * np.eye(7), np.arange(7)),  # each label is its row's maximum: no finite temperature is best
    ):
        found, origin = offset_of(start, "fitted", logits, labels)
        assert (found.tolist(), origin) == (start.tolist(), "assumed")


def test_weights_bring_balanced_labels_to_the_training_mix():
    labels = np.repeat(np.arange(7), 30)
    weights = prior_weights(labels, PRIOR)
    np.testing.assert_allclose(np.bincount(labels, weights) / weights.sum(), PRIOR)
