"""Two real processes that train one network, held to one process that takes their shares in turn."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from training import checkpoint as checkpoints
from training.augment import Augmentation
from training.batches import MemoryBatches, Share
from training.data import channel_statistics, split
from training.loop import new_trainee, seed_weights
from training.losses import make_loss
from training.networks import make_network
from training.npz import read_npz
from training.recipes import COSINE
from training.step import has_bf16

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
STEPS, SEED = 8, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def launch(tiny_files, folder):
    """Start the command on two ranks under torchrun; `dies` is (rank, step)."""
    train, test = tiny_files
    processes = []

    def start(name, *more, dies=(0, -1)):
        words = [
            *("--dataset", "npz", "--train-file", train, "--test-file", test, "--network", "resnet20"),
            *(
                "--recipe",
                "cosine",
                "--steps",
                STEPS,
                "--device",
                "cpu",
                "--seed",
                SEED,
                "--loss",
                "balanced",
            ),
            *("--runs", folder / name, "--out", folder / name / "models" / "tiny", *more),
        ]
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
                *("--log-dir", folder / "torchrun", ROOT / "tests" / "training" / "killed_run.py"),
                *map(str, (*dies, *words)),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def pair(launch, folder):
    """What a run of two ranks that was left alone saved and said."""
    code, out, err = finish(launch("pair"))
    assert code == 0, err
    return saved(folder / "pair"), out, err


def finish(process):
    out, err = process.communicate(timeout=250)
    return process.returncode, out, err


def saved(folder):
    return checkpoints.load(folder / "tiny" / "checkpoint.pt")


def in_turn(tiny_files):
    """One process: both half-batches in turn through one network, their gradients averaged."""
    dataset = read_npz(*tiny_files)
    trained = split(dataset, 0.1, SEED).trained
    mean, std = map(torch.tensor, channel_statistics([trained.images]))
    batches = MemoryBatches(
        torch.from_numpy(trained.images),
        torch.from_numpy(trained.labels),
        mean,
        std,
        augmentation=Augmentation(COSINE.crop_padding),
    )
    loss = make_loss("balanced", np.bincount(trained.labels), None, CPU)
    seed_weights(SEED)
    trainee = new_trainee(make_network("resnet20", 4), COSINE, CPU)
    trainee.network.train()
    streams = [
        batches.stream(seed=SEED, start=0, stop=STEPS, batch_size=128, share=Share(rank, 2))
        for rank in range(2)
    ]
    curve = []
    for step, halves in enumerate(zip(*streams, strict=True)):
        for group in trainee.optimizer.param_groups:
            group["lr"] = torch.tensor(COSINE.rate(step, STEPS))
        trainee.optimizer.zero_grad()
        values = []
        for inputs, labels in halves:
            assert len(labels) == 64
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16(CPU)):
                logits = trainee.network(inputs)
            values.append(loss.function(logits, labels, None))
            values[-1].backward()
        for parameter in trainee.network.parameters():
            parameter.grad /= 2
        trainee.optimizer.step()
        curve.append(float(torch.stack(values).detach().mean()))
    return curve, trainee.network


def test_two_processes_have_the_loss_curve_and_weights_of_one_that_takes_both_halves_in_turn(
    pair, tiny_files
):
    together, out, err = pair
    assert len(out.splitlines()) == 1  # the leader alone writes the bundle
    assert err.count("4 classes") == 1  # and talks
    assert together.machine.ranks == 2
    curve, network = in_turn(tiny_files)
    assert curve[-1] < curve[0]
    np.testing.assert_allclose([row["loss"] for row in together.history], curve, rtol=1e-5)  # a row a step
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(together.network[name], parameter.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_ends_the_run_with_one_line_and_a_checkpoint(launch, folder, rank):
    code, _, err = finish(launch(f"without-{rank}", "--checkpoint-every", "0", dies=(rank, 5)))
    assert code != 0
    told = sum("training.fit: another process of this run is gone" in line for line in err.splitlines())
    # torchrun ends the others once it has seen one die: now and then before they have seen it themselves.
    assert told == 1 or (told == 0 and "exitcode  : -15" in err), err
    assert 4 <= saved(folder / f"without-{rank}").step <= 5


def test_two_ranks_resume_to_the_weights_of_a_run_left_alone(launch, folder, pair):
    finish(launch("resumed", "--checkpoint-every", "0", dies=(1, 3)))
    code, _, err = finish(launch("resumed", "--resume"))
    assert code == 0, err
    resumed = saved(folder / "resumed").network
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in pair[0].network.items())


def test_ctrl_c_stops_all_ranks_with_a_checkpoint(launch, folder):
    process = launch("stopped", "--checkpoint-every", "0", "--steps", "100000")
    log = folder / "stopped" / "tiny" / "log.csv"
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code != 0
    assert err.count("the same command with --resume goes on") == 1, err
    assert 2 <= saved(folder / "stopped").step < 100_000


def test_a_refusal_is_said_once(launch):
    code, out, err = finish(launch("refused", "--holdout", "0.9"))
    assert code != 0
    assert out == ""
    assert err.count("training.fit: the held-out share") == 1
