"""POST /adjust: the formula without the network, so that it can be checked from outside."""

import asyncio
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from service.api.answers import AdjustOut, Json, adjustment_answer, decision_answer, model_answer
from service.api.bodies import Numbers, RequestModel, json_body
from service.api.parameters import Name
from service.api.parts import PartsDep
from service.core.decide import decide
from service.core.methods import LARGEST_TAU
from service.core.records import Method

router = APIRouter(tags=["decisions"])


class AdjustIn(RequestModel):
    """Logits as the network puts them out (before `logit_offset`), and what to rank them for."""

    logits: Annotated[list[list[float]], Field(min_length=1, max_length=10_000)]
    method: Method = "logit-adjustment"
    tau: Annotated[float, Field(ge=0, le=LARGEST_TAU)] | None = None
    priors: Name | None = None
    target_prior: Numbers | None = Field(
        None, description="Instead of `priors`: a prior by label, or a list by index."
    )
    model: Name | None = None
    top_k: Annotated[int, Field(ge=1)] = 5


@router.post(
    "/adjust", response_class=Json, responses={200: {"model": AdjustOut}}, summary="Rank given logits"
)
async def adjust(body: Annotated[AdjustIn, json_body(AdjustIn)], parts: PartsDep) -> Json:
    """Rank logits as /predict would, without inference and without recording anything."""
    loaded = parts.models.get(body.model)
    adjustment = parts.predictor.adjustment_for(
        loaded, body.method, tau=body.tau, priors_name=body.priors, target_prior=body.target_prior
    )
    decisions = await asyncio.to_thread(decide, body.logits, adjustment, loaded.version, body.top_k)
    return Json(
        {
            "model": model_answer(loaded.version.name, loaded.version.version),
            "adjustment": adjustment_answer(adjustment),
            "predictions": [decision_answer(one, loaded.version, logits=False) for one in decisions],
        }
    )
