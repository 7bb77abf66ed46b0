"""Live and ready as the Open Inference Protocol means them: the server, all of its models, and each alone."""

import numpy as np
import pytest

from service.core.exceptions import Unavailable
from service.core.ports import EngineError
from tests import tiny
from tests.service import v2
from tests.service.gpu import needs_no_gpu


@pytest.fixture
def version(lasting_client):
    return lasting_client.get("/models/tiny").json()["version"]


def test_health_is_live_and_ready(lasting_client):
    assert lasting_client.get("/v2/health/live").json()["live"] is True
    assert lasting_client.get("/v2/health/ready").json()["ready"] is True


def test_without_a_model_it_is_live_and_not_ready_and_says_why(client_for, tmp_path):
    client = client_for(models_dir=tmp_path / "none")
    assert client.get("/v2/health/live").status_code == 200
    assert "No model loads" in v2.error(client.get("/v2/health/ready"), 503)


def test_a_model_is_ready_by_name_and_by_version(lasting_client, version):
    for path in ("/v2/models/tiny/ready", f"/v2/models/tiny/versions/{version}/ready"):
        assert lasting_client.get(path).json() == {"name": "tiny", "ready": True}


@pytest.fixture
def two(client_for, tmp_path):
    """A client of a service with two models: acorn is the default, walnut is none of its business."""
    for name in ("acorn", "walnut"):
        tiny.make(tmp_path / "models" / name)
    return client_for(models_dir=tmp_path / "models")


def breaks(client, monkeypatch, name):
    """Let a model's engine fail from here on, as a device does that is lost."""

    def fail(*_, **__):
        raise EngineError("the device is lost")

    engine = client.app.state.parts.models.get(name).engine
    monkeypatch.setattr(engine._engine, "run", fail)
    with pytest.raises(EngineError):
        engine.run(*blank())


def blank():
    return v2.noise(1), *(np.zeros((1, 4)), np.zeros(1, np.int64)), 1


def test_the_server_is_ready_when_every_model_is_and_readyz_asks_the_default_alone(two, monkeypatch, image):
    assert two.get("/v2/health/ready").json() == {"live": True, "ready": True}
    breaks(two, monkeypatch, "walnut")
    assert "the device is lost" in v2.error(two.get("/v2/health/ready"), 503)
    assert two.get("/v2/health/live").json() == {"live": True}
    assert two.get("/readyz").status_code == 200
    assert two.post("/predict", content=image).status_code == 200
    monkeypatch.undo()
    assert two.get("/v2/health/ready").status_code == 200


def test_a_model_that_fails_is_not_ready_by_name_or_version_and_the_other_is(two, monkeypatch):
    version = two.get("/models/walnut").json()["version"]
    breaks(two, monkeypatch, "walnut")
    for path in ("/v2/models/walnut/ready", f"/v2/models/walnut/versions/{version}/ready"):
        assert "the device is lost" in v2.error(two.get(path), 503)
    assert two.get("/v2/models/acorn/ready").json() == {"name": "acorn", "ready": True}
    monkeypatch.undo()
    assert two.get("/v2/models/walnut/ready").json() == {"name": "walnut", "ready": True}


def test_a_bundle_that_is_refused_is_no_model_and_keeps_nobody_from_being_ready(client_for, tmp_path):
    tiny.make(tmp_path / "models" / "acorn")
    tiny.make(tmp_path / "models" / "walnut")
    (tmp_path / "models" / "walnut" / "model.onnx").write_bytes(b"something else")
    client = client_for(models_dir=tmp_path / "models")
    assert client.get("/v2/health/ready").status_code == 200
    assert "no model 'walnut'" in v2.error(client.get("/v2/models/walnut/ready"), 404)


@needs_no_gpu
def test_a_model_that_nothing_here_can_run_is_not_ready_and_says_why(client_for, tmp_path):
    tiny.make(tmp_path / "models" / "acorn")
    client = client_for(models_dir=tmp_path / "models", provider="cuda")
    assert "cuda" in v2.error(client.get("/v2/models/acorn/ready"), 503)
    assert "cuda" in v2.error(client.get("/v2/health/ready"), 503)
    assert client.get("/v2/health/live").status_code == 200


def test_a_store_that_does_not_write_leaves_the_server_live_and_not_ready(two, monkeypatch):
    async def full(*_):
        raise Unavailable("store-unavailable", "The disk is full.")

    monkeypatch.setattr(two.app.state.parts.readiness._store, "check_writable", full)
    assert "disk is full" in v2.error(two.get("/v2/health/ready"), 503)
    assert two.get("/v2/models/acorn/ready").status_code == 200
