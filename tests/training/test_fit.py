"""The command as a user types it: real runs and real processes on a tiny data set."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from bundle.files import read
from training import checkpoint as checkpoints
from training.fit import main
from training.losses import LossOptions, make_loss
from training.shapes import CLASS_LABELS


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(folder / "runs" / "tiny" / "checkpoint.pt").network


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def in_folder(command: list[str], folder: Path, **changed: str) -> list[str]:
    """The command with its runs and models in another folder, and other options."""
    new = [*command]
    options = {"runs": str(folder / "runs"), "out": str(folder / "models" / "tiny"), **changed}
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if option in new:
            new[new.index(option) + 1] = value
        else:
            new += [option, value]
    return new


def start(command: list[str]) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-m", "training.fit", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a process that must succeed."""
    _, err = process.communicate()
    assert process.returncode == 0, err


def wait_for_epoch(run: Path, process: subprocess.Popen[str], epochs: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "log.csv").exists() or len((run / "log.csv").read_text().splitlines()) <= epochs:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no epoch in two minutes"
        time.sleep(0.01)


def refusal(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """Run a command that must be refused with code 2; return its one line."""
    try:
        code = main(command)
    except SystemExit as leaving:
        code = leaving.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny_command, tmp_path):
    folders = [tmp_path / name for name in ("one", "same", "other")]
    for folder, seed in zip(folders, ("3", "3", "4"), strict=True):
        assert main(in_folder(tiny_command, folder, seed=seed)) == 0
    one, equal, other = map(weights, folders)
    assert same(one, equal)
    assert not same(one, other)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_weights_of_one_that_was_left_alone(tiny_command, tmp_path):
    long = in_folder(tiny_command, tmp_path / "killed", epochs="40", checkpoint_every="0")
    process = start(long)
    run = tmp_path / "killed" / "runs" / "tiny"
    wait_for_epoch(run, process, 5)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not checkpoints.load(run / "checkpoint.pt").finished
    assert not (tmp_path / "killed" / "models").exists()
    finish(start([*long, "--resume"]))
    finish(start(in_folder(tiny_command, tmp_path / "alone", epochs="40")))
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "alone"))
    with (run / "log.csv").open() as file:
        assert [float(row["epoch"]) for row in csv.DictReader(file)] == [float(n) for n in range(1, 41)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_checkpoint_that_resumes_exactly(tiny_command, tmp_path, number):
    long = in_folder(tiny_command, tmp_path / "stopped", epochs="40", checkpoint_every="0")
    process = start(long)
    run = tmp_path / "stopped" / "runs" / "tiny"
    wait_for_epoch(run, process, 1)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "the same command with --resume goes on" in err
    stopped = checkpoints.load(run / "checkpoint.pt")
    assert 0 < stopped.step < stopped.total_steps
    finish(start([*long, "--resume"]))
    finish(start(in_folder(tiny_command, tmp_path / "alone", epochs="40")))
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "alone"))


def test_a_finished_run_leaves_checkpoint_logs_and_a_bundle(tiny_run):
    run = tiny_run / "runs" / "tiny"
    assert {path.name for path in run.iterdir()} == {"checkpoint.pt", "log.csv", "tensorboard", "lock"}
    assert list((run / "tensorboard").iterdir())
    with (run / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "step", "loss", "rate", "images_per_s", "seconds"]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    names = {path.name for path in (tiny_run / "models" / "tiny").iterdir()}
    assert names == {"model.onnx", "manifest.json", "holdout.npz", "tau-curve.png", "README.md"}
    assert [path.name for path in (tiny_run / "models").iterdir()] == ["tiny"]  # no scratch folder is left


@pytest.mark.slow
def test_steps_count_batches(tiny_command, tmp_path):
    command = [word for word in tiny_command if word not in ("--epochs", "4")]
    assert main([*command, "--steps", "2"]) == 0
    assert checkpoints.load(tmp_path / "runs" / "tiny" / "checkpoint.pt").step == 2


