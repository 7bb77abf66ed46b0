"""The whole application on a tiny bundle: real ONNX Runtime, real SQLite, in a folder of the test."""

import io

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests import tiny


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """A models directory with one bundle, made once."""
    folder = tmp_path_factory.mktemp("models")
    tiny.make(folder / "tiny")
    return folder


@pytest.fixture
def settings_for(tmp_path, tiny_models):
    """Make settings for this test's own state; keywords replace them."""

    def make(**changes):
        return Settings(**{"models_dir": tiny_models, "state_dir": tmp_path / "state", **changes})

    return make


@pytest.fixture
def client_for(settings_for):
    """Open a client of the whole application; keywords are settings."""
    opened = []

    def make(**changes):
        client = TestClient(create_app(settings_for(**changes)), follow_redirects=False)
        client.__enter__()
        opened.append(client)
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def client(client_for):
    """A client of the whole application with default settings."""
    return client_for()


@pytest.fixture(scope="module")
def lasting_client(tmp_path_factory, tiny_models):
    """One client for all tests of a module that do not mind what the others did."""
    settings = Settings(models_dir=tiny_models, state_dir=tmp_path_factory.mktemp("lasting") / "state")
    with TestClient(create_app(settings), follow_redirects=False) as client:
        yield client


@pytest.fixture
def pixels():
    """Seeded noise of the tiny network's size."""
    return np.random.default_rng(3).integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)


def png(pixels):
    """The bytes of an image with these pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def image(pixels):
    """A PNG of `pixels`."""
    return png(pixels)
