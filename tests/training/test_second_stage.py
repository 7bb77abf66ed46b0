"""cRT and LWS as a user types them: what trains and what stays, what the bundle says, what is refused."""

import multiprocessing
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from bundle.files import read
from longtail.calibration import fit_offset_and_temperature
from tests.training.killed_run import fit_and_die
from training import checkpoint as checkpoints
from training.bundling import training_command
from training.data import split
from training.evaluate import evaluate
from training.exceptions import RunError
from training.fit import _backbone, _parser, _plan, _second_plan, main
from training.networks import make_network
from training.npz import read_npz
from training.progress import Progress
from training.run import train
from training.second_stage import plain_network, stage_network, stage_on

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def first_run(tiny_files, tmp_path_factory):
    """A folder with runs/tiny, finished, that has learned enough for its features to be of use."""
    folder = tmp_path_factory.mktemp("first")
    train_file, test_file = tiny_files
    words = [
        *("--dataset", "npz", "--train-file", str(train_file), "--test-file", str(test_file)),
        *("--network", "resnet20", "--recipe", "cosine", "--steps", "60", "--holdout", "0.3"),
        *("--out", str(folder / "models" / "tiny")),
    ]
    plan = _plan(_parser().parse_args(words))
    dataset = read_npz(*tiny_files)
    train(
        plan,
        dataset,
        split(dataset, plan.holdout, plan.seed),
        folder / "runs" / "tiny",
        device=CPU,
        progress=Progress(),
        resume=False,
    )
    return folder


@pytest.fixture(scope="module")
def staged(first_run, tmp_path_factory):
    """A folder with runs/crt, runs/lws and their bundles, on the first run."""
    folder = tmp_path_factory.mktemp("staged")
    for classifier in ("crt", "lws"):
        assert main(command(first_run, folder, classifier)) == 0
    return folder


def command(first_run, folder, classifier, *more, name=None):
    return [
        *("--backbone", str(first_run / "runs" / "tiny"), "--classifier", classifier),
        *("--steps", "30", "--device", "cpu", "--runs", str(folder / "runs")),
        *("--out", str(folder / "models" / (name or classifier)), *more),
    ]


def saved(folder, name):
    return checkpoints.load(folder / "runs" / name / "checkpoint.pt")


