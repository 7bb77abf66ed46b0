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


@pytest.mark.parametrize(
    "text",
    [
        *"nan NaN inf -inf Infinity 1e308 1e999 -1 100.1 1_000 0x1 1,5 one 1e --1 true \u0661".split(),
        *("", " 1", "1 "),
    ],


def test_a_parameter_that_stands_twice_is_refused_even_with_equal_values(client):
    answer = client.get("/numbers?tau=1&tau=1")
    assert (answer.status_code, answer.json()["code"]) == (422, "repeated-parameter")


def test_a_parameter_of_a_dependency_is_known(client):
    assert client.get("/numbers?deep=1").status_code == 200