@pytest.mark.slow
def test_an_existing_bundle_or_run_is_kept_without_force(tiny_command, tmp_path, capsys):
    assert main(tiny_command) == 0
    before = (tmp_path / "models" / "tiny" / "manifest.json").read_bytes()
    capsys.readouterr()
    assert "exists already; --force replaces it" in refusal(capsys, tiny_command)
    assert (tmp_path / "models" / "tiny" / "manifest.json").read_bytes() == before
    shutil.rmtree(tmp_path / "models")
    assert "--resume goes on from it, --force starts anew" in refusal(capsys, tiny_command)
    assert main([*tiny_command, "--force"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("holdout", "origin"), [("0.3", "fitted"), ("0", "assumed")])
def test_a_loss_that_is_not_consistent_is_trained_deferred_and_its_offset_fitted(
    tiny_command, tmp_path, holdout, origin
):
    words = ["--loss", "ldam", "--deferred-reweighting", "--beta", "0.9", "--label-smoothing", "0.05"]
    assert main([*in_folder(tiny_command, tmp_path, epochs="10", holdout=holdout), *words]) == 0
    bundle = read(tmp_path / "models" / "tiny")
    manifest = bundle.manifest
    assert manifest.calibration.logit_offset == origin
    assert (manifest.loss.name, manifest.loss.head) == ("ldam", "cosine")
    assert manifest.loss.options["beta"] == 0.9
    start = make_loss(
        "ldam",
        [entry.trained for entry in manifest.classes],
        None,
        torch.device("cpu"),
        options=LossOptions(beta=0.9, deferred_reweighting=True),
    ).logit_offset
    assert (manifest.logit_offset == pytest.approx(start)) is (origin == "assumed")
    card = (bundle.folder / "README.md").read_text()
    assert (
        "the ldam loss (margin 0.5, deferred reweighting, beta 0.9, label smoothing 0.05, cosine head)"
        in card
    )
    assert "--loss ldam --beta 0.9 --label-smoothing 0.05 --deferred-reweighting" in card


def test_a_checkpoint_from_before_losses_had_options_is_read(tiny_run, tmp_path):
    content = torch.load(tiny_run / "runs" / "tiny" / "checkpoint.pt", weights_only=True)
    del content["plan"]["loss_options"], content["plan"]["head"]
    torch.save(content, tmp_path / "old.pt")
    now = checkpoints.load(tiny_run / "runs" / "tiny" / "checkpoint.pt")
    assert checkpoints.load(tmp_path / "old.pt").plan == now.plan


def test_a_resume_with_other_options_of_the_loss_is_refused(tiny_command, tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run / "runs", tmp_path / "runs")
    other = in_folder(
        tiny_command, tmp_path, epochs="12", seed="0", loss="logit-adjusted", label_smoothing="0.1"
    )
    assert main([*other, "--resume", "--head", "normalised"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "label smoothing was None, now 0.1" in line
    assert "head was None, now normalised" in line


def test_a_resume_says_what_differs(tiny_command, tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run / "runs", tmp_path / "runs")
    other = in_folder(tiny_command, tmp_path, network="resnet32", epochs="5", recipe="paper-200-epochs")
    assert main([*other, "--resume"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    for part in (
        "network was resnet20, now resnet32",
        "epochs was 12, now 5",
        "recipe was fast, now paper-200",
    ):
        assert part in line
    assert not (tmp_path / "models").exists()


def test_a_resume_on_other_images_is_refused(tiny_command, tiny_files, tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run / "runs", tmp_path / "runs")
    options = {"epochs": "12", "seed": "0", "loss": "logit-adjusted", "train_file": str(tiny_files[1])}
    assert main([*in_folder(tiny_command, tmp_path, **options), "--resume"]) == 2
    assert "was trained on other images or labels" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(tiny_command, tmp_path, capsys):
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    for content in (b"", b"hello", b"PK\x03\x04 torn"):
        (run / "checkpoint.pt").write_bytes(content)
        assert main([*tiny_command, "--resume"]) == 2
        assert "is not a whole checkpoint" in capsys.readouterr().err
    torch.save({"step": 1}, run / "checkpoint.pt")
    assert main([*tiny_command, "--resume"]) == 2
    assert "is not a checkpoint of this program" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dataset": "imagenet"}, "unknown data set 'imagenet'; known are cifar10-lt, cifar100-lt"),
        ({"train_file": "/nowhere/train.npz"}, "there is no file /nowhere/train.npz"),
        ({"dataset": "imagefolder", "data_dir": "/nowhere"}, "there is no folder /nowhere"),
        ({"dataset": "imagefolder"}, "--data-dir is needed"),
        ({"dataset": "cifar10-lt", "data_dir": "/nowhere"}, "there is no folder /nowhere"),
        ({"dataset": "shapes-lt", "imbalance_ratio": "5000"}, "has no training image"),
        ({"dataset": "shapes-lt", "imbalance_ratio": "nan"}, "imbalance ratio"),
        ({"holdout": "0.9"}, "held-out share"),
        ({"tau": "1"}, "--tau does not go with --loss cross-entropy, but with --loss logit-adjusted"),
        ({"loss": "logit-adjusted", "tau": "-1"}, "--tau must be a finite number"),
        ({"loss": "class-balanced", "beta": "1"}, "--beta must be at least 0 and below 1, not 1"),
        ({"loss": "ldam", "head": "linear"}, "--head linear does not go with --loss ldam"),
        ({"loss": "ldam", "head": "mlp"}, "invalid choice"),
        ({"loss": "hinge"}, "invalid choice"),
        ({"steps": "3"}, "--epochs and --steps exclude each other"),
        ({"epochs": "0"}, "must be at least 1"),
        ({"seed": "-1"}, "must be at least 0"),
        ({"out": "models/.hidden"}, "cannot name a model"),
        ({"out": "/dev/null/models/tiny"}, "nothing can be written under /dev/null"),
    ],
)
def test_bad_input_is_one_line_code_2_and_nothing_on_disk(tiny_command, tmp_path, capsys, changed, reason):
    folder = tmp_path / "refused"
    err = refusal_last_line(capsys, in_folder(tiny_command, folder, **changed))
    assert reason in err
    assert not (folder / "models").exists()
    assert not list(folder.glob("runs/*/checkpoint.pt"))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"tau": "1"}, "--tau"),
        ({"loss": "logit-adjusted", "tau": "-1"}, "--tau"),
        ({"loss": "class-balanced", "beta": "1"}, "--beta"),
        ({"checkpoint_every": "-1"}, "--checkpoint-every: must be a number of seconds"),
        ({"checkpoint_every": "nan"}, "--checkpoint-every: must be a number of seconds"),
        ({"optimizer": "lbfgs"}, "choose from"),
    ],
)
def test_options_are_refused_before_the_images_are_read(tiny_command, capsys, changed, reason):
    assert reason in refusal(capsys, in_folder(tiny_command, Path("/nowhere"), **changed))


