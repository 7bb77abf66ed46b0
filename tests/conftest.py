"""What the tests of the service's parts and those of whole processes both start from."""

import numpy as np
import pytest

from tests import tiny


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """A models directory with one bundle, made once."""
    folder = tmp_path_factory.mktemp("models")
    tiny.make(folder / "tiny")
    return folder


@pytest.fixture
def pixels():
    """Seeded noise of the tiny network's size."""
    return np.random.default_rng(3).integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
