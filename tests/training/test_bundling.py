"""A bundle answers as the network did, and says all there is to say about it."""

import io
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from bundle.files import read
from longtail.priors import prior_from_counts
from training import checkpoint as checkpoints
from training.bundling import (
    check_parity,
    training_command,
    write_bundle,
)
from training.data import split
from training.evaluate import evaluate
from training.exceptions import BundleError, RunError
from training.losses import LossOptions
from training.networks import make_network
from training.npz import read_npz


@pytest.fixture(scope="session")
def bundle(tiny_run):
    return read(tiny_run / "models" / "tiny")


@pytest.fixture(scope="session")
def checkpoint(tiny_run):
    return checkpoints.load(tiny_run / "runs" / "tiny" / "checkpoint.pt")


def trained_network(checkpoint):
    network = make_network(checkpoint.plan.network, 4)
    network.load_state_dict(checkpoint.weights)
    return network.eval()


def test_the_graph_is_one_old_enough_file_with_a_symbolic_batch_and_no_trace_of_its_origin(bundle):
    model = onnx.load_from_string(bundle.model_bytes())
    assert {entry.domain: entry.version for entry in model.opset_import}[""] <= 20
    assert model.ir_version <= 10
    (pixels,), (logits,) = model.graph.input, model.graph.output
    assert (pixels.name, logits.name) == ("input", "logits")
    assert [d.dim_param or d.dim_value for d in pixels.type.tensor_type.shape.dim] == ["batch", 3, 12, 12]
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == ["batch", 4]
    assert b".py" not in bundle.model_bytes()


@pytest.mark.parametrize("n", [1, 3, 32])
def test_onnx_runtime_answers_as_torch_for_pixels_prepared_by_the_manifest(bundle, checkpoint, tiny_files, n):
    test = read_npz(*tiny_files).test.take(np.arange(n))
    spec = bundle.manifest.input
    pixels = (test.images * spec.scale - spec.mean) / spec.std
    session = onnxruntime.InferenceSession(bundle.model_bytes(), providers=["CPUExecutionProvider"])
    (answered,) = session.run(["logits"], {"input": pixels.transpose(0, 3, 1, 2).astype(np.float32)})
    expected = evaluate(
        trained_network(checkpoint),
        test,
        mean=checkpoint.mean,
        std=checkpoint.std,
        device=torch.device("cpu"),
    )
    np.testing.assert_allclose(answered, expected, atol=1e-4)


def test_a_network_that_answers_otherwise_is_refused(bundle, checkpoint, tiny_files):
    network, model = trained_network(checkpoint), bundle.model_bytes()
    test = read_npz(*tiny_files).test
    check_parity(network, model, test, checkpoint)
    with torch.no_grad():
        network.head.bias[2] += 0.01
    with pytest.raises(BundleError, match=r"at batch 1 ONNX Runtime's logits differ from torch's by 0\.01"):
        check_parity(network, model, test, checkpoint)


def test_the_manifest_tells_classes_priors_offset_and_where_they_come_from(bundle):
    manifest = bundle.manifest
    assert manifest.labels == ["dusk", "dim", "day", "glare"]
    assert [entry.count for entry in manifest.classes] == [120, 60, 12, 4]
    assert [entry.trained for entry in manifest.classes] == [108, 54, 11, 4]
    prior = prior_from_counts([108, 54, 11, 4])
    np.testing.assert_allclose(manifest.source_prior, prior)
    np.testing.assert_allclose(manifest.logit_offset, np.log(prior))  # tau 1
    assert (manifest.loss.name, manifest.loss.tau) == ("logit-adjusted", 1.0)
    assert [group.name for group in manifest.groups] == ["many", "medium", "few"]
    assert (manifest.network, manifest.seed, manifest.recipe["epochs"]) == ("resnet20", 0, 12)
    assert (manifest.dataset.train_images, manifest.dataset.holdout_images) == (177, 19)
    assert manifest.calibration.images == 19
    assert "train.npz, 196 images" in str(manifest.dataset.detail["note"])
    assert 0 <= manifest.metrics.test[0].balanced_error.error <= 1
    assert manifest.metrics.test[0].balanced_error.labels == 120


def test_held_out_logits_are_those_of_images_the_weights_never_saw(bundle, checkpoint, tiny_files):
    cut = split(read_npz(*tiny_files), 0.1, seed=0)
    held = bundle.holdout()
    np.testing.assert_array_equal(held.labels, cut.holdout.labels)
    expected = evaluate(
        trained_network(checkpoint),
        cut.holdout,
        mean=checkpoint.mean,
        std=checkpoint.std,
        device=torch.device("cpu"),
    )
    np.testing.assert_allclose(held.logits, expected, atol=1e-5)


def test_the_card_and_the_curve_can_be_read(bundle):
    card = (bundle.folder / "README.md").read_text()
    assert "python -m training.fit --dataset npz --train-file train.npz" in card
    assert f"tau* = {bundle.manifest.tau:g}" in card
    assert "| Test, 120 images: tau | all (4 classes) |" in card
    picture = Image.open(io.BytesIO((bundle.folder / "tau-curve.png").read_bytes()))
    assert picture.width > 500
    assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50


@pytest.mark.slow
def test_nothing_held_out_means_no_tau_and_a_temperature_of_one(checkpoint, tiny_files, tmp_path):
    dataset = read_npz(*tiny_files)
    cut = split(dataset, 0.0, seed=0)
    made = write_bundle(
        replace(checkpoint, plan=replace(checkpoint.plan, holdout=0.0)),
        dataset,
        cut,
        tmp_path / "all",
        torch.device("cpu"),
    )
    assert (made.manifest.temperature, made.manifest.tau, made.holdout()) == (1.0, None, None)
    assert made.manifest.metrics.test
    assert "Nothing was held out" in (made.folder / "README.md").read_text()


def test_an_unfinished_run_is_refused_and_leaves_nothing(checkpoint, tiny_files, tmp_path):
    dataset = read_npz(*tiny_files)
    with pytest.raises(RunError, match="has taken 3 of 12 steps: resume it first"):
        write_bundle(
            replace(checkpoint, step=3),
            dataset,
            split(dataset, 0.1, seed=0),
            tmp_path / "half",
            torch.device("cpu"),
        )
    assert not list(tmp_path.iterdir())


def test_the_command_in_the_card_parses_to_the_same_plan(checkpoint, tmp_path):
    from training.fit import _parser, _plan  # noqa: PLC0415

    words = training_command(checkpoint.plan, tmp_path / "tiny").split()[3:]
    plan = _plan(_parser().parse_args(words))
    assert replace(plan, source=checkpoint.plan.source) == checkpoint.plan
    options = LossOptions(tau1=0.5, label_smoothing=0.1, deferred_reweighting=True)
    other = replace(checkpoint.plan, loss="pairwise", tau=None, loss_options=options, head="normalised")
    plan = _plan(_parser().parse_args(training_command(other, tmp_path / "tiny").split()[3:]))
    assert replace(plan, source=other.source) == other
