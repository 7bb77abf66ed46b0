"""What probes and scrapers ask: alive, ready, how much of what. None of it needs a token."""

import asyncio

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from service.api.answers import Json
from service.api.parts import PartsDep

router = APIRouter(tags=["health"])


class AliveOut(BaseModel):
    """The process answers."""

    status: str


class ReadyOut(BaseModel):
    """The default model answers and the store writes."""

    status: str
    model: str
    provider: str


@router.get("/healthz", response_class=Json, responses={200: {"model": AliveOut}}, summary="Alive?")
async def healthz() -> Json:
    """Answer whenever the process can: for a restart, not for traffic."""
    return Json({"status": "alive"})


@router.get("/readyz", response_class=Json, responses={200: {"model": ReadyOut}}, summary="Ready?")
async def readyz(parts: PartsDep) -> Json:
    """Run the default model on a blank image and write to the store; 503 says which of them failed and why.

    A full queue is ready: 429 is an answer.
    """
    loaded = await parts.readiness.check()
    return Json({"status": "ready", "model": loaded.version.name, "provider": loaded.engine.provider})


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    summary="Metrics for Prometheus",
)
async def metrics(request: Request) -> Response:
    """Everything counted and measured since the start, in Prometheus' text format."""
    content, content_type = await asyncio.to_thread(request.app.state.metrics)
    return Response(content, media_type=content_type)
