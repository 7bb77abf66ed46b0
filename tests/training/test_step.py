"""The step never reads a value back, so that a GPU can run ahead; recorded, it is the same step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from training.augment import Augmentation
from training.batches import MemoryBatches
from training.loop import fit, new_trainee, seed_weights
from training.losses import LOSSES, LossOptions, make_loss
from training.networks import make_network
from training.recipes import COSINE, with_optimizer
from training.step import Step

CPU = torch.device("cpu")
COUNTS = np.array([30, 20, 10])
RECIPE = COSINE.__class__(**{**COSINE.__dict__, "batch_size": 16})
CHANGING = replace(RECIPE, small_side=0.75, small_until=0.5, averaging=0.9)
READS_BACK = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2"}


class ReadsBack(TorchDispatchMode):
    """Notes every operation after which the host must wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in {"index", "index_put", "index_put_"} and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in READS_BACK or by_mask:
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def data(device=CPU):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8))
    labels = torch.from_numpy(np.repeat(np.arange(3), COUNTS))
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    return MemoryBatches(
        *(part.to(device) for part in (images, labels, mean, std)),
        augmentation=Augmentation(distortion=1.0, cutout=0.5),
    )


def test_the_watch_sees_what_reads_back():
    values = torch.arange(4.0)
    for read in (values.max().item, lambda: values[values > 1], values.nonzero, lambda: bool(values[0] > 0)):
        with ReadsBack() as watch:
            read()
        assert watch.seen


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("name", list(LOSSES))
def test_no_loss_and_no_batch_makes_the_step_wait_for_the_device(name, deferred):
    tau = 1.0 if name.startswith("logit-adjusted") else None
    options = LossOptions(
        deferred_reweighting=deferred,
        label_smoothing=0.1 if name == "cross-entropy" else None,
        **({"tau1": 1.0, "tau2": 0.5} if name == "pairwise" else {}),
    )
    loss = make_loss(name, COUNTS, tau, CPU, options=options)
    for optimizer in ("sgd", "adam"):
        recipe = with_optimizer(CHANGING, optimizer)
        seed_weights(0)
        trainee = new_trainee(make_network("resnet20", 3, loss.head), recipe, CPU)
        steps = fit(trainee, data(), loss, recipe, total_steps=3, seed=0)
        with ReadsBack() as watch:
            records = list(steps)
        assert watch.seen == set()
        assert all(record.loss.isfinite() for record in records)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_on_a_gpu_a_recorded_step_is_the_step(optimizer):
    device = torch.device("cuda")
    torch.backends.cudnn.deterministic = True
    loss = make_loss("equalised-mask", COUNTS, None, device, options=LossOptions(deferred_reweighting=True))
    recipe = with_optimizer(RECIPE, optimizer)
    ends = []
    for record in (True, False):
        seed_weights(0)
        trainee = new_trainee(make_network("resnet20", 3, loss.head), recipe, device)
        trainee.network.train()
        step = Step(trainee.network, trainee.optimizer, device, record=record)
        batches = data(device).stream(seed=0, start=0, stop=30, batch_size=16)
        losses = [
            step.take(inputs, labels, loss.at(place / 30), rate=recipe.rate(place, 30), draw=place)
            for place, (inputs, labels) in enumerate(batches)
        ]
        ends.append([*trainee.network.state_dict().values(), torch.stack(losses)])
    for recorded, plain in zip(*ends, strict=True):
        assert torch.equal(recorded, plain)
