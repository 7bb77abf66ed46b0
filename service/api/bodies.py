"""Reads a request's body under its limits: raw bytes, the files of a form, or JSON that means one thing."""

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Final, NoReturn, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Discriminator, Tag, ValidationError
from starlette.requests import ClientDisconnect

from service.api.problems import BY_INDEX, BY_LABEL, field_errors
from service.core.exceptions import Invalid, Malformed, Overloaded, TooLarge

_BIG_JSON_BYTES: Final = 1 << 18
_JSON_MODEL: Final = "json_model"  # the attribute of a dependency
_WINDOWS: Final = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}  # which header zlib expects

Model = TypeVar("Model", bound=BaseModel)
Answer = TypeVar("Answer")
Read = TypeVar("Read")


class RequestModel(BaseModel):
    """The base of every JSON body: unknown fields, NaN and values of another type are refused.

    Validated from JSON in pydantic's strict mode: "1.5" is no number, 1.0 no integer, true no integer;
    an integer is a number, and UUIDs and times are read from strings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _notation(value: object) -> str | None:
    if isinstance(value, dict):
        return BY_LABEL
    return BY_INDEX if isinstance(value, list) else None


# Told apart by what was sent, so that a bad number in a list is not answered with a wish for an object.
Numbers = Annotated[
    Annotated[dict[str, float], Tag(BY_LABEL)] | Annotated[list[float], Tag(BY_INDEX)],
    Discriminator(
        _notation,
        custom_error_type="numbers_type",
        custom_error_message="Input should be an object by label or a list by index",
    ),
]
"""A number for every class."""


@dataclass
class Intake:
    """How many bytes the service takes: a body at most `max_body_bytes`, all in flight `max_held_bytes`.

    A body that does not arrive within `patience_s` is given up. `heavy` lets one large body at a time be
    parsed or inflated: what comes of it can take twenty times the memory, or a thousand.
    """

    max_body_bytes: int
    max_held_bytes: int
    patience_s: float = 120.0
    held_bytes: int = 0
    heavy: asyncio.Lock = field(default_factory=asyncio.Lock)


@asynccontextmanager
async def whole_body(request: Request) -> AsyncIterator[bytes]:
    """Read the body; its bytes count as held until the block ends.

    Raises TooLarge as soon as the limit is passed (Content-Length may be absent or false), Overloaded where
    the bodies in flight fill their share of memory, Malformed where it does not arrive in time.
    """
    intake: Intake = request.app.state.intake
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > intake.max_body_bytes:
        _too_large(intake)
    chunks: list[bytes] = []
    size = 0
    try:
        try:
            async with asyncio.timeout(intake.patience_s):
                async for chunk in request.stream():
                    size += len(chunk)
                    intake.held_bytes += len(chunk)
                    if size > intake.max_body_bytes:
                        _too_large(intake)
                    if intake.held_bytes > intake.max_held_bytes:
                        raise intake_is_full()
                    chunks.append(chunk)
        except TimeoutError:
            raise body_too_late(intake.patience_s) from None
        yield b"".join(chunks)
    finally:
        intake.held_bytes -= size


def intake_is_full() -> Overloaded:
    """Return the refusal of a body for which no memory is left."""
    return Overloaded(
        "intake-full", "The bodies in flight fill the memory set aside for them; try again.", retry_after_s=1
    )


def body_too_late(patience_s: float) -> Malformed:
    """Return the refusal of a body that did not arrive in time."""
    return Malformed("body-timeout", f"The body did not arrive within {patience_s:g} s; send it again.")


async def unless_abandoned(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """Return what this work returns, and cancel it where the client hangs up first.

    For a request whose body has been read. Raises ClientDisconnect then, else what the work raises.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    """Return when the client has hung up: after a body nothing else is to come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def inflated(request: Request, data: bytes) -> AsyncIterator[bytes]:
    """Undo the Content-Encoding, gzip or deflate; what comes out counts as held until the block ends.

    Raises TooLarge beyond the limit of a body, however small it came, and Malformed for other encodings, what
    does not decompress, is cut off, or goes on after its end.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding == "identity":
        yield data
        return
    intake: Intake = request.app.state.intake
    async with intake.heavy:
        whole = await asyncio.to_thread(_inflated, data, encoding, intake)
    intake.held_bytes += len(whole)
    try:
        if intake.held_bytes > intake.max_held_bytes:
            raise intake_is_full()
        yield whole
    finally:
        intake.held_bytes -= len(whole)


