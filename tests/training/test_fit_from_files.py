"""The command on images that stay in their files: whole runs on trees laid out as the published data sets."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from bundle.files import read
from bundle.preprocessing import decode
from tests.training.photos import imagenet_lt, inaturalist, photo
from training import checkpoint as checkpoints
from training import imagefolder
from training.checkpoint import Checkpoint
from training.data import Dataset, Examples, split
from training.evaluate import evaluate
from training.export import main as export
from training.fit import main
from training.imagenet_lt import NORMALISATION as IMAGENET
from training.inaturalist import NORMALISATION as INATURALIST
from training.networks import make_network
from training.progress import Progress
from training.run import train
from training.sources import read as read_dataset


def command(folder: Path, dataset: str, data_dir: Path, *more: str) -> list[str]:
    return [
        *("--dataset", dataset, "--data-dir", str(data_dir), "--device", "cpu", "--seed", "3"),
        *("--runs", str(folder / "runs"), "--out", str(folder / "models" / "mine"), *more),
    ]


def start(words: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-m", "training.fit", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def refusal(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.slow
def test_imagenet_lt_trains_by_the_papers_recipe_and_its_bundle_answers_for_served_pixels(tmp_path):
    root = imagenet_lt(tmp_path / "imagenet", counts=(9, 4, 2))
    words = command(tmp_path, "imagenet-lt", root, "--network", "resnet50", "--recipe", "paper-imagenet")
    assert main([*words, "--image-size", "64", "--steps", "2", "--loss", "logit-adjusted"]) == 0
    bundle = read(tmp_path / "models" / "mine")
    manifest = bundle.manifest
    assert (manifest.input.height, manifest.input.resize.rule, manifest.input.resize.shorter_side) == (
        64,
        "crop",
        73,
    )
    assert (tuple(manifest.input.mean), tuple(manifest.input.std)) == IMAGENET
    assert [(entry.count, entry.trained) for entry in manifest.classes] == [(9, 9), (4, 4), (2, 2)]
    assert (manifest.dataset.train_images, manifest.dataset.holdout_images, manifest.dataset.test_images) == (
        15,
        6,
        6,
    )
    assert (manifest.recipe["name"], manifest.recipe["batch_size"]) == ("paper-imagenet", 512)
    session = onnxruntime.InferenceSession(bundle.model_bytes(), providers=["CPUExecutionProvider"])
    lines = (root / "ImageNet_LT_val.txt").read_text().splitlines()
    pixels = np.stack([decode((root / line.split()[0]).read_bytes(), manifest.input) for line in lines])
    inputs = (pixels * manifest.input.scale - manifest.input.mean) / manifest.input.std
    (answered,) = session.run(["logits"], {"input": inputs.transpose(0, 3, 1, 2).astype(np.float32)})
    held = bundle.holdout()
    scale = np.abs(held.logits).max()
    np.testing.assert_allclose(answered, held.logits, atol=1e-4 * max(1, scale))


@pytest.fixture(scope="module")
def inaturalist_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inaturalist/, runs/mine and models/mine of a finished run; leave it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    root = inaturalist(folder / "inaturalist", counts=(12, 8, 2))
    words = command(folder, "inaturalist2018", root, "--network", "resnet20", "--recipe", "paper-inaturalist")
    assert main([*words, "--steps", "1", "--workers", "0"]) == 0
    return folder


@pytest.mark.slow
def test_inaturalist_trains_by_the_papers_recipe(inaturalist_run):
    bundle = read(inaturalist_run / "models" / "mine")
    manifest = bundle.manifest
    assert manifest.labels == ["Species 0", "Species 1", "Species 2"]
    assert (manifest.recipe["name"], manifest.recipe["batch_size"]) == ("paper-inaturalist", 1024)
    assert (manifest.dataset.train_images, manifest.dataset.holdout_images) == (20, 2)
    assert (tuple(manifest.input.mean), tuple(manifest.input.std)) == INATURALIST
    card = (bundle.folder / "README.md").read_text()
    assert "--dataset inaturalist2018 --data-dir inaturalist --image-size 32" in card
    assert "published are 437,513 of 8,142" in card


@pytest.mark.slow
def test_a_run_is_exported_again_from_where_its_images_are_now(inaturalist_run, tmp_path):
    moved = shutil.copytree(inaturalist_run / "inaturalist", tmp_path / "moved")
    words = ["--checkpoint", str(inaturalist_run / "runs" / "mine"), "--data-dir", str(moved)]
    assert export([*words, "--out", str(tmp_path / "again")]) == 0
    first, again = read(inaturalist_run / "models" / "mine"), read(tmp_path / "again")
    assert again.manifest.input == first.manifest.input
    np.testing.assert_allclose(first.holdout().logits, again.holdout().logits, atol=1e-5)


@pytest.mark.slow
def test_a_run_of_another_data_set_is_not_resumed(inaturalist_run, tmp_path, capsys):
    shutil.copytree(inaturalist_run / "runs", tmp_path / "runs")
    root = shutil.copytree(inaturalist_run / "inaturalist", tmp_path / "inaturalist")
    imagenet_lt(root)
    checkpoint = tmp_path / "runs" / "mine" / "checkpoint.pt"
    kept = checkpoint.read_bytes()
    more = [
        "--network",
        "resnet20",
        "--recipe",
        "paper-inaturalist",
        "--steps",
        "1",
        "--workers",
        "0",
        "--resume",
    ]
    other = refusal(capsys, command(tmp_path, "imagenet-lt", root, *more))
    assert "dataset was inaturalist2018, now imagenet-lt" in other
    photo(root / "train_val2018" / "Aves" / "0" / "train0.jpg", seed=99)
    assert "was trained on other images or labels" in refusal(
        capsys, command(tmp_path, "inaturalist2018", root, *more)
    )
    assert checkpoint.read_bytes() == kept
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
def test_a_folder_beyond_the_budget_is_trained_and_calibrated_from_its_files(tmp_path, monkeypatch):
    root = imagenet_lt(tmp_path / "imagenet", counts=(30, 12, 6)) / "train"
    monkeypatch.setattr(imagefolder, "MEMORY_BUDGET_BYTES", 0)
    words = command(tmp_path, "imagefolder", root, "--network", "resnet20", "--image-size", "16")
    assert main([*words, "--steps", "3", "--workers", "0"]) == 0
    monkeypatch.undo()
    checkpoint = checkpoints.load(tmp_path / "runs" / "mine" / "checkpoint.pt")
    bundle = read(tmp_path / "models" / "mine")
    dataset = read_dataset(checkpoint.plan.source, checkpoint.plan.seed)
    assert isinstance(dataset.train, Examples)
    cut = split(dataset, checkpoint.plan.holdout, checkpoint.plan.seed)
    again = train_again(checkpoint, dataset, tmp_path / "memory")
    assert (again.mean, again.std) == (checkpoint.mean, checkpoint.std)
    assert same(again.network, checkpoint.network)
    network = make_network("resnet20", 3)
    network.load_state_dict(checkpoint.weights)
    logits = evaluate(network, cut.holdout, mean=again.mean, std=again.std, device=torch.device("cpu"))
    np.testing.assert_allclose(bundle.holdout().logits, logits, atol=1e-5)
    assert bundle.manifest.input.resize.rule == "stretch"


def train_again(
    checkpoint: Checkpoint, dataset: Dataset, folder: Path, *, resume: bool = False
) -> Checkpoint:
    """Train what a checkpoint's plan says, without a bundle."""
    plan = checkpoint.plan
    made = train(
        plan,
        dataset,
        split(dataset, plan.holdout, plan.seed),
        folder,
        device=torch.device("cpu"),
        progress=Progress(),
        resume=resume,
    )
    assert isinstance(made, Checkpoint)
    return made


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_that_any_number_of_workers_resumes_exactly(tmp_path):
    root = imagenet_lt(tmp_path / "imagenet", counts=(20, 8, 4))
    words = command(tmp_path, "imagenet-lt", root, "--network", "resnet20", "--steps", "30", "--workers", "1")
    words += ["--checkpoint-every", "0"]
    process = start(words)
    log = tmp_path / "runs" / "mine" / "log.csv"
    deadline = time.monotonic() + 200
    while not log.exists() or len(log.read_text().splitlines()) < 4:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # the workers get it too, as from a terminal
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err and "Warning" not in err
    stopped = checkpoints.load(log.parent / "checkpoint.pt")
    assert 0 < stopped.step < 30
    dataset = read_dataset(stopped.plan.source, stopped.plan.seed, workers=0)
    resumed = train_again(stopped, dataset, log.parent, resume=True)
    whole = train_again(stopped, dataset, tmp_path / "whole")
    assert same(resumed.network, whole.network)


def test_a_corrupt_image_met_in_training_is_one_line_and_leaves_no_bundle(tmp_path, capsys):
    root = imagenet_lt(tmp_path / "imagenet")
    bad = root / (root / "ImageNet_LT_train.txt").read_text().splitlines()[4].split()[0]
    bad.write_bytes(bad.read_bytes()[:300])
    line = refusal(capsys, command(tmp_path, "imagenet-lt", root, "--workers", "0"))
    assert line.startswith(f"training.fit: {bad}: the JPEG image cannot be decoded whole")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [
        (
            "imagenet",
            "unknown data set 'imagenet'; known are cifar10-lt, cifar100-lt, imagenet-lt, inaturalist2018",
        ),
        ("imagenet-lt", "there is no list file"),
        ("inaturalist2018", "there is no file"),
    ],
)
def test_a_data_set_that_is_not_there_is_one_line(tmp_path, capsys, dataset, reason):
    assert reason in refusal(capsys, command(tmp_path, dataset, tmp_path))
    assert not (tmp_path / "models").exists()
