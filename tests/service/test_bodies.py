"""Bodies under their limits, and JSON that means one thing or is refused."""

import asyncio
from typing import Annotated
from uuid import UUID

import pytest
from fastapi import APIRouter, FastAPI, Request
from pydantic import AwareDatetime, Field
from starlette.testclient import TestClient

from service.api import problems
from service.api.bodies import Intake, Numbers, RequestModel, json_body, parse, whole_body
from service.core.exceptions import Invalid
from tests.service.problems import problem

LIMIT = 2000


class Thing(RequestModel):
    number: float = 0
    count: int = 0
    text: Annotated[str, Field(max_length=10)] = ""
    identity: UUID | None = None
    moment: AwareDatetime | None = None
    flag: bool = False
    inner: tuple["Thing", ...] = ()
    counts: Numbers | None = None


router = APIRouter()


@router.post("/json")
async def take_json(thing: Annotated[Thing, json_body(Thing)]) -> dict[str, object]:
    return {"number": thing.number}


@router.post("/raw")
async def take_raw(request: Request) -> dict[str, int]:
    async with whole_body(request) as body:
        return {"bytes": len(body), "held": request.app.state.intake.held_bytes}


@pytest.fixture
def client():
    app = FastAPI()
    problems.install(app)
    app.state.intake = Intake(max_body_bytes=LIMIT, max_held_bytes=2 * LIMIT, patience_s=0.2)
    app.include_router(router)
    with TestClient(app) as client:
        yield client


def refused(client, body, status=422):
    return problem(client.post("/json", content=body), status)


def test_json_is_read_whatever_the_content_type_says(client):
    answer = client.post("/json", content=b'{"number": 1}', headers={"Content-Type": "text/plain"})
    assert answer.json() == {"number": 1.0}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1,",
        b"\xff\xfe",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"{'number': 1}",
        b"[" * 1999,
        b'{"number": 01}',
        b'{"number": 1} {"number": 2}',
        '{"number": 1}'.encode("utf-16"),
        b'\xef\xbb\xbf{"number": 1}',
    ],
)
def test_what_is_not_json_in_utf_8_is_a_400(client, body):
    assert refused(client, body, 400)["code"] == "malformed-json"


@pytest.mark.parametrize("constant", [b"NaN", b"Infinity", b"-Infinity"])
def test_nan_and_infinity_are_refused_wherever_they_stand(client, constant):
    assert refused(client, b'{"number": ' + constant + b"}")["code"] == "non-finite-number"
    assert refused(client, b'{"nowhere": [' + constant + b"]}")["code"] == "non-finite-number"


def test_a_number_that_overflows_is_refused_by_name(client):
    assert refused(client, b'{"number": 1e999}')["field"] == "number"
    assert refused(client, b'{"number": ' + b"9" * 500 + b"}")["field"] == "number"


def test_an_integer_of_thousands_of_digits_is_refused():
    with pytest.raises(Invalid, match="out of all range"):
        parse(Thing, b'{"count": ' + b"9" * 5000 + b"}")


def test_a_field_that_stands_twice_is_refused_even_with_equal_values(client):
    assert refused(client, b'{"number": 1, "number": 1}')["field"] == "number"
    assert refused(client, b'{"inner": [{"text": "a", "text": "a"}]}')["code"] == "repeated-field"


@pytest.mark.parametrize(
    ("counts", "field", "detail"),
    [
        (b'[1, "2"]', "counts.1", "Input should be a valid number"),
        (b'{"cat": null}', "counts.cat", "Input should be a valid number"),
        (b'"many"', "counts", "Input should be an object by label or a list by index"),
        (b"7", "counts", "Input should be an object by label or a list by index"),
    ],
)
def test_numbers_by_label_or_by_index_are_refused_where_they_are_wrong(client, counts, field, detail):
    problem = refused(client, b'{"counts": ' + counts + b"}")
    assert problem["errors"] == [{"field": field, "detail": detail}]
    assert problem["detail"] == f"{field}: {detail}."


