"""models/: what ships is whole, small, loads, and is as wrong as its manifest says."""

import os
from pathlib import Path

import numpy as np
import pytest

from bundle.files import read
from longtail.adjustment import scores, top_k
from longtail.metrics import balanced_error
from longtail.priors import uniform_prior
from service.adapters.onnx_engine import build
from service.adapters.serving_graph import compose

FOLDER = Path(__file__).parents[2] / "models"
SHIPPED = ("cifar100-lt-erm", "cifar100-lt-logit-adjusted", "shapes-lt")


def test_they_are_three_and_under_eight_megabytes_together():
    assert sorted(path.name for path in FOLDER.iterdir() if path.is_dir()) == sorted(SHIPPED)
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 8_000_000


@pytest.mark.parametrize("name", SHIPPED)
def test_each_is_whole_composes_and_answers(name):
    bundle = read(FOLDER / name)
    assert bundle.manifest.name == name
    assert bundle.manifest.git_commit is not None
    assert {group.name for group in bundle.manifest.groups} == {"many", "medium", "few"}
    assert bundle.manifest.calibration.temperature == "fitted"
    engine = build(compose(bundle), "cpu", largest_batch=2)
    size = (bundle.manifest.input.height, bundle.manifest.input.width)
    offsets = np.array([bundle.manifest.logit_offset])
    out = engine.run(np.zeros((2, *size, 3), np.uint8), offsets, np.zeros(2, np.int64), 1)
    assert np.isfinite(out.logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED[:2])
def test_the_test_error_is_what_the_manifest_says(name):
    if "TARE_DATA_DIR" not in os.environ:
        pytest.skip("TARE_DATA_DIR is not set")
    from training.cifar import read_cifar  # noqa: PLC0415 - torchvision, where it is needed alone

    manifest = read(FOLDER / name).manifest
    test = read_cifar("cifar100-lt", Path(os.environ["TARE_DATA_DIR"]), "exp", 100.0).test
    engine = build(compose(read(FOLDER / name)), "cpu", largest_batch=100)
    offsets, rows = np.array([manifest.logit_offset]), np.zeros(100, np.int64)
    logits = np.concatenate(
        [
            engine.run(test.images[start : start + 100], offsets, rows, 1).logits
            for start in range(0, len(test.images), 100)
        ]
    )
    for point in manifest.metrics.test:
        ranked = scores(logits, manifest.logit_offset, manifest.source_prior, uniform_prior(100), point.tau)
        error = balanced_error(test.labels, top_k(ranked, 1)[:, 0], 100)
        assert error == pytest.approx(point.balanced_error.error, abs=3e-4)  # a near tie or two may flip
