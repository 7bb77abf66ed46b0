"""The loop may be stopped after any step and go on as if it had not been."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from training.augment import Augmentation
from training.batches import MemoryBatches, Share, steps_per_epoch
from training.loop import (
    choose_device,
    fit,
    new_trainee,
    seed_weights,
)
from training.losses import make_loss
from training.networks import make_network
from training.recipes import COSINE
from training.step import has_bf16

CPU = torch.device("cpu")
PLAIN = Augmentation()
CHANGED = Augmentation(distortion=1.0, cutout=0.5)
RECIPE = COSINE.__class__(**{**COSINE.__dict__, "batch_size": 16})


def tiny_data(device=CPU, labels_are_positions=False, augmentation=PLAIN) -> MemoryBatches:
    rng = np.random.default_rng(0)
    labels = torch.arange(3).repeat_interleave(20)
    images = torch.from_numpy(rng.integers(0, 120, (60, 8, 8, 3), dtype=np.uint8)) + labels[
        :, None, None, None
    ].mul(60).to(torch.uint8)
    if labels_are_positions:
        labels = torch.arange(60)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    return MemoryBatches(
        *(part.to(device) for part in (images, labels, mean, std)), augmentation=augmentation
    )


def trainee():
    seed_weights(1)
    return new_trainee(make_network("resnet20", 3), RECIPE, CPU)


def run(one, data, steps=None, total=8, seed=5):
    loss = make_loss("cross-entropy", np.full(3, 1 / 3), None, CPU)
    return list(islice(fit(one, data, loss, RECIPE, total_steps=total, seed=seed), steps))


@pytest.mark.parametrize(
    "stop", [1, 3, 4, 7]
)  # an epoch has 3 steps: amid one, at its end, at the last but one
def test_a_run_stopped_after_any_step_goes_on_to_the_same_weights(stop):
    data, whole, cut = tiny_data(), trainee(), trainee()
    run(whole, data)
    run(cut, data, steps=stop)
    state = cut.network.state_dict(), cut.optimizer.state_dict()
    resumed = new_trainee(make_network("resnet20", 3), RECIPE, CPU)
    resumed.network.load_state_dict(state[0])
    resumed.optimizer.load_state_dict(state[1])
    resumed.step = cut.step
    rest = run(resumed, data)
    assert [record.step for record in rest] == list(range(stop + 1, 9))
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, resumed.network.state_dict()[name]), name


def test_an_epoch_takes_no_image_twice():
    stream = tiny_data(labels_are_positions=True).stream(seed=0, start=0, stop=6, batch_size=16)
    seen = [position for _, labels in stream for position in labels.tolist()]
    assert len(seen) == 96
    assert len(set(seen[:48])) == len(set(seen[48:])) == 48
    assert seen[:48] != seen[48:]


def test_a_stream_that_starts_amid_an_epoch_gives_the_batches_of_the_whole_one():
    data = tiny_data(augmentation=CHANGED)
    whole = list(data.stream(seed=2, start=0, stop=7, batch_size=16))
    late = list(data.stream(seed=2, start=4, stop=7, batch_size=16))
    for (inputs, labels), (late_inputs, late_labels) in zip(whole[4:], late, strict=True):
        assert torch.equal(inputs, late_inputs)
        assert torch.equal(labels, late_labels)
        assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_the_shares_of_all_ranks_are_the_batch():
    data = tiny_data(augmentation=CHANGED)
    ((inputs, labels),) = data.stream(seed=2, start=1, stop=2, batch_size=16)
    for rank in range(2):
        ((part, part_labels),) = data.stream(seed=2, start=1, stop=2, batch_size=16, share=Share(rank, 2))
        assert torch.equal(part, inputs[rank::2])
        assert torch.equal(part_labels, labels[rank::2])
        assert part.is_contiguous(memory_format=torch.channels_last)


def test_training_lowers_the_loss():
    records = run(trainee(), tiny_data(), total=30)
    assert np.mean([float(r.loss) for r in records[-5:]]) < 0.5 * float(records[0].loss)


def test_a_set_smaller_than_a_batch_is_one_step_an_epoch():
    assert [steps_per_epoch(n, 128) for n in (1, 127, 128, 300)] == [1, 1, 1, 2]


def test_a_gpu_that_is_not_there_is_refused_and_auto_takes_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(Exception, match="finds no usable GPU"):
        choose_device("cuda")
    assert has_bf16(CPU) in (True, False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_same_seed_gives_the_same_weights():
    device = choose_device("cuda")
    recipe = replace(RECIPE, small_side=0.5, small_until=0.5, averaging=0.9)
    ends = []
    for _ in range(2):
        seed_weights(1)
        one = new_trainee(make_network("resnet20", 3), recipe, device)
        data = tiny_data(device, augmentation=CHANGED)
        loss = make_loss("cross-entropy", np.full(3, 1 / 3), None, device)
        list(fit(one, data, loss, recipe, total_steps=16, seed=5))
        ends.append(one.average.state)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
