"""A data set that trains in a fraction of a second, for every test that needs a run rather than a result."""

from pathlib import Path

import numpy as np
import pytest
import torch

from training.fit import main

COUNTS = (120, 60, 12, 4)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Train and test archives: four classes told apart by brightness and noise, 12x12 pixels."""
    folder = tmp_path_factory.mktemp("tiny")
    paths = folder / "train.npz", folder / "test.npz"
    for stream, (path, counts) in enumerate(zip(paths, (COUNTS, (30,) * 4), strict=True)):
        rng = np.random.default_rng(stream)
        labels = np.repeat(np.arange(4), counts)
        centre = (50 + 45 * labels)[:, None, None, None]
        images = np.clip(centre + rng.normal(0, 40, (len(labels), 12, 12, 3)), 0, 255).astype(np.uint8)
        np.savez(path, images=images, labels=labels, names=["dusk", "dim", "day", "glare"])
    return paths


@pytest.fixture
def tiny_command(tiny_files: tuple[Path, Path], tmp_path: Path) -> list[str]:
    """A whole `training.fit` command for the tiny data set, four steps of one epoch each."""
    train, test = tiny_files
    return [
        *("--dataset", "npz", "--train-file", str(train), "--test-file", str(test)),
        *("--network", "resnet20", "--epochs", "4", "--device", "cpu", "--seed", "3"),
        *("--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "models" / "tiny")),
    ]


@pytest.fixture(scope="session")
def tiny_run(tiny_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds runs/tiny and models/tiny of a finished run; leave it as it is."""
    train, test = tiny_files
    folder = tmp_path_factory.mktemp("finished")
    code = main(
        [
            *("--dataset", "npz", "--train-file", str(train), "--test-file", str(test)),
            *("--network", "resnet20", "--epochs", "12", "--device", "cpu", "--loss", "logit-adjusted"),
            *("--runs", str(folder / "runs"), "--out", str(folder / "models" / "tiny")),
        ]
    )
    assert code == 0
    return folder
