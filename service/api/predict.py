"""POST /predict: images in, decisions out, each recorded before it is answered."""

from functools import partial
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service.api.answers import Json, PredictOut, predict_answer, server_timing
from service.api.bodies import unless_abandoned, whole_body
from service.api.envelope import STAGES
from service.api.forms import images_of
from service.api.parameters import DeadlineHeader, ModelQuery, PriorsQuery, TauQuery, TopKQuery
from service.api.parts import PartsDep
from service.core.records import Method

Included = Literal["logits"]

router = APIRouter(tags=["decisions"])

_IMAGE: Final = {"type": "string", "format": "binary"}
_BODY: Final = {
    "required": True,
    "description": "The bytes of one image whatever the Content-Type says, or a form with 1 to 64 files.",
    "content": {
        "image/*": {"schema": _IMAGE},
        "application/octet-stream": {"schema": _IMAGE},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"files": {"type": "array", "items": _IMAGE, "minItems": 1, "maxItems": 64}},
            }
        },
    },
}


@router.post(
    "/predict",
    response_class=Json,
    responses={200: {"model": PredictOut}},
    openapi_extra={"requestBody": _BODY},
    summary="Classify images",
)
async def predict(
    request: Request,
    parts: PartsDep,
    *,
    tau: TauQuery = None,
    top_k: TopKQuery = 5,
    priors: PriorsQuery = None,
    model: ModelQuery = None,
    method: Annotated[Method, Query()] = "logit-adjustment",
    include: Annotated[Included | None, Query()] = None,
    deadline_ms: DeadlineHeader = None,
) -> Response:
    """Decide what each image shows, ranked for the target prior in force.

    Without `tau` the service's own, else the model's. PNG, JPEG, WebP, GIF, BMP or TIFF by the first bytes;
    the first frame, upright. One file that cannot be taken fails the request and names its `position`.
    """
    loaded = parts.models.get(model)
    adjustment = parts.predictor.adjustment_for(loaded, method=method, tau=tau, priors_name=priors)
    shape = partial(predict_answer, loaded.version, adjustment, logits=include == "logits")
    async with whole_body(request) as body:
        images = images_of(body, request.headers.get("content-type", ""))
        answer, stages = await unless_abandoned(
            request,
            parts.predictor.ask(
                images,
                model=loaded,
                adjustment=adjustment,
                top_k=top_k,
                shape=shape,
                deadline_s=None if deadline_ms is None else deadline_ms / 1000,
            ),
        )
    request.scope[STAGES] = stages
    return Response(answer, media_type="application/json", headers={"Server-Timing": server_timing(stages)})
