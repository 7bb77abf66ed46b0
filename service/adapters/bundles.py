"""Puts every bundle of a folder into service (read, compose, engine, queue), or says why not."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from bundle.files import BundleError, read
from bundle.manifest import ImageInput
from bundle.preprocessing import MAX_PIXELS
from longtail.priors import checked_source_prior
from service.adapters import images
from service.adapters.onnx_engine import build
from service.adapters.onnx_session import ProviderError, cores
from service.adapters.serving_graph import compose
from service.core.batcher import Batcher, BatchReport, Capacity
from service.core.decide import Decider
from service.core.exceptions import Invalid
from service.core.models import LoadedModel, Models, RefusedBundle
from service.core.ports import EngineError
from service.core.records import Group, ModelVersion, WeightNormalisation
from service.core.watched import WatchedEngine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from bundle.files import Bundle
    from bundle.manifest import Manifest
    from service.adapters.onnx_engine import Choice

_log = logging.getLogger("tare.models")


def load_all(
    folder: Path,
    *,
    default: str | None = None,
    provider: Choice = "auto",
    capacity: Capacity | None = None,
    run_threads: int = 1,
    lone_threads: int | None = 1,
    cache: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    listen: Callable[[str, BatchReport], None] | None = None,
    lost: Callable[[str], None] | None = None,
) -> Models:
    """Load every bundle in `folder`, by folder name; one that cannot be served is refused, the rest load.

    `default` names the default model; of `run_threads`, `lone_threads` and `cache` see OnnxEngine. `listen`
    hears of each batch, with its model's name, on the thread that ran it; `lost` that the device is gone for
    this process. Names that begin with a dot, and plain files, are no bundles.
    """
    capacity = capacity or Capacity(workers=cores())
    loaded: dict[str, LoadedModel] = {}
    refused: list[RefusedBundle] = []
    for place in _folders(folder):
        name = None
        try:
            bundle = read(place)
            name = bundle.manifest.name
            if name in loaded:
                name = None
                raise BundleError("model-name-taken", "another folder already serves a model of this name")
            loaded[name] = load(
                bundle,
                provider,
                capacity,
                run_threads=run_threads,
                lone_threads=lone_threads,
                cache=cache,
                max_pixels=max_pixels,
                listen=listen,
                lost=lost,
            )
        except BundleError as failure:
            refused.append(RefusedBundle(place.name, failure.code, failure.detail))
        except ProviderError as failure:
            refused.append(RefusedBundle(place.name, "provider-unavailable", str(failure), name))
        except EngineError as failure:
            refused.append(RefusedBundle(place.name, "model-does-not-run", str(failure)))
    for model in loaded.values():
        _log.info("model %s %s runs on %s", model.name, model.version.version, model.engine.provider)
    for entry in refused:
        _log.error("bundle %s refused: %s: %s", entry.folder, entry.code, entry.detail)
    return Models(list(loaded.values()), refused, default)


def load(
    bundle: Bundle,
    provider: Choice,
    capacity: Capacity,
    *,
    run_threads: int = 1,
    lone_threads: int | None = 1,
    cache: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    listen: Callable[[str, BatchReport], None] | None = None,
    lost: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Put one bundle into service. Raises BundleError, or EngineError where it cannot run here."""
    version = version_of(bundle)
    built = build(
        compose(bundle),
        provider,
        largest_batch=capacity.largest_batch,
        threads=run_threads,
        lone_threads=lone_threads,
        cache=cache,
    )
    engine = WatchedEngine(built, usual_s=built.largest_run_s, lost=lost)
    decider = Decider(_decoder(bundle.manifest, max_pixels), engine, version.temperature)
    hear = None if listen is None else partial(listen, version.name)
    batcher = Batcher(decider.prepare, decider.run, capacity, name=version.name, listen=hear)
    return LoadedModel(version, bundle.manifest, engine, batcher)


def _decoder(manifest: Manifest, max_pixels: int) -> Callable[[bytes], NDArray[np.uint8]]:
    spec, name = manifest.input, manifest.name
    if isinstance(spec, ImageInput):
        return partial(images.pixels, spec=spec, max_pixels=max_pixels)

    def refuse(_: bytes) -> NoReturn:
        raise Invalid(
            "not-of-images",
            f"The model {name!r} takes tensors, no images; send them to /v2/models/{name}/infer.",
        )

    return refuse


def version_of(bundle: Bundle) -> ModelVersion:
    """Return what replay needs of a bundle."""
    manifest = bundle.manifest
    normalised = manifest.weight_normalisation
    return ModelVersion(
        name=manifest.name,
        version=bundle.version,
        labels=tuple(manifest.labels),
        class_counts=manifest.class_counts,
        source_prior=checked_source_prior(manifest.source_prior),
        logit_offset=np.array(manifest.logit_offset),
        temperature=manifest.temperature,
        tau=manifest.tau,
        groups=tuple(Group(group.name, tuple(group.indices)) for group in manifest.groups),
        weight_normalisation=None
        if normalised is None
        else WeightNormalisation(
            np.array(normalised.norms), np.array(normalised.biases), normalised.bias, normalised.tau
        ),
    )


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(
            entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
    except OSError as failure:
        _log.error("the folder of models cannot be read: %s", failure.strerror)
        return []
