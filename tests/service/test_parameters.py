"""What may stand in a query, by one notation, and what is refused by name."""

from typing import Annotated

import pytest
from fastapi import APIRouter, Depends, FastAPI, Query
from starlette.testclient import TestClient

from service.api import problems
from service.api.parameters import SpanQuery, TauQuery, TimeQuery, TopKQuery, only_known_parameters

router = APIRouter()


def inner(deep: Annotated[int | None, Query()] = None) -> int | None:
    return deep


@router.get("/numbers", dependencies=[Depends(inner)])
async def numbers(
    tau: TauQuery = None, top_k: TopKQuery = 5, last: SpanQuery = None, since: TimeQuery = None
) -> dict[str, object]:
    return {
        "tau": tau,
        "top_k": top_k,
        "last": last.total_seconds() if last else None,
        "since": since.isoformat() if since else None,
    }


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    problems.install(app)
    app.include_router(router, dependencies=[Depends(only_known_parameters)])
    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize(("text", "value"), [("1.5", 1.5), ("0", 0), ("1e2", 100), (".5", 0.5), ("1.", 1)])
def test_a_decimal_number_is_a_tau(client, text, value):
    assert client.get("/numbers", params={"tau": text}).json()["tau"] == value


NO_NUMBERS = ["nan", "NaN", "inf", "-inf", "Infinity", "1e308", "1e999", "-1", "100.1", "1_000", "0x1"]
NO_NUMBERS += ["1,5", "one", "1e", "--1", "true", "\u0661", "", " 1", "1 "]


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_anything_else_as_tau_is_a_422_that_names_it(client, text):
    answer = client.get("/numbers", params={"tau": text})
    assert answer.status_code == 422
    assert answer.json()["parameter"] == "tau"
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("text", ["0", "-1", "1.0", "1e1", "", "1_0", "nan", "9" * 30])
def test_top_k_is_a_whole_number_from_one(client, text):
    answer = client.get("/numbers", params={"top_k": text})
    assert answer.status_code == 422
    assert answer.json()["parameter"] == "top_k"


def test_a_span_is_a_number_with_a_unit(client):
    assert client.get("/numbers", params={"last": "7d"}).json()["last"] == 7 * 86_400
    for text in ("7", "d", "0d", "-1d", "7 d", "1y", "999999999w", "P7D"):
        assert client.get("/numbers", params={"last": text}).json()["parameter"] == "last", text


def test_a_time_has_a_zone_and_is_not_a_number(client):
    assert client.get("/numbers", params={"since": "2026-01-02T03:04:05Z"}).status_code == 200
    assert client.get("/numbers", params={"since": "2026-01-02T03:04:05+02:00"}).status_code == 200
    for text in ("2026-01-02T03:04:05", "2026-01-02", "1700000000", "now", "2026-13-02T03:04:05Z"):
        assert client.get("/numbers", params={"since": text}).json()["parameter"] == "since", text


def test_an_unknown_parameter_is_refused_by_name(client):
    answer = client.get("/numbers?taus=1")
    assert (answer.status_code, answer.json()["code"]) == (422, "unknown-parameter")
    assert answer.json()["parameter"] == "taus"
    assert "tau" in answer.json()["detail"]


def test_a_parameter_that_stands_twice_is_refused_even_with_equal_values(client):
    answer = client.get("/numbers?tau=1&tau=1")
    assert (answer.status_code, answer.json()["code"]) == (422, "repeated-parameter")


def test_a_parameter_of_a_dependency_is_known(client):
    assert client.get("/numbers?deep=1").status_code == 200
