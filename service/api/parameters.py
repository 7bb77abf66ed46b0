"""What may stand in a query: parameter types that read one notation, and the refusal of any other name."""

import math
import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

from fastapi import Header, Query, Request
from fastapi.dependencies.models import Dependant
from pydantic import AfterValidator, AwareDatetime, BeforeValidator, Field, StringConstraints, WithJsonSchema

from service.core.exceptions import Invalid
from service.core.methods import LARGEST_TAU

DEADLINE_HEADER: Final = "X-Request-Timeout-Ms"
LONGEST_DEADLINE_MS: Final = 600_000

_NUMBER: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_INTEGER: Final = re.compile(r"[0-9]{1,18}")
_SPAN: Final = re.compile(r"([0-9]{1,9})(s|m|h|d|w)")
_TIME: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def _number(value: object) -> object:
    """Python's own reading of a number takes 'nan', 'inf', '1_000' and blanks; a query's does not."""
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value):
            raise ValueError("Input should be a number in decimal notation")
        value = float(value)
        if not math.isfinite(value):
            raise ValueError("Input should be a finite number")
    return value


def _integer(value: object) -> object:
    if isinstance(value, str):
        if not _INTEGER.fullmatch(value):
            raise ValueError("Input should be a whole number in decimal digits")
        return int(value)
    return value


def _span(value: object) -> object:
    if isinstance(value, str):
        found = _SPAN.fullmatch(value)
        if not found or int(found[1]) == 0:
            raise ValueError("Input should be a span such as 24h or 7d (s, m, h, d or w)")
        seconds = int(found[1]) * _SECONDS[found[2]]
        if seconds > 100 * 366 * 86_400:
            raise ValueError("Input should be a span of at most 100 years")
        return timedelta(seconds=seconds)
    return value


def _time(value: object) -> object:
    """Pydantic takes Unix times and times without a zone too, and in strict mode no text at all."""
    if isinstance(value, str):
        if not _TIME.fullmatch(value):
            raise ValueError("Input should be an RFC 3339 time such as 2026-11-23T09:00:00Z")
        return datetime.fromisoformat(value.upper())
    return value


def _in_utc(moment: datetime) -> datetime:
    """The calendar's first and last hours do not exist everywhere: 0001-01-01T00:00+01:00 is no UTC time."""
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("Input should be a time between the years 1 and 9999 in UTC") from None


# Bounds before the reading of the notation: only then they stand in /openapi.json.
Tau = Annotated[
    float, Field(ge=0, le=LARGEST_TAU, description="Strength of the adjustment."), BeforeValidator(_number)
]
TopK = Annotated[
    int,
    Field(ge=1, description="Classes to answer for each image; cut to the number of classes."),
    BeforeValidator(_integer),
]
WholeNumber = Annotated[int, Field(ge=0), BeforeValidator(_integer)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Time = Annotated[AwareDatetime, BeforeValidator(_time), AfterValidator(_in_utc)]
Span = Annotated[
    timedelta,
    BeforeValidator(_span),
    WithJsonSchema({"type": "string", "pattern": f"^{_SPAN.pattern}$", "examples": ["24h", "7d"]}),
]

Milliseconds = Annotated[int, Field(ge=1, le=LONGEST_DEADLINE_MS), BeforeValidator(_integer)]

DeadlineHeader = Annotated[
    Milliseconds | None,
    Header(
        alias=DEADLINE_HEADER,
        description="Milliseconds from the whole body to the answer, after which it is a 504; without it "
        "TARE_DEADLINE_MS.",
    ),
]

TauQuery = Annotated[Tau | None, Query()]
TopKQuery = Annotated[TopK, Query()]
ModelQuery = Annotated[
    Name | None, Query(alias="model", description="A model's name; without it the default model.")
]
PriorsQuery = Annotated[
    Name | None, Query(alias="priors", description="A priors name; without it `default`.")
]
TimeQuery = Annotated[Time | None, Query()]
SpanQuery = Annotated[Span | None, Query()]


async def only_known_parameters(request: Request) -> None:
    """Refuse a query parameter that the route does not know, or one that stands twice. Raises Invalid."""
    query = request.query_params
    if not query:
        return
    known = _query_names(request.scope["route"].dependant)
    seen: set[str] = set()
    for name, _ in query.multi_items():
        shown = name[:64]
        if name not in known:
            takes = ", ".join(sorted(known)) or "none"
            raise Invalid(
                "unknown-parameter",
                f"{shown}: this path knows no such parameter; it takes {takes}.",
                parameter=shown,
            )
        if name in seen:
            raise Invalid(
                "repeated-parameter", f"{shown}: this parameter stands twice; send it once.", parameter=shown
            )
        seen.add(name)


def _query_names(dependant: Dependant) -> set[str]:
    names = {parameter.alias for parameter in dependant.query_params}
    for inner in dependant.dependencies:
        names |= _query_names(inner)
    return names


def utc(moment: datetime) -> str:
    """Write a time as RFC 3339 in UTC, as every answer does."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
