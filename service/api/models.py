"""GET /models: which bundles are loaded, which were refused and why, and what each says of itself."""

from typing import Annotated, Any

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field

from bundle.manifest import (
    Group,
    ImageInput,
    Metrics,
    Precision,
    TauPoint,
    TensorInput,
    WeightNormalisation,
)
from service.api.answers import Json
from service.api.parts import PartsDep
from service.core.models import LoadedModel
from service.core.records import Method

router = APIRouter(tags=["models"])


class ModelEntry(BaseModel):
    """A loaded model in short."""

    name: str
    version: str
    classes: int
    ready: bool
    provider: str = Field(description="What truly runs it.")
    methods: list[Method] = Field(description="What `method` may say to it.")


class RefusedOut(BaseModel):
    """A folder that did not load."""

    folder: str
    code: str
    detail: str


class ModelsOut(BaseModel):
    """All of them. `default` is null where none is."""

    default: str | None
    models: list[ModelEntry]
    refused: list[RefusedOut]


class ModelDetail(ModelEntry):
    """A loaded model in full; lists run by index."""

    labels: list[str]
    class_counts: list[int]
    source_prior: list[float]
    logit_offset: list[float]
    temperature: float
    tau: float | None
    tau_curve: list[TauPoint]
    weight_normalisation: WeightNormalisation | None
    groups: list[Group]
    input: ImageInput | TensorInput
    precision: Precision | None = Field(description="How it was made faster; null: as it was trained.")
    metrics: Metrics


@router.get("/models", response_class=Json, responses={200: {"model": ModelsOut}}, summary="List models")
async def models(parts: PartsDep) -> Json:
    """Every bundle under the models directory: loaded, or refused with the reason."""
    default = parts.models.default
    return Json(
        {
            "default": None if default is None else default.version.name,
            "models": [_entry(one) for one in parts.models.all()],
            "refused": [
                {"folder": one.folder, "code": one.code, "detail": one.detail} for one in parts.models.refused
            ],
        }
    )


@router.get(
    "/models/{name}", response_class=Json, responses={200: {"model": ModelDetail}}, summary="One model"
)
async def model(name: Annotated[str, Path(max_length=64)], parts: PartsDep) -> Json:
    """What this model is made of: labels, counts, priors, calibration, groups and measured errors."""
    loaded = parts.models.get(name)
    manifest = loaded.manifest.model_dump(
        mode="json",
        include={
            "source_prior",
            "logit_offset",
            "temperature",
            "tau",
            "tau_curve",
            "weight_normalisation",
            "groups",
            "input",
            "precision",
            "metrics",
        },
    )
    return Json(
        {
            **_entry(loaded),
            "labels": list(loaded.version.labels),
            "class_counts": loaded.version.class_counts,
            **manifest,
        }
    )


def _entry(loaded: LoadedModel) -> dict[str, Any]:
    return {
        "name": loaded.version.name,
        "version": loaded.version.version,
        "classes": len(loaded.version.labels),
        "ready": loaded.ready,
        "provider": loaded.engine.provider,
        "methods": loaded.version.methods,
    }
