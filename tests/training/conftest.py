"""A data set that trains in a fraction of a second, for every test that needs a run rather than a result."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from bundle.files import Bundle, read
from tests.training import graphs
from training.export import main as export_main
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


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A file of the labels and counts of `graphs`, as `training.export` reads it."""
    path = tmp_path / "classes.csv"
    path.write_text("".join(f"{label},{n}\n" for label, n in zip(graphs.LABELS, graphs.COUNTS, strict=True)))
    return path


@pytest.fixture
def export(tmp_path: Path, classes: Path) -> Callable[..., Bundle]:
    """Return a function that saves a graph, exports it and reads the bundle back."""

    def run(model: onnx.ModelProto, *options: str | Path) -> Bundle:
        onnx.save(model, tmp_path / "theirs.onnx")
        out = tmp_path / "models" / "theirs"
        arguments = ["--onnx", tmp_path / "theirs.onnx", "--classes", classes, "--out", out, *options]
        assert export_main([str(part) for part in arguments]) == 0
        return read(out)

    return run
