"""Everything under /priors: named, versioned target priors, changed with entity tags and rolled back."""

import re
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from service.api.answers import Json
from service.api.bodies import Numbers, RequestModel, json_body
from service.api.parameters import ModelQuery, utc
from service.api.parts import PartsDep
from service.api.tokens import AdminDep
from service.core.priors import DEFAULT, Precondition, PriorSpec, etag
from service.core.records import PriorVersion

router = APIRouter(prefix="/priors", tags=["priors"])

_TAG: Final = re.compile(r'(W/)?("[^"]*")|\*')
_TEXT: Final = Field(None, max_length=1000)


def _only_true(value: bool) -> bool:
    if not value:
        raise ValueError("Input should be true, or the field left out")
    return value


OnlyTrue = Annotated[bool, AfterValidator(_only_true)]


class PriorsIn(RequestModel):
    """Exactly one of `counts`, `probabilities`, `uniform` and `source`; by label, or a list by index."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"uniform": True}, {"source": True, "note": "as it was trained"}]}
    )

    counts: Numbers | None = None
    probabilities: Numbers | None = None
    uniform: OnlyTrue | None = None
    source: OnlyTrue | None = Field(None, description="Copy the source prior of `model` as it is now.")
    smoothing: float | None = Field(None, ge=0, description="Added to each of `counts`; 0 without it.")
    note: str | None = _TEXT
    author: str | None = _TEXT


class RollbackIn(RequestModel):
    """The version to go back to."""

    version: Annotated[int, Field(ge=1, le=1 << 31)]


class PriorsEntryOut(BaseModel):
    """One version without its probabilities."""

    name: str
    version: int
    created: str
    note: str | None
    author: str | None


class PriorsVersionOut(PriorsEntryOut):
    """One version."""

    probabilities: dict[str, float]


class PriorsListOut(BaseModel):
    """The version in force of every name."""

    priors: list[PriorsEntryOut]


class PriorsVersionsOut(BaseModel):
    """Every version of a name, newest first."""

    versions: list[PriorsVersionOut]


def _precondition(request: Request) -> Precondition:
    """Read If-Match and If-None-Match. What is no entity tag matches nothing."""
    return Precondition(
        match=_tags(request, "if-match", weak=False), none_match=_tags(request, "if-none-match", weak=True)
    )


def _tags(request: Request, header: str, *, weak: bool) -> frozenset[str] | None:
    """Return a header's entity tags, None where it is not there. A weak one never holds for If-Match."""
    given = request.headers.getlist(header)
    if not given:
        return None
    return frozenset(found[2] or "*" for found in _TAG.finditer(",".join(given)) if weak or not found[1])


PreconditionDep = Annotated[Precondition, Depends(_precondition)]

# For /openapi.json. The headers are read by hand, for FastAPI would refuse what is repeated or malformed.
_CONDITIONAL: Final[dict[str, Any]] = {
    "parameters": [
        {
            "name": name,
            "in": "header",
            "required": False,
            "schema": {"type": "string"},
            "description": meaning,
        }
        for name, meaning in (
            ("If-Match", "Entity tags, one of which must be the current version's; `*`: there must be one."),
            ("If-None-Match", "Entity tags, none of which may be the current version's; `*`: only make."),
        )
    ]
}
_VERSION: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "model": PriorsVersionOut,
        "headers": {
            "ETag": {"description": "Stands for this version, in If-Match.", "schema": {"type": "string"}}
        },
    }
}


@router.get("", response_class=Json, responses={200: {"model": PriorsListOut}}, summary="List priors")
async def list_priors(parts: PartsDep, model: ModelQuery = None) -> Json:
    """List the version in force of every name that belongs to this model's labels."""
    label_set = parts.models.get(model).version.label_set
    return Json({"priors": [_entry(one) for one in parts.priors.all(label_set)]})


