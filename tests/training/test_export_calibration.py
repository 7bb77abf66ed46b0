"""What an export fits on held-out logits: the temperature, tau and offset they were made with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bundle.files import Bundle
from tests.training import graphs

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


def scaled_logits(n: int, temperature: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Labels in the training set's mix, and logits of which f / temperature is the exact log posterior.

    x given y is normal round 1.5 e_y, so log P(y | x) is 1.5 x_y + log prior_y up to a constant.
    """
    rng = np.random.default_rng(5)
    prior = np.array(graphs.COUNTS) / sum(graphs.COUNTS)
    labels = rng.choice(5, size=n, p=prior)
    x = rng.normal(size=(n, 5)) + 1.5 * np.eye(5)[labels]
    return ((1.5 * x + np.log(prior)) * temperature).astype(np.float32), labels


def test_held_out_logits_give_the_temperature_they_were_made_with(
    export: Callable[..., Bundle], tmp_path: Path
) -> None:
    logits, labels = scaled_logits(6000, 1.7)
    np.savez(tmp_path / "held.npz", logits=logits, labels=labels)
    bundle = export(graphs.classifier(), "--holdout", tmp_path / "held.npz", "--loss-offset", "none")
    manifest = bundle.manifest
    assert manifest.temperature == pytest.approx(1.7, rel=0.08)
    assert manifest.tau == pytest.approx(1.7, abs=0.5)  # exact Bayes at tau = T
    assert manifest.calibration.temperature == "fitted"
    assert manifest.calibration.logit_offset == "known"
    assert (manifest.calibration.images, manifest.calibration.classes) == (6000, 5)
    assert {0.0, 1.0, manifest.tau} <= {point.tau for point in manifest.metrics.holdout}
    held_out = bundle.holdout()
    assert held_out is not None
    assert (held_out.logits == logits).all()
    assert (held_out.labels == labels).all()


def test_balanced_held_out_images_calibrate_to_the_training_mix_all_the_same(
    export: Callable[..., Bundle], tmp_path: Path
) -> None:
    logits, labels = scaled_logits(200_000, 1.7)
    per_class = min(np.bincount(labels))
    chosen = np.concatenate([np.flatnonzero(labels == y)[:per_class] for y in range(5)])
    assert per_class > 500
    np.savez(tmp_path / "held.npz", logits=logits[chosen], labels=labels[chosen])
    bundle = export(graphs.classifier(), "--holdout", tmp_path / "held.npz")
    assert bundle.manifest.temperature == pytest.approx(1.7, rel=0.1)


def test_a_logit_adjusted_network_is_not_adjusted_twice(export: Callable[..., Bundle]) -> None:
    manifest = export(graphs.classifier(), "--loss-offset", "log-prior", "--loss-tau", "1.5").manifest
    assert manifest.logit_offset == pytest.approx(1.5 * np.log(np.array(graphs.COUNTS) / sum(graphs.COUNTS)))
    assert manifest.calibration.logit_offset == "known"
    assert (manifest.loss.name, manifest.loss.tau) == ("logit-adjusted", 1.5)


def test_an_unknown_loss_gets_the_offset_that_its_held_out_logits_show(
    export: Callable[..., Bundle], tmp_path: Path
) -> None:
    logits, labels = scaled_logits(20_000, 1.0)
    hidden = np.array([0.0, 1.0, -1.0, 0.5, 0.2])
    np.savez(tmp_path / "held.npz", logits=(logits - hidden).astype(np.float32), labels=labels)
    manifest = export(
        graphs.classifier(), "--holdout", tmp_path / "held.npz", "--loss-offset", "fitted"
    ).manifest
    found = np.array(manifest.logit_offset)
    assert found - found.mean() == pytest.approx(hidden - hidden.mean(), abs=0.25)
    assert manifest.calibration.logit_offset == "fitted"