def refusal_last_line(capsys, command) -> str:
    """As `refusal`, where a line about the data may come before."""
    try:
        code = main(command)
    except SystemExit as leaving:
        code = leaving.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2
    return err.splitlines()[-1]


def test_a_disk_that_is_too_small_is_refused_before_the_images_are_read(tiny_command, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    line = refusal(capsys, tiny_command)
    assert "has 1 MiB left; the checkpoints and the bundle of this run need" in line


@pytest.mark.parametrize(("threads", "load", "warned"), [(4, 3.0, True), (4, 0.2, False), (1, 9.0, False)])
def test_a_run_of_several_threads_on_busy_cores_says_that_one_may_be_faster(
    tiny_command, tmp_path, monkeypatch, capsys, threads, load, warned
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "lock").mkdir()  # it ends before the first step
    assert main(tiny_command) == 2
    assert ("OMP_NUM_THREADS=1" in capsys.readouterr().err) == warned


def test_two_processes_cannot_train_in_one_folder(tiny_command, tmp_path, capsys):
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    holder = subprocess.Popen(["flock", str(run / "lock"), "sleep", "60"], start_new_session=True)
    try:
        deadline = time.monotonic() + 10
        while subprocess.run(["flock", "-n", str(run / "lock"), "true"], check=False).returncode == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert "another process is training" in refusal_last_line(capsys, tiny_command)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()


@pytest.mark.slow
def test_an_image_folder_is_trained_end_to_end(tiny_command, tmp_path):
    from PIL import Image  # noqa: PLC0415

    for label, count in {"red": 30, "blue": 8, "rare": 2}.items():
        (tmp_path / "photos" / label).mkdir(parents=True)
        for n in range(count):
            Image.new("RGB", (20 + n, 30), label.replace("rare", "green")).save(
                tmp_path / "photos" / label / f"{n}.jpg"
            )
    command = in_folder(
        tiny_command, tmp_path, dataset="imagefolder", data_dir=str(tmp_path / "photos"), image_size="16"
    )
    assert main(command) == 0
    card = (tmp_path / "models" / "tiny" / "README.md").read_text()
    assert "all (2 of 3 classes)" in card  # the class of two images trains whole, its error is unknown


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_shapes_lt_the_default_recipe_leaves_a_gap_that_tau_1_narrows(tmp_path):
    """One seed and 20 of 50 epochs; docs/results.md has the mean of three at the full recipe."""
    command = [
        *("--dataset", "shapes-lt", "--network", "resnet20", "--epochs", "20", "--device", "cpu"),
        *("--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "models" / "shapes")),
    ]
    finish(start(command))
    manifest = read(tmp_path / "models" / "shapes").manifest
    assert manifest.labels == list(CLASS_LABELS)
    at = {point.tau: point for point in manifest.metrics.test}
    groups = {mean.group: mean.error for mean in at[0].groups}
    assert groups["few"] - groups["many"] >= 0.20
    assert at[0].balanced_error.error - at[1].balanced_error.error >= 0.03
