"""The whole application on a tiny bundle: real ONNX Runtime, real SQLite, in a folder of the test."""

import contextlib
import threading

import pytest
from starlette.testclient import TestClient

from service.adapters import sql_writer
from service.app import create_app
from service.core import batcher
from service.settings import Settings
from tests import tiny
from tests.service import wire


@pytest.fixture
def settings_for(tmp_path, tiny_models):
    """Make settings for this test's own state; keywords replace them."""

    def make(**changes):
        given = {"models_dir": tiny_models, "state_dir": tmp_path / "state", "lone_threads": 1}
        return Settings(**{**given, **changes})

    return make


@pytest.fixture
def app(settings_for):
    """The application itself, for a test that puts its own server round it."""
    return create_app(settings_for())


@pytest.fixture(scope="module")
def way():
    """How clients reach the application; a module with two ways runs its tests by both."""
    return "asgi"


@pytest.fixture
def client_for(settings_for, way):
    """Open a client of the whole application; keywords are settings."""
    with contextlib.ExitStack() as at_end:
        yield lambda **changes: at_end.enter_context(client_by(way, settings_for(**changes)))


@pytest.fixture
def client(client_for):
    """A client of the whole application with default settings."""
    return client_for()


@pytest.fixture(scope="module")
def lasting_client(tmp_path_factory, tiny_models, way):
    """One client for all tests of a module that do not mind what the others did."""
    state = tmp_path_factory.mktemp("lasting") / "state"
    with client_by(way, Settings(models_dir=tiny_models, state_dir=state, lone_threads=1)) as client:
        yield client


def client_by(way, settings):
    """A client that calls the application itself, or that speaks to its HTTP server."""
    app = create_app(settings)
    return wire.client_of(app) if way == "http" else TestClient(app, follow_redirects=False)


@pytest.fixture
def image(pixels):
    """A PNG of `pixels`."""
    return tiny.png(pixels)


@pytest.fixture
def busy_chores(monkeypatch):
    """The store's chores come every 20 ms, not every ten seconds."""
    monkeypatch.setattr(sql_writer, "CHORES_EVERY_S", 0.02)


@pytest.fixture
def gate(monkeypatch):
    """Holds every batch where it begins to decode, while it is closed."""
    gate, real = threading.Event(), batcher.Batcher._answer
    gate.set()

    def answer(self, *arguments):
        assert gate.wait(30)
        return real(self, *arguments)

    monkeypatch.setattr(batcher.Batcher, "_answer", answer)
    yield gate
    gate.set()