def json_body(model: type[BaseModel]) -> Any:
    """Return the FastAPI dependency that reads this model from a JSON body.

    Used as `Annotated[FeedbackIn, json_body(FeedbackIn)]`. Raises Malformed for what is not JSON in UTF-8,
    and Invalid for repeated or unknown fields, NaN and Infinity, and whatever the model refuses. The
    Content-Type is not looked at. `service.api.document` puts the model into the OpenAPI document.
    """

    async def read(request: Request) -> BaseModel:
        async with whole_body(request) as data:
            return await beside_the_loop(request, len(data), partial(parse, model, data))

    reads_json(read, model)
    return Depends(read)


def reads_json(call: object, model: type[BaseModel]) -> None:
    """Let `service.api.document` know that this dependency reads the model from a JSON body."""
    setattr(call, _JSON_MODEL, model)


async def beside_the_loop(request: Request, json_bytes: int, read: Callable[[], Read]) -> Read:
    """Return what `read` makes of this many bytes of JSON; many are read on a thread, one body at a time."""
    if json_bytes < _BIG_JSON_BYTES:
        return read()
    intake: Intake = request.app.state.intake
    async with intake.heavy:
        return await asyncio.to_thread(read)


def json_model_of(call: object) -> type[BaseModel] | None:
    """Return the model that this dependency reads from a JSON body, or None for any other."""
    model: type[BaseModel] | None = getattr(call, _JSON_MODEL, None)
    return model


def parse(model: type[Model], data: bytes) -> Model:
    """Parse and validate one JSON text. Raises Malformed or Invalid, naming the field."""
    try:
        # The standard parser first: it alone shows every key of an object, and every constant.
        json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
        return model.model_validate_json(data)
    except ValidationError as failure:
        errors = failure.errors(include_url=False, include_context=False, include_input=False)
        first = errors[0]
        if first["type"] == "json_invalid":
            raise _malformed() from failure
        shaped = field_errors(errors)
        where = shaped[0]["field"]
        raise Invalid(
            "unknown-field" if first["type"] == "extra_forbidden" else "invalid-field",
            f"{where}: {shaped[0]['detail']}." if where else f"{shaped[0]['detail']}.",
            field=where,
            errors=shaped,
        ) from failure
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as failure:
        raise _malformed() from failure
    except ValueError as failure:  # Python reads no integer of thousands of digits
        raise Invalid("invalid-field", "The body holds an integer that is out of all range.") from failure


def _inflated(data: bytes, encoding: str, intake: Intake) -> bytes:
    if encoding not in _WINDOWS:
        raise Malformed(
            "malformed-encoding",
            f"Content-Encoding {encoding[:40]} is not taken; send gzip, deflate or none.",
        )
    inflate = zlib.decompressobj(_WINDOWS[encoding])
    try:
        whole = inflate.decompress(data, intake.max_body_bytes + 1)
    except zlib.error as failure:
        raise Malformed("malformed-encoding", f"The body is not {encoding}.") from failure
    if len(whole) > intake.max_body_bytes:
        _too_large(intake)
    if not inflate.eof or inflate.unused_data:
        raise Malformed("malformed-encoding", f"The body is not one whole {encoding} stream.")
    return whole


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Invalid(
                    "repeated-field", f"{key[:100]}: this field stands twice; send it once.", field=key[:100]
                )
            seen.add(key)
    return found


def _no_constant(name: str) -> NoReturn:
    raise Invalid("non-finite-number", f"The body holds {name}; JSON has finite numbers only.")


def _malformed() -> Malformed:
    return Malformed("malformed-json", "The body is not JSON in UTF-8; send one JSON value.")


def _too_large(intake: Intake) -> NoReturn:
    raise TooLarge(
        "body-too-large",
        f"The body has more than {intake.max_body_bytes} bytes; send a smaller one.",
        limit_bytes=intake.max_body_bytes,
    )
