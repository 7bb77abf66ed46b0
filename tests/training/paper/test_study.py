"""From outcomes to figures: rankings, groups and tau* on logits that are known."""

from dataclasses import replace

import numpy as np
import pytest

from training.paper import published, rows
from training.paper.figures import FIGURES, report
from training.paper.panels import cifar_panels, deep_panels
from training.paper.plotting import NOT_RUN
from training.paper.runs import Outcome
from training.paper.study import (
    Request,
    Study,
    adjusted_curve,
    chosen_tau,
    measured,
    normalised_curve,
    plain_errors,
)
from training.paper.tables import TABLES
from training.paper.tables import report as table_report

COUNTS = np.array([800, 150, 40, 10])


def outcome(seed=0, per_class=400):
    """A calibrated network on four classes: logits are log P(y | x) of Gaussians, so tau* is 1."""
    rng = np.random.default_rng(seed)
    prior = COUNTS / COUNTS.sum()

    def draw(labels):
        x = rng.normal(0, 1, (len(labels), 4))
        x[np.arange(len(labels)), labels] += 2.0
        return (2.0 * x + np.log(prior)).astype(np.float32)

    test, held = np.repeat(np.arange(4), per_class), np.repeat(np.arange(4), COUNTS)
    return Outcome(
        test_logits=draw(test),
        test_labels=test,
        holdout_logits=draw(held),
        holdout_labels=held,
        trained=COUNTS,
        class_counts=COUNTS,
        norms=np.array([2.0, 1.5, 1.2, 1.0]),
        biases=np.zeros(4),
        seconds=np.array(60.0),
    )


def test_post_hoc_adjustment_ranks_by_f_less_tau_log_prior():
    one = outcome()
    ranked = (one.test_logits - 1.5 * np.log(COUNTS / COUNTS.sum())).argmax(axis=1)
    by_hand = np.mean([(ranked != one.test_labels)[one.test_labels == c].mean() for c in range(4)])
    (point,) = adjusted_curve(one, (1.5,))
    assert point.balanced.error == pytest.approx(by_hand)


def test_weight_normalisation_ranks_by_f_over_a_power_of_the_norm():
    one = outcome()
    ranked = (one.test_logits / one.norms**2).argmax(axis=1)
    by_hand = np.mean([(ranked != one.test_labels)[one.test_labels == c].mean() for c in range(4)])
    (point,) = normalised_curve(one, (2.0,))
    assert point.balanced.error == pytest.approx(by_hand)


def test_tau_star_of_a_calibrated_network_is_near_1_and_no_test_image_decides_it():
    one = outcome()
    tau = chosen_tau(rows.ROWS["post-hoc-best"], one)
    assert 0.7 <= tau <= 1.3
    spoilt = replace(one, test_logits=-one.test_logits)
    assert chosen_tau(rows.ROWS["post-hoc-best"], spoilt) == tau


def test_seeds_average_and_do_not_narrow_the_interval_of_the_test_sample():
    errors = [plain_errors(outcome(seed)) for seed in range(4)]
    one, four = measured(errors[:1]), measured(errors)
    assert four.mean == pytest.approx(np.mean([100 * each.errors.mean() for each in errors]))
    assert (four.high - four.low) > 0.9 * (one.high - one.low)
    assert measured([]) is None


def test_every_row_with_a_printed_value_is_a_row_of_its_table():
    for layout in TABLES.values():
        assert set(layout.printed) <= set(layout.rows)


def test_printed_values_name_panels_that_exist(tmp_path):
    keys = {panel.key for panel in (*cifar_panels("exp", tmp_path), *deep_panels(tmp_path))}
    for table in (published.TABLE2, published.TABLE3, published.TABLE4):
        assert {key for row in table.values() for key in row} <= keys


def test_cells_that_the_paper_copied_are_those_with_a_mark():
    copied = {
        (row, panel)
        for row, cells in published.TABLE2.items()
        for panel, cell in cells.items()
        if cell.copied
    }
    assert len(copied) == 9
    assert ("adaptive", "cifar100-lt") in copied
    assert ("logit-adjusted", "cifar100-lt") not in copied


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_without_data_is_empty_axes_that_say_so(name, tmp_path):
    study = Study(Request(quick=False, seeds=1, data_dir=tmp_path, runs=tmp_path / "runs"))
    made = report(name, study)
    for axes in made.figure.axes:
        assert NOT_RUN in [text.get_text() for text in axes.texts]
    assert NOT_RUN in str(made.rows)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_without_data_holds_the_papers_values_and_none_of_ours(name, tmp_path):
    study = Study(Request(quick=False, seeds=1, data_dir=tmp_path, runs=tmp_path / "runs"))
    made = table_report(name, study)
    assert all(row["ours"] is None and row["note"] == NOT_RUN for row in made.rows)
    assert sum(row["paper"] is not None for row in made.rows) >= 13
