"""The store: a training is found again by what it trains, whatever else happened."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from training.checkpoint import Source
from training.exceptions import RunError
from training.losses import LossOptions
from training.paper import rows
from training.paper.runs import RunStore, run_key
from training.progress import Progress

CPU = torch.device("cpu")


@pytest.fixture
def plan(tiny_study, tiny_panel):
    return tiny_study.plan(tiny_panel, rows.ERM_HELD_OUT, 0)


def test_the_key_changes_with_all_that_changes_the_weights(plan):
    changed = [
        replace(plan, seed=1),
        replace(plan, loss="adaptive"),
        replace(plan, loss_options=LossOptions(deferred_reweighting=True)),
        replace(plan, recipe=replace(plan.recipe, weight_decay=0.1)),
        replace(plan, recipe=replace(plan.recipe, optimizer="adam")),
        replace(plan, holdout=0.0),
        replace(plan, source=replace(plan.source, profile="step")),
    ]
    keys = [run_key(other, "f") for other in [plan, *changed]] + [run_key(plan, "g")]
    assert len(set(keys)) == len(keys)


def test_the_key_does_not_change_with_where_the_images_lie(plan):
    moved = replace(plan, source=Source("npz", train_file="/a.npz", test_file="/b.npz", data_dir="/c"))
    assert run_key(moved, "f") == run_key(plan, "f")


def test_a_field_at_its_default_leaves_the_key_of_a_plan_that_did_not_have_it(plan):
    assert run_key(replace(plan, loss_options=LossOptions(), head=None), "f") == run_key(plan, "f")
    assert run_key(plan, "f") == run_key(plan, "f")


@pytest.mark.slow
def test_a_finished_run_is_found_again_and_not_trained_again(plan, tmp_path, monkeypatch):
    store = RunStore(tmp_path / "runs")
    assert store.finished(plan) is None
    outcome = store.train(plan, device=CPU, progress=Progress())
    assert outcome.test_logits.shape == (120, 4)
    assert outcome.holdout_logits.shape == (len(outcome.holdout_labels), 4)
    assert outcome.trained.sum() + len(outcome.holdout_labels) == outcome.class_counts.sum()
    assert (outcome.norms > 0).all()
    found = RunStore(tmp_path / "runs").finished(plan)
    np.testing.assert_array_equal(found.test_logits, outcome.test_logits)
    # a run whose evaluation was lost is evaluated again, from its checkpoint
    (store.folder(plan) / "outcome.npz").unlink()
    again = store.train(plan, device=CPU, progress=Progress())
    np.testing.assert_array_equal(again.test_logits, outcome.test_logits)
    assert again.seconds == outcome.seconds


def test_a_damaged_outcome_is_named(plan, tmp_path):
    store = RunStore(tmp_path / "runs")
    folder = store.folder(plan)
    folder.mkdir(parents=True)
    (folder / "outcome.npz").write_bytes(b"no archive")
    with pytest.raises(RunError, match=r"outcome\.npz is damaged"):
        store.finished(plan)
