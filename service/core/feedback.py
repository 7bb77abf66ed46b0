"""What becomes of a label that arrives for a prediction: the rules, free of where labels are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from service.core.exceptions import Invalid
from service.core.ids import time_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime, timedelta
    from uuid import UUID

    from service.core.records import FeedbackItem, Receipt, Rejection

Outcome = Literal["accepted", "corrected", "unchanged"]


@dataclass(frozen=True)
class CurrentLabel:
    """The label that counts for a prediction.

    `sampling_probability` is that of the first label: a correction is not a second draw. `labelled_at` is
    the latest time at which somebody found this label.
    """

    index: int
    sampling_probability: float | None
    labelled_at: datetime | None


def applied(current: CurrentLabel | None, index: int, item: FeedbackItem) -> tuple[Outcome, CurrentLabel]:
    """Return what the item with this label does, and the label that counts from then on.

    The last to arrive wins, unless both have a `labelled_at` and its is the older one. The same label again
    is `unchanged`; if it was found again later, that later time is what an older label then loses to, so
    that a log of labels comes to the same end in whatever order it is sent.
    """
    if current is None:
        return "accepted", CurrentLabel(index, item.sampling_probability, item.labelled_at)
    known, given = current.labelled_at, item.labelled_at
    if known is not None and given is not None and given < known:
        return "unchanged", current
    if index == current.index:
        return "unchanged", replace(current, labelled_at=given or known)
    return "corrected", CurrentLabel(index, current.sampling_probability, given)


def index_of(item: FeedbackItem, index_by_label: Mapping[str, int]) -> int | None:
    """Return the index that the item names among its model's labels, or None if it names none of them."""
    if item.label is not None:
        return index_by_label.get(item.label)
    if item.index is not None and 0 <= item.index < len(index_by_label):
        return item.index
    return None


def is_expired(prediction_id: UUID, keep: timedelta, now: datetime) -> bool:
    """Whether a prediction is past its keeping time, by the time that its id holds."""
    created = time_of(prediction_id)
    return created is not None and created < now - keep


def refuse_if_nothing_was_taken(receipt: Receipt) -> None:
    """Raise Invalid where every item was rejected: the client has sent nothing of use."""
    if receipt.rejected and not (receipt.accepted or receipt.corrected or receipt.unchanged):
        codes = ", ".join(sorted({one.code for one in receipt.rejected}))
        raise Invalid(
            "feedback-rejected",
            f"No item was taken ({codes}); rejected says why, by position.",
            rejected=[rejection_answer(one) for one in receipt.rejected],
        )


def rejection_answer(rejection: Rejection) -> dict[str, object]:
    """Shape a rejection as it stands in answers and problems."""
    return {
        "position": rejection.position,
        "prediction_id": str(rejection.prediction_id),
        "code": rejection.code,
    }
