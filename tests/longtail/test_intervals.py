"""Intervals: against second definitions, at the edges, and held to their coverage by simulation."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binom, binomtest

from longtail.intervals import Z_95, Interval, largest_variance, widened, wilson

# One class


@pytest.mark.parametrize("n", [1, 2, 7, 30, 1_000])
def test_wilson_is_scipys(n):
    for wrong in {0, 1, n // 3, n - 1, n}:
        expected = binomtest(wrong, n).proportion_ci(method="wilson")
        found = wilson(wrong / n, n)
        assert found.low == pytest.approx(expected.low, abs=1e-12)
        assert found.high == pytest.approx(expected.high, abs=1e-12)


@pytest.mark.parametrize(("error", "n"), [(0.3, 10), (0.01, 250), (0.5, 3.7), (0.999, 0.4)])
def test_at_wilsons_ends_the_score_test_is_exactly_undecided(error, n):
    for end in (wilson(error, n).low, wilson(error, n).high):
        assert (error - end) ** 2 == pytest.approx(Z_95**2 * end * (1 - end) / n, rel=1e-9)


def test_wilson_mirrors_when_right_and_wrong_change_places():
    here, there = wilson(0.13, 23), wilson(0.87, 23)
    assert (here.low, here.high) == pytest.approx((1 - there.high, 1 - there.low), abs=1e-12)


def test_nothing_seen_is_anything_possible():
    for error in (0.0, 0.4, math.nan):
        assert wilson(error, 0) == Interval(0.0, 1.0)


def test_no_error_seen_leaves_room_above_and_none_below():
    assert wilson(0.0, 5).low == 0
    assert 0.4 < wilson(0.0, 5).high < 0.5
    assert wilson(1.0, 5).high == 1


@pytest.mark.parametrize("n", [1, 3, 10, 30, 100, 1_000])
def test_wilson_covers_95_percent_on_average_over_rates_and_never_less_than_79(n):
    rates = (np.arange(2_000) + 0.5) / 2_000
    ends = [wilson(wrong / n, n) for wrong in range(n + 1)]
    covers = np.array([(end.low <= rates) & (rates <= end.high) for end in ends])
    coverage = (binom.pmf(np.arange(n + 1)[:, None], n, rates) * covers).sum(axis=0)
    assert 0.945 < coverage.mean() < 0.965
    assert coverage.min() > 0.79


@pytest.mark.parametrize(
    ("error", "n", "z"),
    [
        (-0.1, 5, 2),
        (1.1, 5, 2),
        (math.nan, 5, 2),
        (0.5, -1, 2),
        (0.5, math.nan, 2),
        (0.5, math.inf, 2),
        (0.5, 5, 0),
        (0.5, 5, math.nan),
    ],
)
def test_what_is_no_rate_no_count_or_no_z_is_refused(error, n, z):
    with pytest.raises(ValueError, match=r"error rate|umber.? of labels|z must"):
        wilson(error, n, z)
    with pytest.raises(ValueError, match=r"error rate|umber.? of labels|z must"):
        largest_variance([error], [n], z)


# The mean over classes


def by_the_grid(errors, n, z=Z_95):
    """Return the interval by its definition's steps: rates for many t, V interpolated over 1,001 means."""
    size = len(n)
    u = np.linspace(0, 1, 160) ** 3 / 2
    t = np.unique(np.concatenate([u / n.max(), u / np.median(n), u / n.min()]))
    p = np.clip(0.5 - t[:, None] * n, 0, 1)
    means, variances = p.mean(axis=1), (p * (1 - p) / n).sum(axis=1) / size**2
    order = np.argsort(np.concatenate([means, 1 - means]))
    grid = np.linspace(0, 1, 1_001)
    largest = np.interp(
        grid, np.concatenate([means, 1 - means])[order], np.concatenate([variances] * 2)[order]
    )
    kept = grid[(np.mean(errors) - grid) ** 2 <= z**2 * largest + 2.5e-7]
    return kept[0], kept[-1]


def random_labels(rng):
    size = rng.integers(1, 60)
    n = [rng.integers(1, 4, size), rng.integers(1, 500, size), 10 ** rng.uniform(0, 4, size)][rng.integers(3)]
    rates = [rng.uniform(0, 1, size), np.full(size, 0.02), np.full(size, 0.97), np.zeros(size), np.ones(size)]
    return rng.binomial(np.ceil(n).astype(int), rates[rng.integers(5)]) / np.ceil(n), np.ceil(n)