def test_an_unknown_field_is_refused_by_name(client):
    problem = refused(client, b'{"inner": [{"numbre": 1}]}')
    assert (problem["code"], problem["field"]) == ("unknown-field", "inner.0.numbre")


@pytest.mark.parametrize(
    "body",
    [
        b'{"number": "1"}',
        b'{"number": true}',
        b'{"number": null}',
        b'{"count": 1.5}',
        b'{"count": 1.0}',
        b'{"count": "1"}',
        b'{"text": 1}',
        b'{"text": "longer than ten"}',
        b'{"identity": "no-uuid"}',
        b'{"moment": "2026-01-01T00:00:00"}',
        b'{"moment": 1700000000}',
        b'{"flag": 1}',
        b'{"flag": "true"}',
        b"[]",
        b"null",
        b'"text"',
    ],
)
def test_a_value_of_another_type_is_a_422(client, body):
    assert refused(client, body)["code"] == "invalid-field"


def test_an_integer_is_a_number_and_ids_and_times_are_strings(client):
    body = (
        b'{"number": 1, "identity": "01890a5d-ac96-774b-bcce-b302099a8057", "moment": "2026-01-01T00:00:00Z"}'
    )
    assert client.post("/json", content=body).status_code == 200


def test_a_refusal_does_not_repeat_the_value(client):
    assert "secret" not in str(refused(client, b'{"number": "secret"}'))


def test_a_body_over_the_limit_is_a_413_with_and_without_a_declared_length(client):
    assert client.post("/raw", content=b"x" * (LIMIT + 1)).status_code == 413
    chunks = (b"x" * 100 for _ in range(LIMIT // 100 + 1))
    assert client.post("/raw", content=chunks).status_code == 413
    assert client.post("/raw", content=b"x" * LIMIT).json()["bytes"] == LIMIT


def test_a_declared_length_that_is_no_number_is_not_believed(client):
    answer = client.post("/raw", content=b"x", headers={"Content-Length": "many"})
    assert answer.json()["bytes"] == 1


def test_bytes_are_held_while_a_request_works_and_given_back_after(client):
    assert client.post("/raw", content=b"x" * 100).json() == {"bytes": 100, "held": 100}
    client.post("/raw", content=b"x" * (LIMIT + 1))
    client.post("/json", content=b"{")
    assert client.app.state.intake.held_bytes == 0


def test_bodies_that_fill_their_share_of_memory_are_a_429_with_retry_after(client):
    client.app.state.intake.held_bytes = 2 * LIMIT
    answer = client.post("/raw", content=b"x")
    assert (answer.status_code, answer.json()["code"]) == (429, "intake-full")
    assert int(answer.headers["Retry-After"]) >= 1
    assert client.app.state.intake.held_bytes == 2 * LIMIT


def test_a_body_that_does_not_arrive_is_given_up():
    app = FastAPI()
    app.state.intake = Intake(max_body_bytes=10, max_held_bytes=10, patience_s=0.05)

    async def receive():
        await asyncio.sleep(60)

    async def read():
        request = Request({"type": "http", "headers": [], "app": app, "method": "POST"}, receive)
        async with whole_body(request):
            pass

    with pytest.raises(Exception, match="did not arrive"):
        asyncio.run(read())


def test_a_large_json_body_is_parsed_off_the_loop_by_the_same_rules():
    app = FastAPI()
    problems.install(app)
    app.state.intake = Intake(max_body_bytes=1 << 20, max_held_bytes=1 << 21)
    app.include_router(router)
    with TestClient(app) as client:
        many = b'{"inner": [' + b",".join([b'{"number": 2}'] * 30_000) + b"]"
        assert client.post("/json", content=many + b', "number": 3}').json() == {"number": 3.0}
        assert refused(client, many + b', "number": NaN}')["code"] == "non-finite-number"