@router.get("/{name}", response_class=Json, responses=_VERSION, summary="Priors")
async def get_priors(name: str, parts: PartsDep, model: ModelQuery = None) -> Json:
    """Return the version in force, with its entity tag."""
    version = parts.models.get(model).version
    return _one(parts.priors.current(version.label_set, name), version.labels)


@router.put(
    "",
    response_class=Json,
    responses=_VERSION,
    dependencies=[AdminDep],
    openapi_extra=_CONDITIONAL,
    summary="Change the default priors",
)
async def put_default(
    body: Annotated[PriorsIn, json_body(PriorsIn)],
    parts: PartsDep,
    precondition: PreconditionDep,
    model: ModelQuery = None,
) -> Json:
    """Make a new version of `default`; it is in force for every request that starts after the answer."""
    return await put_priors(DEFAULT, body, parts, precondition, model)


@router.put(
    "/{name}",
    response_class=Json,
    responses=_VERSION,
    dependencies=[AdminDep],
    openapi_extra=_CONDITIONAL,
    summary="Make or change priors",
)
async def put_priors(
    name: str,
    body: Annotated[PriorsIn, json_body(PriorsIn)],
    parts: PartsDep,
    precondition: PreconditionDep,
    model: ModelQuery = None,
) -> Json:
    """Make a new version of this name; it is in force for every request that starts after the answer."""
    version = parts.models.get(model).version
    spec = PriorSpec(
        counts=body.counts,
        probabilities=body.probabilities,
        uniform=body.uniform is not None,
        source=body.source is not None,
        smoothing=body.smoothing,
        note=body.note,
        author=body.author,
    )
    return _one(await parts.priors.put(version, name, spec, precondition), version.labels)


@router.get(
    "/{name}/versions",
    response_class=Json,
    responses={200: {"model": PriorsVersionsOut}},
    summary="Every version of priors",
)
async def versions(name: str, parts: PartsDep, model: ModelQuery = None) -> Json:
    """List every version of this name, newest first."""
    version = parts.models.get(model).version
    found = await parts.priors.versions(version.label_set, name)
    return Json({"versions": [_shaped(one, version.labels) for one in found]})


@router.post(
    "/{name}/rollback",
    response_class=Json,
    responses=_VERSION,
    dependencies=[AdminDep],
    openapi_extra=_CONDITIONAL,
    summary="Roll priors back",
)
async def rollback(
    name: str,
    body: Annotated[RollbackIn, json_body(RollbackIn)],
    parts: PartsDep,
    precondition: PreconditionDep,
    model: ModelQuery = None,
) -> Json:
    """Make a new version that is equal to an earlier one."""
    version = parts.models.get(model).version
    made = await parts.priors.rollback(version.label_set, name, body.version, precondition)
    return _one(made, version.labels)


@router.delete(
    "/{name}",
    status_code=204,
    dependencies=[AdminDep],
    openapi_extra=_CONDITIONAL,
    summary="Delete priors",
)
async def delete_priors(
    name: str, parts: PartsDep, precondition: PreconditionDep, model: ModelQuery = None
) -> Response:
    """Delete a name with all its versions. Should it be made again, its numbers go on where they were."""
    await parts.priors.delete(parts.models.get(model).version.label_set, name, precondition)
    return Response(status_code=204)


def _one(prior: PriorVersion, labels: tuple[str, ...]) -> Json:
    return Json(_shaped(prior, labels), headers={"ETag": etag(prior)})


def _shaped(prior: PriorVersion, labels: tuple[str, ...]) -> dict[str, object]:
    probabilities = dict(zip(labels, prior.probabilities.tolist(), strict=True))
    return {**_entry(prior), "probabilities": probabilities}


def _entry(prior: PriorVersion) -> dict[str, object]:
    return {
        "name": prior.name,
        "version": prior.version,
        "created": utc(prior.created),
        "note": prior.note,
        "author": prior.author,
    }