def test_the_exact_ends_are_the_grids_to_its_step():
    rng = np.random.default_rng(0)
    for _ in range(400):
        errors, n = random_labels(rng)
        low, high = by_the_grid(errors, n)
        found = largest_variance(errors, n)
        assert found.low == pytest.approx(low, abs=1.1e-3)
        assert found.high == pytest.approx(high, abs=1.1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_at_the_ends_an_optimiser_finds_the_variance_that_puts_them_there(seed):
    rng = np.random.default_rng(seed)
    size = 5
    n = np.round(10 ** rng.uniform(0, 2, size))
    errors = rng.binomial(n.astype(int), rng.uniform(0, 1)) / n
    interval = largest_variance(errors, n)
    for end in (interval.low, interval.high):
        if end in (0, 1):
            assert errors.mean() == end
            continue
        least = minimize(
            lambda p: -(p * (1 - p) / n).sum() / size**2,
            np.full(size, end),
            method="SLSQP",
            bounds=[(0, 1)] * size,
            constraints={"type": "eq", "fun": lambda p, end=end: p.mean() - end},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert least.success
        assert (errors.mean() - end) ** 2 == pytest.approx(-(Z_95**2) * least.fun, rel=1e-4)


@pytest.mark.parametrize(("error", "n"), [(0, 4), (0.25, 4), (1, 4), (0.31, 812), (0.5, 2.7)])
def test_one_class_gives_wilson(error, n):
    mean, one = largest_variance([error], [n]), wilson(error, n)
    assert (mean.low, mean.high) == pytest.approx((one.low, one.high), abs=1e-12)


@pytest.mark.parametrize("n_classes", [2, 100, 10_000])
def test_equal_counts_give_wilson_with_all_labels(n_classes):
    errors = np.random.default_rng(2).integers(0, 11, n_classes) / 10
    mean, pooled = largest_variance(errors, np.full(n_classes, 10)), wilson(errors.mean(), 10 * n_classes)
    assert (mean.low, mean.high) == pytest.approx((pooled.low, pooled.high), abs=1e-9)


def test_it_is_never_narrower_than_wilson_at_the_harmonic_number_of_labels():
    rng = np.random.default_rng(4)
    for _ in range(200):
        errors, n = random_labels(rng)
        harmonic = wilson(errors.mean(), len(n) ** 2 / (1 / n).sum())
        found = largest_variance(errors, n)
        assert found.low <= harmonic.low + 1e-9
        assert found.high >= harmonic.high - 1e-9


def test_the_order_of_classes_does_not_matter_and_right_and_wrong_mirror():
    rng = np.random.default_rng(5)
    errors, n = random_labels(rng)
    found, order = largest_variance(errors, n), rng.permutation(len(n))
    shuffled, mirrored = largest_variance(errors[order], n[order]), largest_variance(1 - errors, n)
    assert (shuffled.low, shuffled.high) == pytest.approx((found.low, found.high), abs=1e-12)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-12)


def test_more_labels_never_widen_it():
    rng = np.random.default_rng(6)
    for _ in range(100):
        errors, n = random_labels(rng)
        before = largest_variance(errors, n)
        after = largest_variance(errors, n + rng.integers(0, 5, len(n)))
        assert after.low >= before.low - 1e-12
        assert after.high <= before.high + 1e-12


def test_all_right_starts_at_zero_and_all_wrong_ends_at_one():
    n = [1, 2, 300]
    assert largest_variance([0, 0, 0], n).low == 0
    assert 0.3 < largest_variance([0, 0, 0], n).high < 1
    assert largest_variance([1, 1, 1], n).high == 1


def test_classes_without_labels_are_left_out_and_none_left_is_anything_possible():
    with_gaps = largest_variance([0.1, math.nan, 0.4, 7.0], [10, 0, 5, 0])
    assert with_gaps == largest_variance([0.1, 0.4], [10, 5])
    assert largest_variance([math.nan, math.nan], [0, 0]) == largest_variance([], []) == Interval(0.0, 1.0)


def test_counts_that_differ_by_a_billion_do_not_disturb_it():
    found = largest_variance([0.2, 0.9], [1e9, 1e-3])
    assert 0 <= found.low < 0.2
    assert 0.6 < found.high <= 1


def test_errors_and_counts_of_unequal_shape_are_refused():
    with pytest.raises(ValueError, match="for each class"):
        largest_variance([0.1, 0.2], [3])


def test_the_widened_interval_adds_the_unlabelled_classes_at_both_ends():
    wide = widened(Interval(0.2, 0.5), labelled=6, total=10)
    assert (wide.low, wide.high) == pytest.approx((0.2 * 0.6, 0.5 * 0.6 + 0.4))
    assert widened(Interval(0.2, 0.5), 10, 10) == Interval(0.2, 0.5)
    assert widened(Interval(0.0, 1.0), 0, 10) == Interval(0.0, 1.0)


@pytest.mark.parametrize(("labelled", "total"), [(-1, 5), (6, 5), (0, 0)])
def test_more_labelled_classes_than_classes_are_refused(labelled, total):
    with pytest.raises(ValueError, match="classes with labels"):
        widened(Interval(0.2, 0.5), labelled, total)


# Coverage. A cell is (rates, classes, allocation of labels, labels); rates run from head to tail.


def allocation(kind, size):
    share = 100.0 ** (-np.arange(size) / (size - 1))
    share = {"forward": share, "even": np.ones(size), "backward": share[::-1]}[kind]
    return share / share.sum()


def rates_of(profile, size, share, rng):
    place = np.arange(size) / size
    rates = {
        "ramp": np.linspace(0.1, 0.9, size),
        "split": np.where(place < 0.6, 0.03, 0.5),
        "good": np.linspace(0.02, 0.10, size),
        "half": np.full(size, 0.5),
        "anti": np.where(place < 0.4, 0.5, 0.03),
        "random": rng.uniform(0.1, 0.9, size),
        "needle": np.full(size, 0.01),
    }[profile]
    if profile == "needle":  # the classes with the fewest labels are nearly always wrong
        rates[np.argsort(share, kind="stable")[: max(1, size // 5)]] = 0.9
    return rates


def times_covered(cell, repeats, seed, interval=largest_variance):
    """Return how often the interval held the mean over labelled classes, and widened the mean over all."""
    profile, size, kind, n_labels = cell
    rng = np.random.default_rng(seed)
    share = allocation(kind, size)
    rates = rates_of(profile, size, share, rng)
    n = rng.multinomial(n_labels, share, size=repeats)
    wrong = rng.binomial(n, rates)
    labelled, widened_all = 0, 0
    for x, m in zip(wrong, n, strict=True):
        seen = m > 0
        found = interval(x[seen] / m[seen], m[seen])
        truth = rates[seen].mean()
        labelled += found.low - 1e-12 <= truth <= found.high + 1e-12
        wide = widened(found, int(seen.sum()), size)
        widened_all += wide.low - 1e-12 <= rates.mean() <= wide.high + 1e-12
    return labelled, widened_all


HARD_CELLS = [
    ("split", 100, "forward", 5_000),
    ("split", 35, "forward", 300),
    ("split", 5, "forward", 5_000),
    ("good", 35, "forward", 1_000),
    ("ramp", 10, "forward", 100),
    ("half", 35, "even", 2_000),
    ("half", 10, "even", 300),
    ("half", 100, "backward", 50),
]


@pytest.mark.parametrize("cell", HARD_CELLS, ids=str)
def test_in_the_hardest_cells_both_intervals_cover_at_least_93_percent(cell):
    for covered in times_covered(cell, repeats=1_000, seed=11):
        assert binomtest(covered, 1_000, 0.93, alternative="less").pvalue > 0.001


@pytest.mark.slow
def test_over_the_whole_sweep_both_intervals_cover_at_least_93_percent():
    cells = [
        (profile, size, kind, n_labels)
        for profile in ("ramp", "split", "good", "half", "anti", "random", "needle")
        for size in (5, 10, 35, 100)
        for kind in ("forward", "even", "backward")
        for n_labels in (50, 100, 300, 1_000, 5_000)
    ]
    covered = np.array([times_covered(cell, 400, seed) for seed, cell in enumerate(cells)])
    worst = binomtest(int(covered.min()), 400, 0.93, alternative="less").pvalue
    assert worst > 0.001 / len(cells), cells[int(covered.min(axis=1).argmin())]
    assert covered.mean() / 400 > 0.95


def pooled(errors, n):
    return wilson(float((errors * n).sum() / n.sum()), float(n.sum()))


def harmonic(errors, n):
    return wilson(float(errors.mean()), float(len(n) ** 2 / (1 / n).sum()))


def test_the_judge_of_coverage_refuses_intervals_that_are_too_narrow():
    for interval in (pooled, harmonic):
        worst = min(times_covered(cell, 4_000, 11, interval)[0] for cell in HARD_CELLS[:2])
        assert binomtest(worst, 4_000, 0.93, alternative="less").pvalue < 0.001


def test_not_widened_the_interval_misses_the_mean_over_all_classes():
    rng = np.random.default_rng(12)
    share, rates = allocation("forward", 100), np.linspace(0.1, 0.9, 100)
    covered = 0
    for _ in range(300):
        n = rng.multinomial(100, share)
        seen = n > 0
        found = largest_variance(rng.binomial(n[seen], rates[seen]) / n[seen], n[seen])
        covered += found.low <= rates.mean() <= found.high
    assert covered < 0.5 * 300
