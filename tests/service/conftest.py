"""The whole application on a tiny bundle: real ONNX Runtime, real SQLite, in a folder of the test."""

import pytest
from starlette.testclient import TestClient

from service.adapters import sql_writer
from service.app import create_app
from service.settings import Settings
from tests import tiny


@pytest.fixture
def settings_for(tmp_path, tiny_models):
    """Make settings for this test's own state; keywords replace them."""

    def make(**changes):
        given = {"models_dir": tiny_models, "state_dir": tmp_path / "state", "lone_threads": 1}
        return Settings(**{**given, **changes})

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
def image(pixels):
    """A PNG of `pixels`."""
    return tiny.png(pixels)


@pytest.fixture
def busy_chores(monkeypatch):
    """The store's chores come every 20 ms, not every ten seconds."""
    monkeypatch.setattr(sql_writer, "CHORES_EVERY_S", 0.02)
