"""A run ends well whatever happens: a kill at any step, a checkpoint amid an epoch, a loss that is NaN."""

import multiprocessing
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.killed_run import fit_and_die
from training import checkpoint as checkpoints
from training import run as run_module
from training.checkpoint import Plan, Source
from training.data import split
from training.exceptions import RunError
from training.fit import main
from training.npz import read_npz
from training.progress import Progress
from training.ranks import Ranks
from training.recipes import COSINE, RECIPES, with_optimizer
from training.run import check_shares, train

CPU = torch.device("cpu")
_STATE = {"sgd": {"momentum_buffer"}, "adam": {"exp_avg", "exp_avg_sq", "step"}}


@pytest.fixture
def run_tiny(tiny_files, tmp_path):
    """Train on the tiny data set, eleven steps an epoch, by a recipe changed as told."""

    def run(every_s=0.0, resume=False, folder="run", epochs=2, **recipe):
        dataset = read_npz(*tiny_files)
        plan = Plan(
            source=Source("npz"),
            network="resnet20",
            loss="cross-entropy",
            tau=None,
            recipe=replace(COSINE, batch_size=16, **recipe),
            epochs=epochs,
            steps=None,
            holdout=0.1,
            seed=0,
        )
        return train(
            plan,
            dataset,
            split(dataset, 0.1, 0),
            tmp_path / folder,
            device=CPU,
            progress=Progress(),
            resume=resume,
            checkpoint_every_s=every_s,
        )

    return run


@pytest.mark.slow
def test_a_run_killed_ten_times_at_random_steps_ends_in_the_weights_of_one_left_alone(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), (400, 200, 60, 20))
    images = rng.integers(0, 150, (680, 12, 12, 3)) + 30 * labels[:, None, None, None]
    np.savez(tmp_path / "train.npz", images=images.astype(np.uint8), labels=labels, names=[*"abcd"])
    words = [
        *(
            "--dataset",
            "npz",
            "--train-file",
            f"{tmp_path}/train.npz",
            "--test-file",
            f"{tmp_path}/train.npz",
        ),
        *("--network", "resnet20", "--device", "cpu", "--steps", "66", "--seed", "1"),  # four an epoch
    ]

    def placed(name):
        return [*words, "--runs", str(tmp_path / name), "--out", str(tmp_path / name / "models" / "shapes")]

    def saved(name):
        return checkpoints.load(tmp_path / name / "shapes" / "checkpoint.pt")

    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.training.killed_run"])

    def start(arguments, step):
        process = processes.Process(target=fit_and_die, args=(arguments, step))
        process.start()
        process.join()
        return process.exitcode

    resume, at = [], 0
    for _ in range(10):
        step = int(rng.integers(at + 1, at + 7))  # of 66: the checkpoint before it is 0 to 12 steps old
        every = f"{rng.choice([0, 0.3, 1000])}"
        assert start([*placed("killed"), "--checkpoint-every", every, *resume], step) == -signal.SIGKILL
        resume, at = ["--resume"], saved("killed").step
    assert start([*placed("killed"), *resume], -1) == 0
    assert start(placed("alone"), -1) == 0
    killed, alone = saved("killed"), saved("alone")
    assert killed.finished
    for name, tensor in alone.network.items():
        assert torch.equal(tensor, killed.network[name]), name
    assert alone.average is not None  # the default recipe keeps a running mean
    for name, tensor in alone.average.items():
        assert torch.equal(tensor, killed.average[name]), name
    for name in ("epoch", "step", "loss", "rate"):
        assert [row[name] for row in killed.history] == [row[name] for row in alone.history]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "more"),
    [
        ("sgd", {}),
        ("adam", {}),
        ("sgd", {"distortion": 1.0, "cutout": 0.5, "small_side": 0.5, "small_until": 0.75, "averaging": 0.9}),
    ],
)
def test_a_checkpoint_amid_an_epoch_resumes_to_the_same_weights_and_log(
    run_tiny, monkeypatch, tmp_path, optimizer, more
):
    def broken_off(*arguments, **options):
        for record in fit(*arguments, **options):
            if record.step == 16:  # of the second epoch; the checkpoint is of step 15
                raise KeyboardInterrupt
            yield record

    fit = run_module.fit
    recipe = with_optimizer(COSINE, optimizer)
    changed = {"optimizer": optimizer, "peak_rate": recipe.peak_rate, **more}
    alone = run_tiny(folder="alone", **changed)
    monkeypatch.setattr(run_module, "fit", broken_off)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(**changed)
    cut = checkpoints.load(tmp_path / "run" / "checkpoint.pt")
    assert (cut.step, len(cut.history), len(cut.epoch_losses)) == (15, 1, 4)
    monkeypatch.setattr(run_module, "fit", fit)
    resumed = run_tiny(resume=True, **changed)
    assert all(torch.equal(tensor, resumed.network[name]) for name, tensor in alone.network.items())
    assert all(torch.equal(tensor, resumed.weights[name]) for name, tensor in alone.weights.items())
    assert (resumed.average is not None) == ("averaging" in more)
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in alone.history]
    assert [row["epoch"] for row in resumed.history] == [1, 2]
    assert resumed.history[1]["loss"] < resumed.history[0]["loss"]
    assert set(resumed.optimizer["state"][0]) == _STATE[optimizer]


@pytest.mark.parametrize("every_s", [0.0, 1000.0])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_the_weights_from_before(
    run_tiny, tmp_path, every_s
):
    with pytest.raises(RunError, match=r"smaller learning rate than 1e\+30") as failure:
        run_tiny(every_s, peak_rate=1e30, warm_up=0)
    found = re.search(
        r"loss is no longer finite at step (\d+); the checkpoint after step (\d+) is kept", str(failure.value)
    )
    assert found
    stopped, kept = map(int, found.groups())
    assert stopped < 11  # amid the first epoch
    assert kept == (stopped - 1 if every_s == 0 else 0)
    saved = checkpoints.load(tmp_path / "run" / "checkpoint.pt")
    assert saved.step == kept
    assert all(tensor.isfinite().all() for tensor in saved.network.values())


def test_weights_that_are_not_finite_are_not_saved_though_the_loss_before_them_is(run_tiny, tmp_path):
    with pytest.raises(RunError, match=r"weights are no longer finite after step 1; .* after step 0 is kept"):
        run_tiny(peak_rate=3e38, warm_up=0, momentum=0.9)
    assert checkpoints.load(tmp_path / "run" / "checkpoint.pt").step == 0


def test_the_command_says_in_one_line_that_the_loss_is_not_finite(tiny_command, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "cosine", replace(COSINE, peak_rate=1e30))
    assert main([*tiny_command, "--recipe", "cosine"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert re.search(r"^training\.fit: the \w+ \w+ no longer finite", err.splitlines()[-1])


def test_ranks_that_cannot_share_a_batch_evenly_are_refused():
    check_shares(COSINE, 1000, Ranks(0, 4))
    with pytest.raises(RunError, match="3 processes cannot share a batch of 128 images"):
        check_shares(COSINE, 1000, Ranks(0, 3))
    with pytest.raises(RunError, match="2 processes cannot share a batch of 35 images"):
        check_shares(COSINE, 35, Ranks(0, 2))
