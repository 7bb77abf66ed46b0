"""Which bundles are served, which is the default, and what is said of the others."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from service.adapters import bundles
from service.adapters.bundles import load_all
from service.core import watched
from service.core.batcher import Capacity
from service.core.exceptions import NotFound, Unavailable
from service.core.models import LoadedModel, Models
from service.core.ports import DeviceLostError, EngineError
from service.core.watched import WatchedEngine
from tests import tiny
from tests.service.gpu import needs_no_gpu

SMALL = Capacity(workers=1, largest_batch=4)


@contextmanager
def loading(folder, **options):
    models = load_all(folder, capacity=SMALL, **options)
    try:
        yield models
    finally:
        asyncio.run(models.stop())


def broken(folder):
    tiny.make(folder)
    (folder / "model.onnx").write_bytes(b"something else")


def test_every_bundle_is_loaded_and_the_first_name_is_the_default(tmp_path):
    for name in ("walnut", "acorn", "hazel"):
        tiny.make(tmp_path / name)
    (tmp_path / "README.md").write_text("no bundle")
    (tmp_path / ".acorn-scratch").mkdir()
    with loading(tmp_path) as models:
        assert [model.name for model in models.all()] == ["acorn", "hazel", "walnut"]
        assert models.refused == ()
        assert models.default is models.get() is models.get("acorn")
        assert models.missing is None
        assert models.get("hazel").engine.provider == "cpu"


def test_a_model_is_what_its_manifest_says(tmp_path):
    bundle = tiny.make(tmp_path / "acorn", logit_offset=[0.0, 1.0, -1.0, 0.5], tau=1.5)
    with loading(tmp_path) as models:
        model = models.get("acorn")
        assert model.version.version == bundle.version
        assert model.version.labels == tiny.LABELS
        assert model.version.class_counts.tolist() == bundle.manifest.class_counts.tolist()
        np.testing.assert_allclose(model.version.source_prior, bundle.manifest.source_prior)
        assert model.version.logit_offset.tolist() == [0.0, 1.0, -1.0, 0.5]
        assert (model.version.temperature, model.version.tau) == (1.25, 1.5)
        assert [group.name for group in model.version.groups] == ["many", "medium", "few"]
        assert model.manifest == bundle.manifest


def test_a_bad_bundle_is_refused_by_folder_code_and_reason_and_the_others_load(tmp_path, caplog):
    tiny.make(tmp_path / "good")
    broken(tmp_path / "changed")
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "good")
    copy = tmp_path / "second-good"
    shutil.copytree(tmp_path / "good", copy)
    with loading(tmp_path) as models:
        assert [model.name for model in models.all()] == ["good"]
        assert {entry.folder: entry.code for entry in models.refused} == {
            "changed": "bundle-checksum",
            "empty": "bundle-incomplete",
            "linked": "bundle-link",
            "second-good": "model-name-taken",
        }
        for entry in models.refused:
            assert entry.detail
            assert entry.folder in caplog.text
        with pytest.raises(NotFound) as refused:
            models.get("changed")
        assert refused.value.code == "model-not-found"


def test_the_default_asked_for_is_never_replaced_by_another(tmp_path):
    tiny.make(tmp_path / "acorn")
    tiny.make(tmp_path / "hazel")
    broken(tmp_path / "walnut")
    with loading(tmp_path, default="hazel") as models:
        assert models.default is models.get("hazel")
    for wanted, reason in (("walnut", "sha256 differs"), ("beech", "no such bundle")):
        with loading(tmp_path, default=wanted) as models:
            assert models.default is None
            with pytest.raises(Unavailable, match=reason) as refused:
                models.get()
            assert refused.value.code == "no-model"
            assert models.get("acorn").name == "acorn"


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_bundles_is_no_crash(tmp_path, there):
    folder = tmp_path / "models"
    if there:
        folder.mkdir()
    with loading(folder) as models:
        assert models.default is None
        assert models.missing == "No model loads: there is no bundle."


@needs_no_gpu
def test_where_a_provider_cannot_be_had_the_model_is_known_and_cannot_run(tmp_path):
    tiny.make(tmp_path / "acorn")
    with loading(tmp_path, provider="cuda") as models:
        assert models.default is None
        for name, code in ((None, "no-model"), ("acorn", "provider-unavailable")):
            with pytest.raises(Unavailable, match="cuda") as refused:
                models.get(name)
            assert refused.value.code == code
        with pytest.raises(NotFound):
            models.get("beech")


class Clock:
    """A clock that tests turn."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self):
        return self.now


