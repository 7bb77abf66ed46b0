"""Batches from files depend on seed and step alone, and equal those from memory where views are the same."""

from itertools import islice

import numpy as np
import pytest
import torch

from bundle.manifest import Resize
from tests.training.photos import photo
from training.augment import Augmentation
from training.batches import MemoryBatches, Share
from training.file_batches import FileBatches
from training.image_files import find_images, input_of

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
STRONG = Augmentation(1 / 8, distortion=0.5, cutout=0.25)
CROP, STRETCH = Resize(rule="crop", shorter_side=14), Resize()
N = 90


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for n in range(N):
        photo(folder / f"{n:02}.jpg", seed=n, size=(20 + n % 9, 16 + n % 5))
    return folder


def batches(root, resize=CROP, workers=0, augmentation=STRONG) -> FileBatches:
    names = [f"{n:02}.jpg" for n in range(N)]
    files = find_images(root, names, range(N), input_of(12, resize), workers, listed_in="the test")
    return FileBatches(files, MEAN, STD, augmentation=augmentation)


def same(one, other) -> bool:
    return all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(one, other, strict=True))


STEPS = {"seed": 5, "start": 0, "stop": 5, "batch_size": 40}  # two steps an epoch; pieces of 32 and 8


def test_stretched_files_give_the_batches_of_the_same_images_in_memory(root):
    made = batches(root, STRETCH)
    whole = made._files.in_memory()
    images, labels = torch.from_numpy(whole.images), torch.from_numpy(whole.labels)
    memory = MemoryBatches(images, labels, MEAN, STD, augmentation=STRONG)
    assert (made.n_images, made.image_size, made.device) == (N, 12, torch.device("cpu"))
    assert same(made.stream(**STEPS), memory.stream(**STEPS))


def test_balanced_batches_of_files_are_those_of_the_same_images_in_memory(root):
    files = batches(root, STRETCH)._files
    whole = files.in_memory()
    images, labels = torch.from_numpy(whole.images), torch.from_numpy(whole.labels)
    made = FileBatches(files, MEAN, STD, augmentation=STRONG, class_balanced=True)
    memory = MemoryBatches(images, labels, MEAN, STD, augmentation=STRONG, class_balanced=True)
    assert same(made.stream(**STEPS), memory.stream(**STEPS))
    assert not same(made.stream(**STEPS), batches(root, STRETCH).stream(**STEPS))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # on two cores
def test_batches_are_the_same_with_any_number_of_workers(root):
    for resize in (CROP, STRETCH):
        alone, one, three = (list(batches(root, resize, workers).stream(**STEPS)) for workers in (0, 1, 3))
        assert same(alone, one)
        assert same(alone, three)


@pytest.mark.parametrize("start", [1, 2, 3, 4])
def test_a_stream_begun_at_any_step_gives_the_batches_of_the_whole_one(root, start):
    whole = list(batches(root).stream(**STEPS))
    assert same(whole[start:], batches(root).stream(**STEPS | {"start": start}))


def test_inputs_are_normalised_random_parts_in_channels_last_memory(root):
    (first, labels), (second, _) = islice(batches(root, augmentation=Augmentation()).stream(**STEPS), 2)
    assert first.shape == (40, 3, 12, 12)
    assert first.dtype == torch.float32
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    pixels = (first * STD[:, None, None] + MEAN[:, None, None]) * 255
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)
    assert not torch.equal(first, second)


def test_an_epoch_takes_no_image_twice_and_each_epoch_sees_an_image_otherwise(root):
    made = list(batches(root).stream(**STEPS))
    epochs = [torch.cat([labels for _, labels in made[start : start + 2]]).tolist() for start in (0, 2)]
    assert [len(set(epoch)) for epoch in epochs] == [80, 80]
    views = [{int(y): x for xs, ys in made[s : s + 2] for x, y in zip(xs, ys, strict=True)} for s in (0, 2)]
    both = views[0].keys() & views[1].keys()
    assert not any(torch.equal(views[0][image], views[1][image]) for image in both)


@pytest.mark.parametrize("resize", [CROP, STRETCH])
def test_the_shares_of_all_ranks_are_the_batch(root, resize):
    whole = list(batches(root, resize).stream(**STEPS))
    for rank in range(2):
        part = list(batches(root, resize).stream(**STEPS, share=Share(rank, 2)))
        assert same(part, [(inputs[rank::2], labels[rank::2]) for inputs, labels in whole])
        assert all(inputs.is_contiguous(memory_format=torch.channels_last) for inputs, _ in part)


def test_only_the_images_of_its_own_share_are_decoded(root, monkeypatch):
    made = batches(root)
    asked = []
    monkeypatch.setattr(
        type(made._files), "paths", lambda _, places: asked.extend(places) or [root / "00.jpg"] * len(places)
    )
    list(made.stream(seed=1, start=0, stop=2, batch_size=40, share=Share(1, 4)))
    assert len(asked) == len(np.unique(asked)) == 20
