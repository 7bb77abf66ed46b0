"""The store: a training is found again by what it trains, whatever else happened."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

from training import checkpoint as checkpoints
from training.checkpoint import Plan, Source
from training.exceptions import RunError
from training.losses import LossOptions
from training.paper import rows
from training.paper.runs import RunStore, Target, run_key
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
    targets = [Target(other) for other in [plan, *changed]] + [Target(plan, "crt"), Target(plan, "lws")]
    keys = [run_key(target, "f") for target in targets] + [run_key(Target(plan), "g")]
    assert len(set(keys)) == len(keys)


def test_the_key_does_not_change_with_where_the_images_lie(plan):
    moved = replace(plan, source=Source("npz", train_file="/a.npz", test_file="/b.npz", data_dir="/c"))
    assert run_key(Target(moved), "f") == run_key(Target(plan), "f")


def test_a_field_at_its_default_is_not_in_the_key(plan):
    @dataclass(frozen=True)
    class LaterPlan(Plan):
        added_later: int = 0

    later = LaterPlan(**{part.name: getattr(plan, part.name) for part in fields(plan)})
    assert run_key(Target(later), "f") == run_key(Target(plan), "f")
    assert run_key(Target(replace(later, added_later=1)), "f") != run_key(Target(plan), "f")


@pytest.mark.slow
def test_a_finished_run_is_found_again_and_not_trained_again(plan, tmp_path, monkeypatch):
    store = RunStore(tmp_path / "runs")
    assert store.finished(Target(plan)) is None
    outcome = store.train(Target(plan), device=CPU, progress=Progress())
    assert outcome.test_logits.shape == (120, 4)
    assert outcome.holdout_logits.shape == (len(outcome.holdout_labels), 4)
    assert outcome.trained.sum() + len(outcome.holdout_labels) == outcome.class_counts.sum()
    assert (outcome.norms > 0).all()
    found = RunStore(tmp_path / "runs").finished(Target(plan))
    np.testing.assert_array_equal(found.test_logits, outcome.test_logits)
    # a run whose evaluation was lost is evaluated again, from its checkpoint
    (store.folder(Target(plan)) / "outcome.npz").unlink()
    again = store.train(Target(plan), device=CPU, progress=Progress())
    np.testing.assert_array_equal(again.test_logits, outcome.test_logits)
    assert again.seconds == outcome.seconds


def test_a_damaged_outcome_is_named(plan, tmp_path):
    store = RunStore(tmp_path / "runs")
    folder = store.folder(Target(plan))
    folder.mkdir(parents=True)
    (folder / "outcome.npz").write_bytes(b"no archive")
    with pytest.raises(RunError, match=r"outcome\.npz is damaged"):
        store.finished(Target(plan))


@pytest.mark.slow
@pytest.mark.parametrize("training", [rows.CRT, rows.LWS], ids=lambda training: training.name)
def test_a_second_stage_changes_the_head_of_its_first_and_nothing_below(
    training, tiny_study, tiny_panel, tmp_path
):
    store = RunStore(tmp_path / "runs")
    target = tiny_study.target(tiny_panel, training, 0)
    first = store.train(target.first, device=CPU, progress=Progress())
    second = store.train(target, device=CPU, progress=Progress())
    assert store.folder(target) != store.folder(target.first)
    assert not np.array_equal(first.norms, second.norms)
    state, staged = (
        checkpoints.load(store.folder(each) / checkpoints.FILE).network for each in (target.first, target)
    )
    assert torch.equal(state["stem.weight"], staged["backbone.stem.weight"])


def test_a_second_stage_without_its_first_is_refused(tiny_study, tiny_panel, tmp_path):
    target = tiny_study.target(tiny_panel, rows.CRT, 0)
    with pytest.raises(RunError, match="no checkpoint"):
        RunStore(tmp_path / "runs").train(target, device=CPU, progress=Progress())