class FakeEngine:
    """Fails or hangs on command."""

    provider = "cpu"

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.runs = 0

    def run(self, pixels, offsets, rows, top_k, *, factors=None, alone=False):
        self.runs += 1
        self.images = len(pixels)
        assert self.gate.wait(30)
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def faked(tmp_path):
    bundle = tiny.make(tmp_path / "acorn")
    real = bundles.load(bundle, "cpu", SMALL)
    engine = FakeEngine()
    clock = Clock()
    watched = WatchedEngine(engine, clock=clock)
    model = LoadedModel(real.version, real.manifest, watched, real.batcher)
    clock.now += 1  # long enough ago for the engine's start to prove nothing
    yield model, engine, clock
    engine.gate.set()
    real.batcher.stop()


def batch(images):
    return np.zeros((images, 8, 8, 3), np.uint8), np.zeros((1, 4)), np.zeros(images, np.int64), 1


def test_a_canary_passes_where_the_engine_answers_and_tells_why_it_does_not(faked):
    model, engine, clock = faked

    async def main():
        await model.check()
        clock.now += 1
        engine.failure = EngineError("the device is lost")
        with pytest.raises(Unavailable, match="the device is lost") as refused:
            await model.check()
        assert refused.value.code == "engine-failed"
        assert not model.ready
        engine.failure = None
        await model.check()
        assert model.ready

    asyncio.run(main())


def test_a_batch_that_went_well_a_moment_ago_saves_the_canary(faked):
    model, engine, clock = faked

    async def main():
        model.engine.run(*batch(3))
        clock.now += 0.3
        await model.check()
        assert engine.runs == 1
        clock.now += 0.3
        await model.check()
        assert engine.runs == 2

    asyncio.run(main())


def test_after_a_failed_batch_only_one_as_large_proves_the_engine_well(faked):
    model, engine, _ = faked

    async def main():
        engine.failure = EngineError("out of memory")
        with pytest.raises(EngineError):
            model.engine.run(*batch(7))
        engine.failure = None
        model.engine.run(*batch(2))
        assert not model.ready
        await model.check()
        assert engine.images == 7
        assert model.ready

    asyncio.run(main())


def test_an_engine_that_hangs_is_not_ready_and_holds_one_canary(faked, monkeypatch):
    model, engine, _ = faked
    monkeypatch.setattr(watched, "PATIENCE_S", 0.02)

    async def main():
        engine.gate.clear()
        for _ in range(3):
            with pytest.raises(Unavailable) as refused:
                await model.check()
            assert refused.value.code == "engine-silent"
        assert engine.runs == 1
        engine.gate.set()
        await model.check()

    asyncio.run(main())


def test_a_batch_that_outlasts_all_patience_makes_it_not_ready_at_once(faked):
    model, engine, clock = faked

    async def main():
        engine.gate.clear()
        stuck = threading.Thread(target=model.engine.run, args=batch(2))
        stuck.start()
        while not engine.runs:
            await asyncio.sleep(0.001)
        clock.now += 1.4
        assert model.ready
        clock.now += 0.2
        assert not model.ready
        with pytest.raises(Unavailable) as refused:
            await model.check()
        assert refused.value.code == "engine-silent"
        assert engine.runs == 1  # no canary was needed to know it
        engine.gate.set()
        await asyncio.to_thread(stuck.join)
        await model.check()

    asyncio.run(main())


def test_an_engine_that_is_slow_by_nature_is_given_its_time():
    engine, clock = FakeEngine(), Clock()
    slow = WatchedEngine(engine, usual_s=3.0, clock=clock)
    engine.gate.clear()
    running = threading.Thread(target=slow.run, args=batch(16))
    running.start()
    while not engine.runs:
        time.sleep(0.001)
    clock.now += 11
    assert not slow.stuck
    clock.now += 2
    assert slow.stuck
    engine.gate.set()
    running.join()


def test_whoever_listens_hears_that_the_device_is_lost_and_not_of_other_failures():
    engine, heard = FakeEngine(), []
    watching = WatchedEngine(engine, lost=heard.append)
    for failure in (EngineError("once"), DeviceLostError("for good")):
        engine.failure = failure
        with pytest.raises(EngineError):
            watching.run(*batch(1))
    assert heard == ["for good"]


def test_a_model_whose_workers_have_ended_is_not_ready(faked):
    model, _, _ = faked

    async def main():
        await asyncio.to_thread(model.batcher.stop)
        with pytest.raises(Unavailable, match="worker"):
            await model.check()
        assert not model.ready

    asyncio.run(main())


def test_the_real_engine_passes_its_probe(tmp_path):
    tiny.make(tmp_path / "acorn")
    with loading(tmp_path) as models:
        asyncio.run(models.get().check())


def test_no_models_are_no_models():
    assert Models([]).all() == ()
