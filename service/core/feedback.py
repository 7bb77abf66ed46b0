"""What becomes of a label that arrives for a prediction: the rules, free of where labels are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from service.core.records import FeedbackItem

Outcome = Literal["accepted", "corrected", "unchanged"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


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
    """Whether a prediction is past its keeping time, which its UUIDv7 holds (48 bits, milliseconds)."""
    if prediction_id.version != 7:
        return False
    created_ms = prediction_id.int >> 80
    return created_ms < first_kept_ms(keep, now)


def first_kept_ms(keep: timedelta, now: datetime) -> int:
    """Return the time, in milliseconds since 1970, before which predictions are no longer kept."""
    return (now - keep - _EPOCH) // timedelta(milliseconds=1)