@pytest.mark.slow
@pytest.mark.parametrize("classifier", ["crt", "lws"])
def test_the_backbone_stays_as_it_was_batch_statistics_too_and_the_head_does_not(
    staged, first_run, classifier
):
    first = saved(first_run, "tiny").weights
    made = saved(staged, classifier)
    network = plain_network(made.plan, 4, "linear", made.weights).state_dict()
    for name, tensor in first.items():
        if not name.startswith("head."):
            assert torch.equal(network[name], tensor), name
    if classifier == "lws":
        scale = made.weights["head.scale"]
        torch.testing.assert_close(network["head.weight"], first["head.weight"] * scale[:, None])
        torch.testing.assert_close(network["head.bias"], first["head.bias"] * scale)
        assert not torch.equal(scale, torch.ones(4))
    else:
        assert not torch.allclose(network["head.weight"], first["head.weight"], atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("classifier", ["crt", "lws"])
def test_the_bundle_holds_the_plain_network_with_its_offset(staged, first_run, tiny_files, classifier):
    bundle = read(staged / "models" / classifier)
    manifest, made = bundle.manifest, saved(staged, classifier)
    start = np.log(manifest.source_prior)
    held = bundle.holdout()
    if classifier == "crt":
        np.testing.assert_allclose(manifest.logit_offset, start)
        assert manifest.calibration.logit_offset == "known"
    else:
        fitted = fit_offset_and_temperature(held.logits, held.labels, start)
        np.testing.assert_allclose(manifest.logit_offset, fitted.logit_offset)
        assert manifest.calibration.logit_offset == ("fitted" if fitted.converged else "assumed")
    # the trained one, with its frozen backbone and scales, answers as the exported one
    first = saved(first_run, "tiny")
    network = stage_network(made.plan, 4, "linear", first.weights)
    network.load_state_dict(made.weights)
    cut = split(read_npz(*tiny_files), 0.3, seed=0)
    expected = evaluate(network, cut.holdout, mean=made.mean, std=made.std, device=CPU)
    np.testing.assert_allclose(held.logits, expected, atol=1e-4)
    head = plain_network(made.plan, 4, "linear", made.weights).head
    norms = head.weight.detach().double().norm(dim=1).numpy()
    np.testing.assert_allclose(manifest.weight_normalisation.norms, norms)
    assert manifest.recipe["classifier"] == classifier
    card = (bundle.folder / "README.md").read_text()
    assert f"--backbone runs/tiny --classifier {classifier}" in card
    assert "over the frozen backbone of tiny" in card


@pytest.mark.slow
def test_the_new_head_learns_what_the_features_tell(staged):
    losses = [row["loss"] for row in saved(staged, "crt").history]
    assert losses[-1] < 0.8 * np.log(4)  # of four classes that come equally often, a blind head has log 4


def test_the_head_alone_trains_and_the_backbone_does_not_follow_its_batches(first_run):
    first = saved(first_run, "tiny")
    plan = replace(first.plan, loss="cross-entropy", second_stage=stage_on(first, "tiny", "lws"))
    network = stage_network(plan, 4, "linear", first.weights).train()
    assert [name for name, one in network.named_parameters() if one.requires_grad] == ["head.scale"]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network(torch.randn(8, 3, 12, 12)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.head.scale.grad is not None
    assert all(parameter.grad is None for parameter in network.backbone.parameters())


@pytest.mark.slow
def test_a_killed_second_stage_resumes_to_the_same_weights(first_run, staged, tmp_path):
    classifier = "lws"
    words = command(first_run, tmp_path, classifier, "--checkpoint-every", "0")
    killed = multiprocessing.get_context("spawn").Process(target=fit_and_die, args=(words, 17))
    killed.start()
    killed.join()
    assert killed.exitcode == -9
    assert 0 < saved(tmp_path, classifier).step < 30
    assert main([*words, "--resume"]) == 0
    expected = saved(staged, classifier).network
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in saved(tmp_path, classifier).network.items()
    )


def plan_of(words, first_run, given=()):
    backbone = _backbone(first_run / "runs" / "tiny")
    return _second_plan(_parser().parse_args(words), set(given), backbone)


@pytest.mark.slow
def test_the_command_in_the_card_gives_the_plan_again(staged, first_run):
    plan = saved(staged, "crt").plan
    words = training_command(plan, staged / "models" / "crt").split()[3:]
    words[words.index("runs/tiny")] = str(first_run / "runs" / "tiny")
    assert plan_of(words, first_run) == plan


def test_what_the_backbone_has_may_be_said_again(first_run, tmp_path):
    more = ["--dataset", "npz", "--network", "resnet20", "--seed", "0", "--loss", "cross-entropy"]
    words = command(first_run, tmp_path, "crt")
    given = ("dataset", "network", "seed", "loss")
    assert plan_of([*words, *more], first_run, given) == plan_of(words, first_run)


def refusal(capsys, words):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--network", "resnet32"], "--network resnet32: the backbone has resnet20"),
        (["--dataset", "cifar10-lt"], "--dataset cifar10-lt: the backbone has npz"),
        (["--holdout", "0.2"], "--holdout 0.2: the backbone has 0.3"),
        (["--seed", "7"], "--seed 7: the backbone has 0"),
        (["--loss", "balanced"], "--loss does not go with --classifier, which trains by cross-entropy"),
        (["--tau", "1"], "--tau does not go with --classifier"),
        (["--head", "cosine"], "--head does not go with --classifier"),
        (["--train-file", "TEST"], "was trained on other images or labels than those here"),
    ],
)
def test_what_does_not_fit_the_backbone_is_refused_in_one_line(
    first_run, tiny_files, tmp_path, capsys, more, reason
):
    words = [str(tiny_files[1]) if word == "TEST" else word for word in more]
    assert reason in refusal(capsys, command(first_run, tmp_path, "crt", *words))
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
def test_a_run_that_is_no_backbone_is_refused(first_run, staged, tmp_path, capsys):
    (tmp_path / "half").mkdir()
    checkpoint = saved(first_run, "tiny")
    checkpoints.save(replace(checkpoint, step=5), tmp_path / "half" / "checkpoint.pt")

    def on(run, classifier="crt"):
        words = command(first_run, tmp_path, classifier)
        words[1] = str(run)
        return refusal(capsys, words)

    assert "has taken 5 of 60 steps: resume it first" in on(tmp_path / "half")
    assert "there is no checkpoint" in on(tmp_path / "nowhere")
    assert "is a second stage itself" in on(staged / "runs" / "crt")
    cosine = make_network("resnet20", 4, "cosine").state_dict()
    checkpoints.save(replace(checkpoint, network=cosine, average=None), tmp_path / "half" / "checkpoint.pt")
    assert "does not end in a plain linear layer" in on(tmp_path / "half", "lws")


def test_a_stage_on_other_weights_is_refused(first_run):
    first = saved(first_run, "tiny")
    plan = replace(first.plan, loss="cross-entropy", second_stage=stage_on(first, "tiny", "crt"))
    other = {name: tensor + 1 for name, tensor in first.weights.items()}
    for backbone in (None, other):
        with pytest.raises(RunError, match="stands on other weights"):
            stage_network(plan, 4, "linear", backbone)


def test_classifier_and_backbone_go_together(first_run, tiny_command, tmp_path, capsys):
    assert "--classifier needs --backbone" in refusal(capsys, [*tiny_command, "--classifier", "crt"])
    words = command(first_run, tmp_path, "crt")
    assert "--backbone needs --classifier: crt or lws" in refusal(capsys, [*words[:2], *words[4:]])
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    assert "--dataset is needed" in refusal(capsys, ["--out", str(tmp_path / "models" / "x")])


@pytest.mark.slow
def test_a_resume_by_the_other_classifier_is_refused(first_run, staged, tmp_path, capsys):
    shutil.copytree(staged / "runs" / "crt", tmp_path / "runs" / "lws")
    line = refusal(capsys, command(first_run, tmp_path, "lws", "--resume"))
    assert "classifier was crt, now lws" in line
