"""A study of a tiny data set: four classes, a small network, a run in a second."""

from dataclasses import replace

import pytest

from training.checkpoint import Source
from training.paper.panels import QUICK, Panel
from training.paper.study import Request, Study


@pytest.fixture
def tiny_panel(tiny_files):
    train, test = tiny_files
    source = Source("npz", train_file=str(train), test_file=str(test))
    return Panel("cifar10-lt", "tiny", source, "resnet8", replace(QUICK, epochs=2, batch_size=32))


@pytest.fixture
def tiny_study(tmp_path):
    return Study(Request(quick=False, seeds=1, data_dir=tmp_path / "none", runs=tmp_path / "runs"))
