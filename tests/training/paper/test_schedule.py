"""Training what is lacking: within a time limit, side by side, and past a run that fails."""

import time
from dataclasses import replace

import pytest

from training.paper import rows
from training.paper.runs import RunStore, Target
from training.paper.schedule import Job, train_all

pytestmark = pytest.mark.slow


def job(study, panel, training=rows.ERM, seed=0, **changes):
    return Job(f"{training.name} {seed}", Target(replace(study.plan(panel, training, seed), **changes)))


def test_a_job_out_of_time_keeps_its_steps_and_goes_on(tiny_study, tiny_panel, tmp_path):
    long = job(tiny_study, tiny_panel, epochs=100_000)
    (end,) = train_all([long], tmp_path, device="cpu", at_once=1, deadline=time.monotonic() + 4)
    assert not end.finished
    assert end.reason == ""
    log = RunStore(tmp_path).folder(long.target) / "log.csv"
    steps = len(log.read_text().splitlines())
    assert steps > 1
    train_all([long], tmp_path, device="cpu", at_once=1, deadline=time.monotonic() + 4)
    assert len(log.read_text().splitlines()) > steps


def test_no_time_trains_nothing(tiny_study, tiny_panel, tmp_path):
    ends = train_all(
        [job(tiny_study, tiny_panel)], tmp_path, device="cpu", at_once=1, deadline=time.monotonic() - 1
    )
    assert [end.finished for end in ends] == [False]
    assert not any(tmp_path.iterdir())


def test_a_run_that_fails_is_told_of_and_the_others_are_trained(tiny_study, tiny_panel, tmp_path):
    wild = replace(tiny_panel.recipe, peak_rate=1e30)
    jobs = [job(tiny_study, tiny_panel, recipe=wild), job(tiny_study, tiny_panel)]
    ends = train_all(jobs, tmp_path, device="cpu", at_once=1, deadline=None)
    assert [end.finished for end in ends] == [False, True]
    assert "finite" in ends[0].reason


def test_runs_side_by_side_give_the_weights_of_runs_in_turn(tiny_study, tiny_panel, tmp_path):
    jobs = [job(tiny_study, tiny_panel, seed=seed) for seed in (0, 1)]
    train_all(jobs, tmp_path / "turn", device="cpu", at_once=1, deadline=None)
    ends = train_all(jobs, tmp_path / "beside", device="cpu", at_once=2, deadline=None)
    assert all(end.finished for end in ends)
    for each in jobs:
        one, other = (RunStore(tmp_path / name).finished(each.target) for name in ("turn", "beside"))
        assert abs(one.test_logits - other.test_logits).max() < 1e-4
