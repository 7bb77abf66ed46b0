"""The Open Inference Protocol v2: what Triton's and KServe's clients speak, answered as /predict is.

Beyond the protocol there are the binary tensor extension and the repository's index. Errors are
`{"error": text}`.
"""

from collections.abc import AsyncIterator, Sequence
from enum import Enum
from functools import partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from service.api import v2_infer
from service.api.answers import Json, server_timing
from service.api.bodies import (
    RequestModel,
    beside_the_loop,
    inflated,
    parse,
    reads_json,
    unless_abandoned,
    whole_body,
)
from service.api.envelope import STAGES
from service.api.parameters import DeadlineHeader, WholeNumber
from service.api.parts import PartsDep
from service.api.v2_infer import InferIn, Row, TensorSpec
from service.core.exceptions import NotFound
from service.core.models import LoadedModel

EXTENSIONS: Final = ("binary_tensor_data", "parameters")
JSON_LENGTH: Final = "Inference-Header-Content-Length"

_PLATFORM: Final = "onnx_onnxv1"
_BINARY: Final = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


class LiveOut(BaseModel):
    """The process answers."""

    live: bool


class ReadyOut(LiveOut):
    """Every model answers and the store writes."""

    ready: bool


class ServerOut(BaseModel):
    """The server, and which extensions of the protocol it offers."""

    name: str
    version: str
    extensions: list[str]


class TensorOut(BaseModel):
    """A tensor that a model takes or gives; -1 is a size that may vary."""

    name: str
    datatype: str
    shape: list[int]


class ModelOut(BaseModel):
    """A model. A request has one of the inputs, never two."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorOut]
    outputs: list[TensorOut]


class ModelReadyOut(BaseModel):
    """The model's engine answers."""

    name: str
    ready: bool


class OutputOut(TensorOut):
    """An output. Without `data` it follows the JSON, as `parameters.binary_data_size` bytes."""

    parameters: dict[str, int] | None = None
    data: list[Any] | None = None


