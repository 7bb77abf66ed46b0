"""GET /predictions/{prediction_id}: what was decided, and the labels that came for it."""

from fastapi import APIRouter
from pydantic import BaseModel

from service.api.answers import Json, PredictOut, model_answer, prediction_answer, recorded_adjustment
from service.api.parameters import utc
from service.api.parts import PartsDep

router = APIRouter(tags=["feedback"])


class LabelOut(BaseModel):
    """A label that counted when it was received."""

    label: str
    index: int
    received: str
    labelled_at: str | None


class PredictionOut(PredictOut):
    """The answer as it was given (one prediction), when, and its labels, the one that counts last."""

    created: str
    labels: list[LabelOut]


@router.get(
    "/predictions/{prediction_id}",
    response_class=Json,
    responses={200: {"model": PredictionOut}},
    summary="One prediction",
)
async def get_prediction(prediction_id: str, parts: PartsDep) -> Json:
    """Return what was decided, under which model, tau and priors version, and the labels since."""
    stored, model = await parts.monitor.prediction(prediction_id)
    made = stored.prediction
    return Json(
        {
            "model": model_answer(made.model_name, made.model_version),
            "adjustment": recorded_adjustment(made),
            "predictions": [prediction_answer(made, model, logits=False)],
            "created": utc(made.created),
            "labels": [
                {
                    "label": model.labels[one.index],
                    "index": one.index,
                    "received": utc(one.received),
                    "labelled_at": None if one.labelled_at is None else utc(one.labelled_at),
                }
                for one in stored.labels
            ],
        }
    )
