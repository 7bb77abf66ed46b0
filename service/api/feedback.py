"""POST /feedback: labels that arrive after their predictions."""

from typing import Annotated, Any, Final, Self
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, Field, RootModel, model_validator

from service.api.answers import Json
from service.api.bodies import RequestModel, json_body
from service.api.parameters import Time
from service.api.parts import PartsDep
from service.core.exceptions import TooLarge
from service.core.feedback import refuse_if_nothing_was_taken, rejection_answer
from service.core.records import FeedbackItem

router = APIRouter(tags=["feedback"])

_MAX_ITEMS: Final = 10_000


class ItemIn(RequestModel):
    """A label for one prediction, by name or by index."""

    prediction_id: UUID
    label: str | None = None
    index: int | None = None
    sampling_probability: float | None = Field(
        None, gt=0, le=1, description="How likely this prediction was to be chosen for labelling."
    )
    labelled_at: Time | None = Field(None, description="When somebody found this label; an older one loses.")

    @model_validator(mode="after")
    def _one_of_label_and_index(self) -> Self:
        if (self.label is None) == (self.index is None):
            raise ValueError("Give exactly one of label and index")
        return self


class ItemsIn(RequestModel):
    """Up to 10,000 labels."""

    items: Annotated[list[ItemIn], Field(min_length=1)]


class FeedbackIn(RootModel[ItemsIn]):
    """Items, or a single one by itself."""

    @model_validator(mode="before")
    @classmethod
    def _as_items(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        items = body.get("items", [])
        if isinstance(items, list) and len(items) > _MAX_ITEMS:
            raise TooLarge(
                "too-many-items",
                f"There are {len(items)} items; send at most {_MAX_ITEMS:,} in one request.",
                limit_items=_MAX_ITEMS,
            )
        return body if "items" in body else {"items": [body]}


class RejectedOut(BaseModel):
    """An item that was not taken, by its place in the request, from 0."""

    position: int
    prediction_id: str
    code: str = Field(description="prediction-not-found, prediction-expired or unknown-label")


class FeedbackOut(BaseModel):
    """How many items did what; the counts and `rejected` together are the items."""

    accepted: int
    corrected: int
    unchanged: int
    rejected: list[RejectedOut]


@router.post(
    "/feedback", response_class=Json, responses={200: {"model": FeedbackOut}}, summary="Label predictions"
)
async def give_feedback(body: Annotated[FeedbackIn, json_body(FeedbackIn)], parts: PartsDep) -> Json:
    """Attach labels that arrived later to their predictions; on disk once this answers.

    The last to arrive counts, unless its `labelled_at` is older. Sending the same again changes nothing.
    """
    receipt = await parts.monitor.learn(
        [
            FeedbackItem(
                prediction_id=one.prediction_id,
                label=one.label,
                index=one.index,
                sampling_probability=one.sampling_probability,
                labelled_at=one.labelled_at,
            )
            for one in body.root.items
        ]
    )
    parts.observer.learned(receipt)
    refuse_if_nothing_was_taken(receipt)
    return Json(
        {
            "accepted": receipt.accepted,
            "corrected": receipt.corrected,
            "unchanged": receipt.unchanged,
            "rejected": [rejection_answer(one) for one in receipt.rejected],
        }
    )
