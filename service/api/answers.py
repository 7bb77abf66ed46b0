"""The shapes of a decision as it is answered: one place for /predict, /adjust and /predictions/{id}.

Answers are plain dictionaries, written by orjson: a class whose score is -inf is never among them, so no
number here is without a JSON form. The models beside them are what /openapi.json says about them.
"""

from collections.abc import Sequence
from typing import Any

import orjson
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from service.core.records import Adjustment, Decision, Method, ModelVersion, Prediction, Ranked, Stages


class ModelOut(BaseModel):
    """Which model decided."""

    name: str
    version: str = Field(description="First 16 hex digits of the manifest's sha256.")


class PriorsOut(BaseModel):
    """Which target prior was in force."""

    name: str
    version: int


class AdjustmentOut(BaseModel):
    """How scores were made: s = f + b + tau * (log q - log p), probabilities softmax(s / temperature).

    By weight normalisation s = f / nu^tau, for which there are no priors and no probabilities.
    """

    method: Method
    tau: float
    temperature: float
    priors: PriorsOut | None


class ClassOut(BaseModel):
    """One class with its reported probability."""

    label: str
    index: int
    probability: float


class RankedOut(BaseModel):
    """One class as it is ranked; its probability is null where the scores stand for none."""

    label: str
    index: int
    probability: float | None
    score: float


class DecisionOut(RankedOut):
    """The best class first, then the `top_k` best, then what tau = 0 would have given."""

    top: list[RankedOut]
    unadjusted: ClassOut
    logits: list[float] | None = Field(
        None, description="What the network put out, before anything was added; with include=logits."
    )


class PredictionOut(DecisionOut):
    """A decision that is recorded under `prediction_id`, or null where recording is off."""

    prediction_id: str | None


class PredictOut(BaseModel):
    """The answer for all images of a request, in their order."""

    model: ModelOut
    adjustment: AdjustmentOut
    predictions: list[PredictionOut]


class AdjustOut(BaseModel):
    """The answer for all rows of logits, in their order."""

    model: ModelOut
    adjustment: AdjustmentOut
    predictions: list[DecisionOut]


class Json(JSONResponse):
    """A JSON answer written by orjson, which has no form for NaN or infinity and writes null.

    Of FastAPI's own JSON class, for otherwise /openapi.json would call each answer a string.
    """

    def render(self, content: Any) -> bytes:
        """Return the bytes."""
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def predict_answer(
    model: ModelVersion, adjustment: Adjustment, predictions: Sequence[Prediction], *, logits: bool
) -> bytes:
    """Write the answer for all images of a request; `logits` says whether f stands in it."""
    return orjson.dumps(
        {
            "model": model_answer(model.name, model.version),
            "adjustment": adjustment_answer(adjustment),
            "predictions": [prediction_answer(one, model, logits=logits) for one in predictions],
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


def server_timing(stages: Stages) -> str:
    """Write where a request's time went as a Server-Timing header (W3C), in milliseconds."""
    return (
        f"queue;dur={stages.queue_s * 1e3:.2f}, decode;dur={stages.decode_s * 1e3:.2f}, "
        f"infer;dur={stages.infer_s * 1e3:.2f}, store;dur={stages.store_s * 1e3:.2f}, "
        f"total;dur={stages.total_s * 1e3:.2f}"
    )


def model_answer(name: str, version: str) -> dict[str, object]:
    """Shape the model that decided."""
    return {"name": name, "version": version}


def adjustment_answer(adjustment: Adjustment) -> dict[str, object]:
    """Shape an adjustment as it was made for a request."""
    prior = adjustment.prior
    return _adjustment(
        adjustment.method,
        adjustment.tau,
        adjustment.temperature,
        None if prior is None else prior.name,
        None if prior is None else prior.version,
    )


def recorded_adjustment(prediction: Prediction) -> dict[str, object]:
    """Shape an adjustment as it was recorded."""
    return _adjustment(
        prediction.method,
        prediction.tau,
        prediction.temperature,
        prediction.prior_name,
        prediction.prior_version,
    )


def prediction_answer(prediction: Prediction, model: ModelVersion, *, logits: bool) -> dict[str, object]:
    """Shape one prediction; `logits` says whether f stands in it."""
    identity = None if prediction.id is None else str(prediction.id)
    return {"prediction_id": identity, **decision_answer(prediction.decision, model, logits=logits)}


def decision_answer(decision: Decision, model: ModelVersion, *, logits: bool) -> dict[str, object]:
    """Shape one decision: the best class, the ranking, and what tau = 0 would have given."""
    labels = model.labels
    top = [_ranked(labels, one) for one in decision.top]
    unadjusted = decision.unadjusted
    answer: dict[str, object] = {
        **top[0],
        "top": top,
        "unadjusted": {
            "label": labels[unadjusted.index],
            "index": unadjusted.index,
            "probability": unadjusted.probability,
        },
    }
    if logits:
        answer["logits"] = decision.logits
    return answer


def _adjustment(
    method: Method, tau: float, temperature: float, prior_name: str | None, prior_version: int | None
) -> dict[str, object]:
    priors = None if prior_name is None else {"name": prior_name, "version": prior_version}
    return {"method": method, "tau": tau, "temperature": temperature, "priors": priors}


def _ranked(labels: tuple[str, ...], ranked: Ranked) -> dict[str, object]:
    return {
        "label": labels[ranked.index],
        "index": ranked.index,
        "probability": ranked.probability,
        "score": ranked.score,
    }
