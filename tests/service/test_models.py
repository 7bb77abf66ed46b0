"""Which bundles are served, which is the default, and what is said of the others."""

from __future__ import annotations

import asyncio
import shutil
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from service.adapters import bundles
from service.adapters.bundles import cores, load_all
from service.core.batcher import Capacity
from service.core.exceptions import NotFound, Unavailable
from service.core.models import LoadedModel, Models
from service.core.ports import EngineError
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


class FakeEngine:
    """Fails or hangs on command."""

    provider = "cpu"

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.runs = 0

    def run(self, pixels, offsets, rows, top_k, *, factors=None):
        self.runs += 1
        assert self.gate.wait(30)
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def faked(tmp_path):
    bundle = tiny.make(tmp_path / "acorn")
    real = bundles.load(bundle, "cpu", SMALL)
    engine = FakeEngine()
    model = LoadedModel(real.version, real.manifest, engine, real.batcher)
    yield model, engine
    engine.gate.set()
    asyncio.run(real.batcher.stop())


def test_the_probe_passes_where_the_engine_answers_and_tells_why_it_does_not(faked):
    model, engine = faked

    async def main():
        await model.check()
        engine.failure = EngineError("the device is lost")
        with pytest.raises(Unavailable, match="the device is lost") as refused:
            await model.check()
        assert refused.value.code == "engine-failed"
        engine.failure = None
        await model.check()

    asyncio.run(main())


def test_an_engine_that_hangs_is_not_ready_and_is_probed_once(faked):
    model, engine = faked

    async def main():
        engine.gate.clear()
        for _ in range(3):
            with pytest.raises(Unavailable) as refused:
                await model.check(within_s=0.02)
            assert refused.value.code == "engine-silent"
        assert engine.runs == 1
        engine.gate.set()
        await model.check()

    asyncio.run(main())


def test_a_model_whose_workers_have_ended_is_not_ready(faked):
    model, _ = faked

    async def main():
        await model.batcher.stop()
        with pytest.raises(Unavailable, match="worker"):
            await model.check()

    asyncio.run(main())


def test_the_real_engine_passes_its_probe(tmp_path):
    tiny.make(tmp_path / "acorn")
    with loading(tmp_path) as models:
        asyncio.run(models.get().check())


def test_no_models_are_no_models():
    assert Models([]).all() == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8), ("odd", 8)],
)
def test_cores_are_those_a_container_is_allowed(tmp_path, monkeypatch, text, expected):
    quota = tmp_path / "cpu.max"
    quota.write_text(text)
    monkeypatch.setattr(bundles, "_CPU_MAX", quota)
    monkeypatch.setattr(bundles.os, "sched_getaffinity", lambda _: set(range(8)))
    assert cores() == expected
