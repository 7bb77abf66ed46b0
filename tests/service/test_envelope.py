"""What goes round every request: ids, HEAD, failures, and the report of each."""

import asyncio
import contextlib
import json

import pytest
from fastapi import APIRouter, FastAPI
from starlette.testclient import TestClient

from service.api import problems
from service.api.envelope import Envelope
from service.core.exceptions import NotFound

router = APIRouter()


@router.get("/fine/{name}")
async def fine(name: str) -> dict[str, str]:
    return {"name": name}


@router.put("/fine/{name}")
async def put(name: str) -> None:
    return None


@router.get("/refused")
async def refused() -> None:
    raise NotFound("thing-not-found", "No such thing.")


@router.get("/broken")
async def broken() -> None:
    raise RuntimeError("a secret at /home/someone/file.py")


@pytest.fixture
def reports():
    return []


@pytest.fixture
def client(reports):
    app = FastAPI(redirect_slashes=False)
    problems.install(app)
    app.include_router(router)
    seen = []

    @contextlib.contextmanager
    def in_request(identity):
        seen.append(identity)
        yield

    app.add_middleware(Envelope, in_request=in_request, report=reports.append)
    with TestClient(app, raise_server_exceptions=True) as client:
        client.seen = seen
        yield client


def test_a_sane_request_id_is_kept_and_marks_the_context(client):
    for identity in ("abc", "01890a5d-ac96-774b-bcce-b302099a8057", "a" * 128, "trace:1/2+3=4@x.y_z"):
        assert client.get("/fine/x", headers={"X-Request-Id": identity}).headers["X-Request-Id"] == identity
        assert client.seen[-1] == identity


@pytest.mark.parametrize("identity", ["", "a" * 129, "a b", "-a", 'a"b', "a;b", b"\xff", "<a>"])
def test_any_other_is_replaced(client, identity):
    made = client.get("/fine/x", headers={"X-Request-Id": identity}).headers["X-Request-Id"]
    assert len(made) == 32
    assert made.isalnum()


def test_every_answer_has_an_id_and_no_two_have_the_same(client):
    paths = ("/fine/x", "/refused", "/broken", "/nowhere", "/fine/x")
    made = [client.get(path).headers["X-Request-Id"] for path in paths]
    made.append(client.post("/fine/x").headers["X-Request-Id"])
    assert len(set(made)) == len(made)


def test_what_nobody_foresaw_is_a_500_that_tells_nothing_and_a_log_line_that_tells_all(client, caplog):
    answer = client.get("/broken")
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "internal"
    assert "secret" not in answer.text
    assert "secret" in caplog.text


def test_head_answers_as_get_without_the_body(client):
    get, head = client.get("/fine/x"), client.head("/fine/x")
    assert head.status_code == 200
    assert head.content == b""
    assert head.headers["content-length"] == get.headers["content-length"]
    assert client.head("/nowhere").status_code == 404


def test_a_method_that_a_path_does_not_take_is_a_405_that_lists_those_it_does(client):
    answer = client.post("/fine/x")
    assert answer.status_code == 405
    assert answer.headers["Allow"] == "GET, HEAD, PUT"
    assert client.request("BREW", "/fine/x").status_code == 405
    assert client.options("/fine/x").status_code == 405


def test_an_unknown_path_is_a_problem(client):
    for path in ("/nowhere", "/fine", "/fine/", "/fine/x/", "//fine/x", "/fine/%2e%2e/x"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "path-not-found"), path


def test_under_v2_an_error_has_the_form_of_that_protocol(client):
    answer = client.get("/v2/nowhere")
    assert answer.status_code == 404
    assert list(answer.json()) == ["error"]
    assert answer.headers["content-type"] == "application/json"


def test_each_request_is_reported_once_by_the_route_and_not_the_path(client, reports):
    client.get("/fine/x")
    client.get("/refused")
    client.get("/broken")
    client.get("/nowhere")
    client.request("BREW", "/fine/x")
    assert [(one.method, one.route, one.status, one.code) for one in reports] == [
        ("GET", "/fine/{name}", 200, None),
        ("GET", "/refused", 404, "thing-not-found"),
        ("GET", "/broken", 500, "internal"),
        ("GET", "unmatched", 404, "path-not-found"),
        ("other", "/fine/{name}", 405, "method-not-allowed"),
    ]
    assert all(one.seconds > 0 for one in reports)


def test_a_request_that_the_server_cancels_because_it_stops_is_a_503(reports):
    sent = []

    async def app(scope, receive, send):
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    async def send(message):
        sent.append(message)

    enveloped = Envelope(app, in_request=contextlib.nullcontext, report=reports.append)
    scope = {"type": "http", "method": "GET", "path": "/slow", "headers": []}
    asyncio.run(enveloped(scope, None, send))
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["code"] == "stopping"
    assert (reports[0].status, reports[0].code) == (503, "stopping")
