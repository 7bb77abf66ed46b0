"""GET /monitor and /monitor/tau-curve: how wrong the service is, or would be, by the labels since."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from longtail.intervals import Interval
from longtail.metrics import MeanError
from service.api.answers import Json, ModelOut, PriorsOut, model_answer
from service.api.parameters import ModelQuery, Name, PriorsQuery, SpanQuery, TauQuery, TimeQuery, utc
from service.api.parts import PartsDep
from service.core.monitor import Report, Selection
from service.core.parts import Parts
from service.core.records import Method, PriorVersion

router = APIRouter(prefix="/monitor", tags=["monitor"])

VersionQuery = Annotated[
    Name | None, Query(description="A version of the model; without it the one loaded last.")
]


class ErrorOut(BaseModel):
    """An error rate with its 95 % interval. Null, not 0, where there is no label."""

    error: float | None
    low: float
    high: float
    labels: int


class MeanErrorOut(ErrorOut):
    """A mean over classes: `low` and `high` over those with labels, `low_all` and `high_all` over all."""

    low_all: float
    high_all: float
    classes: int
    classes_with_labels: int


class GroupErrorOut(MeanErrorOut):
    """The mean over one group's classes."""

    group: str


class ClassErrorOut(ErrorOut):
    """One class; `predicted` says how often it was decided, labelled or not."""

    label: str
    index: int
    group: str | None
    predicted: int


class MonitorOut(BaseModel):
    """Errors of what was served, or of a replay by `method` at `tau` and `priors`."""

    model: ModelOut
    basis: Literal["served", "replayed"]
    method: Method | None = Field(description="Of the replay.")
    tau: float | None = Field(description="Of the replay.")
    priors: PriorsOut | None = Field(description="Of the replay.")
    since: str | None
    until: str | None
    predictions: int
    labels: int
    balanced_error: MeanErrorOut
    traffic_error: ErrorOut
    groups: list[GroupErrorOut]
    classes: list[ClassErrorOut]


class PointOut(BaseModel):
    """What one tau would have given."""

    tau: float
    balanced_error: MeanErrorOut
    groups: list[GroupErrorOut]


class TauCurveOut(BaseModel):
    """What each tau would have given by this method, at these priors if it knows any."""

    model: ModelOut
    method: Method
    priors: PriorsOut | None
    labels: int
    served_tau: float
    points: list[PointOut]
    suggestion: None


@dataclass(frozen=True)
class Scope:
    """Which predictions a request asks about."""

    model: ModelQuery = None
    version: VersionQuery = None
    priors: PriorsQuery = None
    method: Annotated[
        Method | None, Query(description="Decide again by this method, logit-adjustment where none is named.")
    ] = None
    since: TimeQuery = None
    until: TimeQuery = None
    last: SpanQuery = None


ScopeDep = Annotated[Scope, Depends()]


@router.get("", response_class=Json, responses={200: {"model": MonitorOut}}, summary="Errors from labels")
async def monitor(parts: PartsDep, scope: ScopeDep, tau: TauQuery = None) -> Json:
    """Measure errors by class, by group, on average over classes, and over traffic, from labels so far.

    With `tau`, `priors` or `method`, as they would have been: decided again from the logits that were kept.
    """
    report = await parts.monitor.report(await _select(parts, scope, tau))
    replay, window = report.selection.replay, report.selection.window
    return Json(
        {
            "model": model_answer(report.selection.model.name, report.selection.model.version),
            "basis": "served" if replay is None else "replayed",
            "method": None if replay is None else replay.method,
            "tau": None if replay is None else replay.tau,
            "priors": None if replay is None else _priors(replay.prior),
            "since": None if window.since is None else utc(window.since),
            "until": None if window.until is None else utc(window.until),
            "predictions": report.predictions,
            "labels": report.labels,
            "balanced_error": _mean(report.balanced),
            "traffic_error": _error(report.traffic.error, report.traffic.interval, report.traffic.labels),
            "groups": _groups(report.groups),
            "classes": _classes(report),
        }
    )


@router.get(
    "/tau-curve", response_class=Json, responses={200: {"model": TauCurveOut}}, summary="Errors by tau"
)
async def tau_curve(parts: PartsDep, scope: ScopeDep) -> Json:
    """Measure what each tau of a grid would have given, at these priors, from the logits that were kept.

    Each interval holds at a tau fixed beforehand; at the one picked for its error it is too hopeful.
    """
    curve = await parts.monitor.tau_curve(await _select(parts, scope, None))
    return Json(
        {
            "model": model_answer(curve.model.name, curve.model.version),
            "method": curve.method,
            "priors": _priors(curve.prior),
            "labels": curve.labels,
            "served_tau": curve.served_tau,
            "points": [
                {
                    "tau": point.tau,
                    "balanced_error": _mean(point.balanced),
                    "groups": _groups(point.groups),
                }
                for point in curve.points
            ],
            "suggestion": None,
        }
    )


async def _select(parts: Parts, scope: Scope, tau: float | None) -> Selection:
    return await parts.monitor.select(
        parts.models.get(None).name if scope.model is None else scope.model,
        scope.version,
        since=scope.since,
        until=scope.until,
        last=scope.last,
        tau=tau,
        priors=scope.priors,
        method=scope.method,
    )


def _priors(prior: PriorVersion | None) -> dict[str, object] | None:
    return None if prior is None else {"name": prior.name, "version": prior.version}


def _error(error: float, interval: Interval, labels: int) -> dict[str, object]:
    known = None if math.isnan(error) else error
    return {"error": known, "low": interval.low, "high": interval.high, "labels": labels}


def _mean(mean: MeanError) -> dict[str, object]:
    return {
        **_error(mean.error, mean.interval, mean.labels),
        "low_all": mean.interval_all.low,
        "high_all": mean.interval_all.high,
        "classes": mean.classes,
        "classes_with_labels": mean.classes_with_labels,
    }


def _groups(groups: tuple[tuple[str, MeanError], ...]) -> list[dict[str, object]]:
    return [{"group": name, **_mean(mean)} for name, mean in groups]


def _classes(report: Report) -> list[dict[str, object]]:
    model = report.selection.model
    group_of = {index: group.name for group in reversed(model.groups) for index in group.indices}
    rows = zip(
        model.labels,
        report.by_class.errors.tolist(),
        report.intervals,
        report.by_class.labels.tolist(),
        report.predicted.tolist(),
        strict=True,
    )
    return [
        {
            "label": label,
            "index": index,
            "group": group_of.get(index),
            **_error(error, interval, labels),
            "predicted": predicted,
        }
        for index, (label, error, interval, labels, predicted) in enumerate(rows)
    ]
