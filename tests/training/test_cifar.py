"""The CIFAR readers: on a tree made here for CIFAR-10, on the real files for CIFAR-100."""

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision

from training.cifar import read_cifar
from training.exceptions import DataError


def cifar10_tree(folder: Path, monkeypatch: pytest.MonkeyPatch, per_class: int) -> np.ndarray:
    """Lay out a folder as CIFAR-10's, 4 test images a class, that torchvision accepts; return the labels."""
    inner = folder / "cifar-10-batches-py"
    inner.mkdir()
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    rng = np.random.default_rng(0)

    def write(name, content) -> str:
        data = pickle.dumps(content)
        (inner / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(labels):
        return {"data": rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8), "labels": labels}

    labels = rng.permutation(np.repeat(np.arange(10), per_class)).tolist()
    train = [
        [name, write(name, batch(labels[2 * per_class * place :][: 2 * per_class]))]
        for place, name in enumerate(f"data_batch_{n}" for n in range(1, 6))
    ]
    test = [["test_batch", write("test_batch", batch([*range(10)] * 4))]]
    meta = {
        "filename": "batches.meta",
        "key": "label_names",
        "md5": write("batches.meta", {"label_names": names}),
    }
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", test)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
    return np.array(labels)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    return tmp_path, cifar10_tree(tmp_path, monkeypatch, 40)


@pytest.mark.slow
def test_a_cifar10_of_the_published_size_is_cut_to_the_published_sizes(tmp_path, monkeypatch):
    cifar10_tree(tmp_path, monkeypatch, 5000)
    published = {
        ("exp", 100): (12_406, 50),
        ("exp", 200): (11_203, 25),
        ("step", 100): (25_250, 50),
    }
    for (profile, ratio), (images, smallest) in published.items():
        counts = read_cifar("cifar10-lt", tmp_path, profile, float(ratio)).class_counts
        assert (counts.sum(), counts.max(), counts.min()) == (images, 5000, smallest)


def test_cifar10_is_read_and_cut_by_the_published_selection(cifar10):
    root, _ = cifar10
    made = read_cifar("cifar10-lt", root, "exp", 10.0)
    assert made.class_labels[:2] == ("airplane", "automobile")
    assert made.class_counts.tolist() == [int(40 * 0.1 ** (c / 9)) for c in range(10)]
    assert made.train.images.shape == (int(made.class_counts.sum()), 32, 32, 3)
    assert np.bincount(made.test.labels).tolist() == [4] * 10


def test_images_keep_their_labels_through_the_cut(cifar10):
    root, labels = cifar10
    made = read_cifar("cifar10-lt", root, "step", 4.0)
    whole = torchvision.datasets.CIFAR10(root, train=True)
    by_image = {image.tobytes(): label for image, label in zip(whole.data, labels, strict=True)}
    assert [by_image[image.tobytes()] for image in made.train.images] == made.train.labels.tolist()


def test_a_ratio_that_empties_a_class_is_refused_by_the_name_of_the_class(cifar10):
    with pytest.raises(DataError, match="class 'ship' has no training image"):
        read_cifar("cifar10-lt", cifar10[0], "exp", 100.0)


def test_a_folder_without_the_files_is_refused_in_one_line(tmp_path):
    with pytest.raises(DataError, match="does not hold the original files of cifar100-lt") as refusal:
        read_cifar("cifar100-lt", tmp_path, "exp", 100.0)
    assert "\n" not in str(refusal.value)
    assert "cifar-100-python/" in str(refusal.value) and "download=" not in str(refusal.value)
    with pytest.raises(DataError, match="there is no folder"):
        read_cifar("cifar100-lt", tmp_path / "nowhere", "exp", 100.0)


def test_a_damaged_file_is_refused(cifar10):
    root, _ = cifar10
    with (root / "cifar-10-batches-py" / "data_batch_3").open("ab") as file:
        file.write(b"!")
    with pytest.raises(DataError, match="does not hold the original files of cifar10-lt"):
        read_cifar("cifar10-lt", root, "exp", 10.0)


@pytest.mark.data
@pytest.mark.skipif("TARE_DATA_DIR" not in os.environ, reason="TARE_DATA_DIR is not set")
def test_cifar100_lt_has_10847_images_at_ratio_100_and_its_groups_are_35_34_31():
    made = read_cifar("cifar100-lt", Path(os.environ["TARE_DATA_DIR"]), "exp", 100.0)
    counts = made.class_counts
    assert (len(made.train), counts[0], counts[-1], len(made.test)) == (10_847, 500, 5, 10_000)
    assert (made.class_labels[0], made.class_labels[-1]) == ("apple", "worm")
    assert [(counts >= 100).sum(), (counts <= 20).sum()] == [35, 31]
    assert set(np.bincount(made.test.labels)) == {100}
