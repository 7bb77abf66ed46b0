"""Turns every refusal and every failure into an RFC 9457 answer: the one place that knows status codes."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import orjson
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from service.core import exceptions as core

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, MutableMapping, Sequence

    from fastapi import FastAPI
    from starlette.requests import Request

MEDIA_TYPE: Final = "application/problem+json"

# The key in a request's scope under which its problem's code stands, for the log and the metrics.
PROBLEM_CODE: Final = "tare.problem"

_MAX_ERRORS: Final = 20
_MAX_NAME: Final = 100

# The two notations of numbers for every class (service.api.bodies.Numbers). Pydantic puts them into the place
# of an error, where they are no field.
BY_LABEL: Final = "{by label}"
BY_INDEX: Final = "[by index]"

# Where pydantic's own words would not tell a client what to do.
_PLAINER: Final = {"extra_forbidden": "There is no such field here; leave it out"}


class Unauthorized(core.Refusal):
    """No token, or one that opens nothing here."""


class Forbidden(core.Refusal):
    """A token without the right."""


STATUS: Final[Mapping[type[core.Refusal], int]] = {
    core.Malformed: 400,
    Unauthorized: 401,
    Forbidden: 403,
    core.NotFound: 404,
    core.Conflict: 409,
    core.Stale: 412,
    core.TooLarge: 413,
    core.UnknownImageFormat: 415,
    core.Invalid: 422,
    core.Overloaded: 429,
    core.Unavailable: 503,
    core.DeadlineExceeded: 504,
}


def problem(
    scope: MutableMapping[str, Any],
    status: int,
    code: str,
    detail: str,
    *,
    fields: Mapping[str, object] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return the answer, and leave its code in the request's scope."""
    scope[PROBLEM_CODE] = code
    path: str = scope["path"]
    if in_v2(path):  # the Open Inference Protocol has a form of its own, of one text
        position = (fields or {}).get("position")
        text = detail if position is None else f"Input {position}, counted from 0: {detail}"
        return Response(_encoded({"error": text}), status, headers, "application/json")
    content = {
        "type": f"urn:tare:problem:{code}",
        "title": code.replace("-", " ").capitalize(),
        "status": status,
        "detail": detail,
        "code": code,
        **(fields or {}),
    }
    return Response(_encoded(content), status, headers, MEDIA_TYPE)


def in_v2(path: str) -> bool:
    """Return whether this path belongs to the Open Inference Protocol."""
    return path == "/v2" or path.startswith("/v2/")


def install(app: FastAPI) -> None:
    """Make the application answer every refusal with a problem."""
    app.add_exception_handler(core.Refusal, _refusal)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)


def internal(scope: MutableMapping[str, Any]) -> Response:
    """Return the answer to what nobody foresaw; the log has what it was, under the request's id."""
    return problem(
        scope,
        500,
        "internal",
        "The service failed; the log has the reason under this answer's X-Request-Id.",
    )


def stopping(scope: MutableMapping[str, Any]) -> Response:
    """Return the answer to a request for which no time is left, because the service stops."""
    return problem(scope, 503, "stopping", "The service is stopping; try again in a few seconds.")


def field_errors(errors: Iterable[Mapping[str, object]], skip: int = 0) -> list[dict[str, str]]:
    """Shape pydantic's errors: `field` is the dotted place, `detail` what is wrong with it.

    `skip` leading parts of each place are left out. The value itself is never repeated.
    """
    shaped = []
    for error in errors:
        where = error["loc"]
        place = [str(part)[:_MAX_NAME] for part in (where if isinstance(where, tuple) else ())][skip:]
        parts = [part for part in place if part not in (BY_LABEL, BY_INDEX)]
        message = str(error["msg"]).removeprefix("Value error, ").rstrip(".")
        detail = _PLAINER.get(str(error["type"]), message)
        shaped.append({"field": ".".join(parts), "detail": detail})
        if len(shaped) == _MAX_ERRORS:
            break
    return shaped


def refused(scope: MutableMapping[str, Any], failure: core.Refusal) -> Response:
    """Return the answer to a refusal."""
    headers = {}
    if isinstance(failure, core.Overloaded):
        headers["Retry-After"] = str(failure.retry_after_s)
    if isinstance(failure, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="tare"'
    status = next(STATUS[kind] for kind in type(failure).__mro__ if kind in STATUS)
    return problem(scope, status, failure.code, failure.detail, fields=failure.fields, headers=headers)


async def _refusal(request: Request, failure: Exception) -> Response:
    assert isinstance(failure, core.Refusal)
    return refused(request.scope, failure)


async def _validation(request: Request, failure: Exception) -> Response:
    """Answer a parameter that FastAPI refused, by its name."""
    assert isinstance(failure, RequestValidationError)
    errors: Sequence[Mapping[str, object]] = failure.errors()
    shaped = field_errors(errors, skip=1)
    first = shaped[0]
    return problem(
        request.scope,
        422,
        "invalid-parameter",
        f"{first['field']}: {first['detail']}.",
        fields={
            "parameter": first["field"],
            "errors": [{"parameter": one["field"], "detail": one["detail"]} for one in shaped],
        },
    )


async def _http(request: Request, failure: Exception) -> Response:
    """Answer what the router itself refuses: no such path, or not with this method."""
    assert isinstance(failure, HTTPException)
    if failure.status_code == HTTPStatus.NOT_FOUND:
        return problem(
            request.scope, 404, "path-not-found", "There is nothing at this path; GET /docs lists all."
        )
    if failure.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allow = ", ".join(allowed_methods(request))
        return problem(
            request.scope,
            405,
            "method-not-allowed",
            f"This path takes {allow}.",
            headers={"Allow": allow},
        )
    phrase = HTTPStatus(failure.status_code).phrase
    return problem(request.scope, failure.status_code, "request-refused", f"{phrase}.")


def allowed_methods(request: Request) -> list[str]:
    """Return the methods that this request's path takes, over all of its routes."""
    methods: set[str] = set()
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            methods.add(method)
    if "GET" in methods:
        methods.add("HEAD")
    return sorted(methods)


def _encoded(content: Mapping[str, object]) -> bytes:
    try:
        return orjson.dumps(content)
    except TypeError:  # a lone surrogate in a name that the client sent: say it with question marks
        return orjson.dumps(_printable(content))


def _printable(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {str(_printable(key)): _printable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(one) for one in value]
    return value
