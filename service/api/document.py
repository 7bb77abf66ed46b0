"""Makes /openapi.json whole: the bodies that routes read themselves, and the problems that all may answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from service.api.bodies import json_model_of
from service.api.problems import MEDIA_TYPE, in_v2

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fastapi import APIRouter, FastAPI
    from fastapi.dependencies.models import Dependant
    from pydantic import BaseModel

_REFS: Final = "#/components/schemas/{model}"

_PROBLEM: Final = {
    "type": "object",
    "title": "Problem",
    "description": "RFC 9457. docs/errors.md lists the codes; some carry more fields, such as `parameter`.",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "One sentence that says what to do."},
        "code": {"type": "string", "description": "Stable, for programs."},
    },
}

_V2_ERROR: Final = {
    "type": "object",
    "title": "V2Error",
    "description": "What the Open Inference Protocol answers in place of a problem.",
    "required": ["error"],
    "properties": {"error": {"type": "string"}},
}

_REQUEST_ID: Final = {
    "X-Request-Id": {
        "description": "The request's own, where it sent a sane one, else made; it stands in the log.",
        "schema": {"type": "string"},
    }
}

_NAMED: Final = {"name": "$request.path.name"}
_FIRST: Final = "$response.body#/predictions/0/prediction_id"
# Where a good answer leads to: from each operation to others, and what of it they take.
_LINKS: Final[Mapping[tuple[str, str], Mapping[tuple[str, str], Mapping[str, object]]]] = {
    ("/predict", "post"): {
        ("/predictions/{prediction_id}", "get"): {"parameters": {"prediction_id": _FIRST}},
        ("/feedback", "post"): {"requestBody": {"prediction_id": _FIRST, "index": 0}},
    },
    ("/priors/{name}", "put"): {
        ("/priors/{name}", "get"): {"parameters": _NAMED},
        ("/priors/{name}/versions", "get"): {"parameters": _NAMED},
        ("/priors/{name}/rollback", "post"): {
            "parameters": _NAMED,
            "requestBody": {"version": "$response.body#/version"},
        },
        ("/priors/{name}", "delete"): {"parameters": _NAMED},
    },
}


def describe(app: FastAPI, routers: Sequence[APIRouter]) -> dict[str, Any]:
    """Return the OpenAPI document of the application, whose paths are those of `routers`."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    bodies: dict[tuple[str, str], type[BaseModel]] = {}
    for route in _routes(routers):
        for model in _json_models(route.dependant):
            for method in route.methods or ():
                bodies[route.path, method.lower()] = model
    models = sorted(set(bodies.values()), key=lambda model: model.__name__)
    references, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template=_REFS
    )
    schemas.update(definitions.get("$defs", {}))
    schemas["Problem"] = _PROBLEM
    schemas["V2Error"] = _V2_ERROR
    for gone in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form, which we never answer
        schemas.pop(gone, None)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            body = bodies.get((path, method))
            if body is not None:
                sent = operation.setdefault("requestBody", {"required": True, "content": {}})
                sent["content"]["application/json"] = {"schema": references[body, "validation"]}
            _add_problems(operation["responses"], v2=in_v2(path))
    _add_links(document["paths"])
    return document


def _add_links(paths: dict[str, Any]) -> None:
    for (path, method), targets in _LINKS.items():
        paths[path][method]["responses"]["200"]["links"] = {
            operation["operationId"]: {"operationId": operation["operationId"], **taken}
            for operation, taken in ((paths[to][by], taken) for (to, by), taken in targets.items())
        }


def _add_problems(responses: dict[str, Any], *, v2: bool) -> None:
    responses.pop("422", None)
    kind, model = ("application/json", "V2Error") if v2 else (MEDIA_TYPE, "Problem")
    responses["default"] = {
        "description": "A problem",
        "content": {kind: {"schema": {"$ref": _REFS.format(model=model)}}},
    }
    for response in responses.values():
        response["headers"] = {**response.get("headers", {}), **_REQUEST_ID}


def _routes(routers: Sequence[APIRouter]) -> Iterator[APIRoute]:
    for router in routers:
        for route in router.routes:
            if isinstance(route, APIRoute):
                yield route


def _json_models(dependant: Dependant) -> Iterator[type[BaseModel]]:
    for inner in dependant.dependencies:
        model = json_model_of(inner.call)
        if model is not None:
            yield model
        yield from _json_models(inner)
