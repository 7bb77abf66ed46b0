"""What a bundle says of weight normalisation, against the network with its head really rescaled."""

import numpy as np
import pytest
import torch

from bundle.files import read
from longtail.metrics import balanced_error
from longtail.tau import GRID
from training import checkpoint as checkpoints
from training.bundling import linear_head
from training.data import split
from training.evaluate import evaluate
from training.export import main as export
from training.networks import make_network
from training.npz import read_npz
from training.post_hoc import Head, Labelled, PostHoc, normalised


@pytest.fixture(scope="module")
def tiny(tiny_run):
    """The finished run: its checkpoint's path, its bundle's manifest and its checkpoint."""
    path = tiny_run / "runs" / "tiny"
    manifest = read(tiny_run / "models" / "tiny").manifest
    return path, manifest, checkpoints.load(path / "checkpoint.pt")


def rescaled(checkpoint, divisor, tau, bias):
    """The network with its head's weights divided, and its bias divided, kept or dropped."""
    network = make_network(checkpoint.plan.network, 4)
    network.load_state_dict(checkpoint.weights)
    scale = torch.tensor(divisor**-tau, dtype=torch.float32)
    with torch.no_grad():
        network.head.weight *= scale[:, None]
        if bias != "keep":
            network.head.bias *= scale if bias == "divide" else 0
    return network


def errors_of_rescaled(checkpoint, part, divisor, taus, bias="divide"):
    errors = []
    for tau in taus:
        scores = evaluate(
            rescaled(checkpoint, divisor, tau, bias),
            part,
            mean=checkpoint.mean,
            std=checkpoint.std,
            device=torch.device("cpu"),
        )
        errors.append(balanced_error(part.labels, scores.argmax(axis=1), 4))
    return errors


def test_the_norms_are_those_of_the_heads_weights(tiny):
    _, manifest, checkpoint = tiny
    part = manifest.weight_normalisation
    weights = checkpoint.weights["head.weight"].double().numpy()
    np.testing.assert_allclose(part.norms, [np.sqrt(row @ row) for row in weights])
    np.testing.assert_allclose(part.biases, checkpoint.weights["head.bias"].double().numpy())
    assert (part.nu, part.bias, part.tau_rule) == ("norm", "divide", "class-mean-log-loss")


def test_its_curve_and_errors_are_those_of_the_rescaled_network(tiny, tiny_files):
    _, manifest, checkpoint = tiny
    dataset = read_npz(*tiny_files)
    cut = split(dataset, 0.1, seed=0)
    part = manifest.weight_normalisation
    assert [point.tau for point in part.tau_curve] == list(GRID)
    assert part.tau in GRID
    norms = np.array(part.norms)
    held = [point.balanced_error.error for point in part.tau_curve[::8]]
    expected = errors_of_rescaled(checkpoint, cut.holdout, norms, GRID[::8])
    np.testing.assert_allclose(held, expected)
    taus = [point.tau for point in part.metrics.test]
    assert {0.0, 1.0, part.tau} == set(taus)
    tested = [point.balanced_error.error for point in part.metrics.test]
    expected = errors_of_rescaled(checkpoint, dataset.test, norms, taus)
    np.testing.assert_allclose(tested, expected)


@pytest.mark.slow
def test_the_choices_of_the_command_line_are_in_the_bundle(tiny, tiny_files, tmp_path, capsys):
    path, manifest, checkpoint = tiny
    out = tmp_path / "chosen"
    words = ["--checkpoint", str(path), "--out", str(out)]
    code = export([*words, "--tau-rule", "balanced-error", "--nu", "prior", "--nu-bias", "drop"])
    assert code == 0, capsys.readouterr().err
    made = read(out)
    part = made.manifest.weight_normalisation
    np.testing.assert_allclose(part.norms, manifest.source_prior)
    assert (part.nu, part.bias, part.tau_rule) == ("prior", "drop", "balanced-error")
    assert made.manifest.calibration.tau_rule == "balanced-error"
    assert made.manifest.tau == manifest.calibration.tau_by_error
    assert made.model_bytes() == read(path.parent.parent / "models" / "tiny").model_bytes()
    dataset = read_npz(*tiny_files)
    taus = [point.tau for point in part.metrics.test]
    expected = errors_of_rescaled(checkpoint, dataset.test, np.array(part.norms), taus, "drop")
    np.testing.assert_allclose([point.balanced_error.error for point in part.metrics.test], expected)
    card = (out / "README.md").read_text()
    assert "--tau-rule balanced-error --nu prior --nu-bias drop" in card
    assert "the least balanced error, come from" in card
    assert "over its class's prior to the power tau, the bias dropped" in card


def test_an_onnx_file_has_no_last_layer_to_look_at(tmp_path, capsys):
    words = ["--onnx", "x.onnx", "--classes", "x.csv", "--out", str(tmp_path / "x"), "--nu", "prior"]
    assert export(words) == 2
    assert "--nu goes with --checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["normalised", "cosine"])
def test_a_head_whose_norms_are_fixed_offers_nothing(head):
    assert linear_head(make_network("resnet20", 4, head)) is None
    assert linear_head(make_network("resnet18", 4, head)) is None
    assert len(linear_head(make_network("resnet18", 4)).norms) == 4


def test_a_class_whose_weights_are_all_zero_offers_nothing():
    network = make_network("resnet20", 4)
    with torch.no_grad():
        network.head.weight[2] = 0
    assert linear_head(network) is None


def test_a_rule_of_calibration_leaves_weight_normalisation_to_its_own_rule():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    held = Labelled(rng.normal(0, 1, (60, 3)) + 2 * np.eye(3)[labels], labels)
    nothing = Labelled(np.empty((0, 3)), np.empty(0, dtype=np.int64))
    head = Head(np.array([2.0, 1.0, 0.5]), np.zeros(3))
    prior = np.array([0.7, 0.2, 0.1])

    def made(rule, holdout):
        choices = PostHoc(tau_rule=rule)
        return normalised(head, choices, holdout=holdout, test=nothing, source_prior=prior, groups=[]).part

    assert made("calibration-ece", held).tau_rule == "class-mean-log-loss"
    assert made("balanced-error", held).tau_rule == "balanced-error"
    without = made("balanced-error", nothing)
    assert (without.tau, without.tau_rule, without.tau_curve) == (None, None, [])
    assert without.metrics.test == []