class InferOut(BaseModel):
    """An answer; `parameters` say which adjustment was made, with the version of the priors in force."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, str | float]
    outputs: list[OutputOut]


class IndexIn(RequestModel):
    """Which models to list."""

    ready: bool = Field(default=False, description="Only those that are loaded.")


class IndexEntryOut(BaseModel):
    """A bundle in the models directory: READY, or UNAVAILABLE with the reason."""

    name: str
    version: str | None = None
    state: str
    reason: str


# No limits on path parameters here: what breaks one is no model's name, and so a 404.
async def _named(name: str, request: Request, parts: PartsDep) -> None:
    request.state.model = parts.models.get(name)


async def _named_version(name: str, version: str, request: Request, parts: PartsDep) -> None:
    loaded = parts.models.get(name)
    if version != loaded.version.version:
        raise NotFound(
            "version-not-found", f"The model {name!r} is served in version {loaded.version.version} only."
        )
    request.state.model = loaded


def _model(request: Request) -> LoadedModel:
    loaded: LoadedModel = request.state.model
    return loaded


async def _sent(
    request: Request,
    json_bytes: Annotated[
        WholeNumber | None,
        Header(alias=JSON_LENGTH, description="Where binary tensors follow: the bytes of JSON before them."),
    ] = None,
) -> AsyncIterator[tuple[InferIn, Sequence[bytes | Row]]]:
    """Read an inference request, whatever its Content-Type says; its bytes are held until the answer."""
    async with whole_body(request) as came, inflated(request, came) as body:
        size = len(body) if json_bytes is None else json_bytes
        read = partial(v2_infer.read, body, json_bytes, _model(request))
        yield await beside_the_loop(request, size, read)


reads_json(_sent, InferIn)


async def _index(request: Request) -> IndexIn:
    async with whole_body(request) as body:
        return parse(IndexIn, body) if body else IndexIn()


reads_json(_index, IndexIn)

ModelDep = Annotated[LoadedModel, Depends(_model)]
SentDep = Annotated[tuple[InferIn, Sequence[bytes | Row]], Depends(_sent)]

_tags: list[str | Enum] = ["open inference protocol"]
health = APIRouter(prefix="/v2/health", tags=_tags)
_server = APIRouter(prefix="/v2", tags=_tags)
_newest = APIRouter(prefix="/v2/models/{name}", tags=_tags, dependencies=[Depends(_named)])
_version = APIRouter(
    prefix="/v2/models/{name}/versions/{version}", tags=_tags, dependencies=[Depends(_named_version)]
)
routers: Final = (_server, _newest, _version)


@health.get("/live", response_class=Json, responses={200: {"model": LiveOut}}, summary="Alive? (v2)")
async def live() -> Json:
    """Answer whenever the process can, as /healthz does."""
    return Json({"live": True})


@health.get("/ready", response_class=Json, responses={200: {"model": ReadyOut}}, summary="Ready? (v2)")
async def ready(parts: PartsDep) -> Json:
    """Look at what /readyz looks at, and at every other model; 503 says what failed and why."""
    await parts.readiness.check_all()
    return Json({"live": True, "ready": True})


@_server.get("", response_class=Json, responses={200: {"model": ServerOut}}, summary="The server (v2)")
async def server(request: Request) -> Json:
    """Name, version, and the extensions of the protocol that are offered."""
    return Json({"name": "tare", "version": request.app.version, "extensions": EXTENSIONS})


@_server.post(
    "/repository/index",
    response_class=Json,
    responses={200: {"model": list[IndexEntryOut]}},
    openapi_extra={"requestBody": {"required": False, "content": {}}},
    summary="List models (v2)",
)
async def index(asked: Annotated[IndexIn, Depends(_index)], parts: PartsDep) -> Json:
    """Every bundle under the models directory. Loading and unloading are not offered."""
    loaded = [
        {"name": one.name, "version": one.version.version, "state": "READY", "reason": ""}
        for one in parts.models.all()
    ]
    refused = [
        {"name": one.name or one.folder, "state": "UNAVAILABLE", "reason": one.detail}
        for one in parts.models.refused
    ]
    return Json(loaded if asked.ready else loaded + refused)


async def model(loaded: ModelDep, parts: PartsDep) -> Json:
    """What the model takes and gives. A request has one of the inputs."""
    outputs = v2_infer.outputs_of(len(loaded.version.labels), recorded=parts.predictor.records)
    return Json(
        {
            "name": loaded.name,
            "versions": [loaded.version.version],
            "platform": _PLATFORM,
            "inputs": _described(v2_infer.inputs_of(loaded.manifest)),
            "outputs": _described(outputs),
        }
    )


async def model_ready(loaded: ModelDep) -> Json:
    """Run the model on a blank input, past its queue; 503 says why it failed."""
    await loaded.check()
    return Json({"name": loaded.name, "ready": True})


async def infer(
    request: Request, sent: SentDep, loaded: ModelDep, parts: PartsDep, deadline_ms: DeadlineHeader = None
) -> Response:
    """Decide and record, as /predict does, with tensors in and out.

    Binary tensors follow the JSON, whose length then stands in Inference-Header-Content-Length, in requests
    and answers alike.
    """
    asked, rows = sent
    chosen = asked.parameters
    given = v2_infer.outputs_of(
        len(loaded.version.labels), recorded=parts.predictor.records, method=chosen.method
    )
    outputs = v2_infer.wanted(asked, given)
    adjustment = parts.predictor.adjustment_for(
        loaded, method=chosen.method, tau=chosen.tau, priors_name=chosen.priors
    )
    deadlines = [
        *([] if deadline_ms is None else [deadline_ms / 1e3]),
        *([] if chosen.timeout is None else [chosen.timeout / 1e6]),
    ]
    (body, json_bytes), stages = await unless_abandoned(
        request,
        parts.predictor.ask(
            rows,
            model=loaded,
            adjustment=adjustment,
            top_k=chosen.top_k,
            shape=partial(v2_infer.write, asked, outputs, loaded, adjustment),
            deadline_s=min(deadlines, default=None),
        ),
    )
    request.scope[STAGES] = stages
    headers = {"Server-Timing": server_timing(stages)}
    if json_bytes is None:
        return Response(body, media_type="application/json", headers=headers)
    headers[JSON_LENGTH] = str(json_bytes)
    return Response(body, media_type="application/octet-stream", headers=headers)


def _described(specs: Sequence[TensorSpec]) -> list[dict[str, object]]:
    return [{"name": one.name, "datatype": one.datatype, "shape": one.shape} for one in specs]


for _router in (_newest, _version):
    _router.get("", response_class=Json, responses={200: {"model": ModelOut}}, summary="One model (v2)")(
        model
    )
    _router.get(
        "/ready",
        response_class=Json,
        responses={200: {"model": ModelReadyOut}},
        summary="Is the model ready? (v2)",
    )(model_ready)
    _router.post(
        "/infer",
        response_class=Json,
        responses={200: {"model": InferOut, "content": _BINARY}},
        openapi_extra={"requestBody": {"required": True, "content": _BINARY}},
        summary="Classify tensors (v2)",
    )(infer)
