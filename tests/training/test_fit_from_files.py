"""The command on images that stay in their files: whole runs on trees laid out as the published data sets."""

import os
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
from tests.training.photos import imagenet_lt, inaturalist
from training import checkpoint as checkpoints
from training import imagefolder
from training.export import main as export
from training.fit import main
from training.imagenet_lt import NORMALISATION


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


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(folder / "runs" / "mine" / "checkpoint.pt").network


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
    assert (tuple(manifest.input.mean), tuple(manifest.input.std)) == NORMALISATION
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


@pytest.mark.slow
def test_a_folder_in_files_gives_the_weights_and_the_bundle_that_it_gives_in_memory(tmp_path, monkeypatch):
    root = imagenet_lt(tmp_path / "imagenet", counts=(30, 12, 6)) / "train"
    made = {}
    for name, budget in (("memory", 2**30), ("files", 0)):
        monkeypatch.setattr(imagefolder, "MEMORY_BUDGET_BYTES", budget)
        words = command(tmp_path / name, "imagefolder", root, "--network", "resnet20", "--image-size", "16")
        assert main([*words, "--steps", "3", "--workers", "0"]) == 0
        made[name] = weights(tmp_path / name), read(tmp_path / name / "models" / "mine")
    (one, memory), (other, files) = made.values()
    assert all(torch.equal(one[name], other[name]) for name in one)
    np.testing.assert_array_equal(memory.holdout().logits, files.holdout().logits)
    assert memory.manifest.input == files.manifest.input


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_leaves_a_checkpoint_that_any_number_of_workers_resumes(tmp_path, number):
    root = imagenet_lt(tmp_path / "imagenet", counts=(20, 8, 4))
    words = command(tmp_path / "cut", "imagenet-lt", root, "--network", "resnet20", "--epochs", "60")
    process = start([*words, "--workers", "1"])
    log = tmp_path / "cut" / "runs" / "mine" / "log.csv"
    deadline = time.monotonic() + 200
    while not log.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    step = checkpoints.load(log.parent / "checkpoint.pt").step
    assert 0 < step < 60
    plain = command(tmp_path / "whole", "imagenet-lt", root, "--network", "resnet20", "--epochs", "60")
    assert main([*words, "--workers", "0", "--resume"]) == 0
    assert main([*plain, "--workers", "0"]) == 0
    one, other = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_corrupt_image_met_in_training_is_one_line_and_the_checkpoint_is_kept(tmp_path, capsys):
    root = imagenet_lt(tmp_path / "imagenet")
    bad = root / (root / "ImageNet_LT_train.txt").read_text().splitlines()[4].split()[0]
    bad.write_bytes(bad.read_bytes()[:300])
    line = refusal(capsys, command(tmp_path, "imagenet-lt", root, "--workers", "0"))
    assert line.startswith(f"training.fit: {bad}: the JPEG image cannot be decoded whole")
    assert not (tmp_path / "models").exists()


def test_a_run_of_another_data_set_is_not_resumed(tmp_path, capsys):
    root = imagenet_lt(tmp_path / "imagenet")
    inaturalist(root)
    words = [
        *command(tmp_path, "imagenet-lt", root, "--network", "resnet20", "--workers", "0"),
        "--steps",
        "1",
    ]
    assert main(words) == 0
    capsys.readouterr()
    checkpoint = tmp_path / "runs" / "mine" / "checkpoint.pt"
    kept = checkpoint.read_bytes()
    for path in sorted((tmp_path / "models" / "mine").iterdir()):
        path.unlink()
    (tmp_path / "models" / "mine").rmdir()
    other = ["inaturalist2018" if word == "imagenet-lt" else word for word in words]
    assert "dataset was imagenet-lt, now inaturalist2018" in refusal(capsys, [*other, "--resume"])
    train = root / "ImageNet_LT_train.txt"
    train.write_text("\n".join(train.read_text().splitlines()[:-1]))
    assert "was trained on other images or labels" in refusal(capsys, [*words, "--resume"])
    assert checkpoint.read_bytes() == kept


@pytest.mark.slow
def test_inaturalist_trains_by_the_papers_recipe_and_is_exported_again_from_where_its_images_are_now(
    tmp_path,
):
    root = inaturalist(tmp_path / "inaturalist", counts=(12, 8, 2))
    words = command(
        tmp_path, "inaturalist2018", root, "--network", "resnet20", "--steps", "1", "--workers", "0"
    )
    assert main([*words, "--recipe", "paper-inaturalist"]) == 0
    moved = root.rename(tmp_path / "moved")
    run = tmp_path / "runs" / "mine"
    assert export(["--checkpoint", str(run), "--data-dir", str(moved), "--out", str(tmp_path / "again")]) == 0
    first, again = read(tmp_path / "models" / "mine"), read(tmp_path / "again")
    manifest = first.manifest
    assert manifest.labels == ["Species 0", "Species 1", "Species 2"]
    assert (manifest.recipe["name"], manifest.recipe["batch_size"]) == ("paper-inaturalist", 1024)
    assert (manifest.dataset.train_images, manifest.dataset.holdout_images) == (20, 2)
    assert again.manifest.input == manifest.input
    np.testing.assert_allclose(first.holdout().logits, again.holdout().logits, atol=1e-5)
    card = (first.folder / "README.md").read_text()
    assert "--dataset inaturalist2018 --data-dir inaturalist --image-size 32" in card
    assert "published are 437,513 of 8,142" in card


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
