"""Every method on every path, with every token: generated from the routes, so that none can be forgotten."""

from __future__ import annotations

import logging
import uuid

import pytest
from fastapi.routing import APIRoute

from service import app as wiring
from service.api import tokens
from service.settings import Settings
from tests import tiny
from tests.service import v2
from tests.service.conftest import client_by
from tests.service.test_hostile import BODIES
from tests.service.test_poisoned_bundles import POISON

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
TOKENS = {
    "none": {},
    "wrong": {"Authorization": "Bearer wrong"},
    "no bearer": {"Authorization": "Basic adm"},
    "predict": {"Authorization": "Bearer pre"},
    "admin": {"Authorization": "Bearer adm"},
}
# Without a token: what probes, scrapers and browsers ask.
OPEN = {"/healthz", "/readyz", "/metrics", "/openapi.json", "/"}
# Not in the document, which describes the API.
UNDESCRIBED = {
    *("/", "/openapi.json", "/favicon.ico", "/docs"),
    *("/docs/start.js", "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js"),
}
NOWHERE = (
    "/nothing",
    "/predict/",
    "/priors/default/nothing",
    "/v2/models/tiny/stats",
    "/v2/nothing",
    "/%2e%2e",
)
VALUES = {"prediction_id": str(uuid.UUID(int=7 << 76 | 2 << 62)), "name": "tiny", "version": "1"}


def is_open(path):
    return path in OPEN or path.startswith(("/docs", "/favicon", "/v2/health/"))


def changes_state(method, path):
    """What needs the admin token, by the design: PUT, DELETE, and POST only to roll back."""
    return method in {"PUT", "DELETE"} or (method == "POST" and path.endswith("/rollback"))


def filled(path):
    for name, value in VALUES.items():
        path = path.replace("{" + name + "}", value)
    assert "{" not in path, f"what stands for a value in {path}?"
    return path


@pytest.fixture(scope="module", params=["asgi", pytest.param("http", marks=pytest.mark.slow)])
def locked(request, tmp_path_factory, tiny_models):
    """A client of an application with both tokens."""
    settings = Settings(
        models_dir=tiny_models,
        state_dir=tmp_path_factory.mktemp("locked") / "state",
        lone_threads=1,
        admin_token="adm",
        predict_token="pre",
    )
    with client_by(request.param, settings) as client:
        yield client


@pytest.fixture(scope="module")
def described(locked):
    """The document's paths, each with its methods."""
    paths = locked.get("/openapi.json").json()["paths"]
    return {path: {method.upper() for method in operations} for path, operations in paths.items()}


def test_every_route_is_described_or_known_to_be_none_of_the_api(described):
    there = {
        (route.path, method)
        for router in (*wiring._GUARDED, *wiring._OPEN)
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert there
    said = {(path, method) for path, methods in described.items() for method in methods}
    assert {path for path, _ in there - said} <= UNDESCRIBED
    assert said <= there
    assert any(path.startswith("/v2/") for path in described)


@pytest.mark.slow
def test_each_token_opens_what_it_should_and_nothing_else(locked, described):
    wrong = []
    for path, methods in [*described.items(), *((path, {"GET"}) for path in UNDESCRIBED)]:
        for method in METHODS:
            taken = method in methods or (method == "HEAD" and "GET" in methods)
            for name, headers in TOKENS.items():
                answer = locked.request(method, filled(path), headers=headers)
                found = answer.status_code
                if not taken:
                    fine = found == 405 and bool(answer.headers["allow"])
                elif is_open(path):
                    fine = found not in {401, 403, 405}
                elif name in {"none", "wrong", "no bearer"}:
                    fine = found == 401 and answer.headers["www-authenticate"].startswith("Bearer")
                elif name == "predict" and changes_state(method, path):
                    fine = found == 403
                else:
                    fine = found not in {401, 403, 405}
                if not fine or found == 500:
                    wrong.append((method, path, name, found))
    assert not wrong
    assert len(described) > 20


@pytest.mark.parametrize("path", NOWHERE)
def test_a_path_that_is_not_there_is_not_there_for_anybody(locked, path):
    for method in METHODS:
        for headers in TOKENS.values():
            assert locked.request(method, path, headers=headers).status_code == 404, (method, headers)


def test_nothing_was_changed_by_whoever_had_no_right_to(locked):
    assert locked.get("/priors/default", headers=TOKENS["predict"]).json()["version"] == 1
    for headers in (TOKENS["none"], TOKENS["wrong"], TOKENS["predict"]):
        refused = locked.put("/priors/default", json={"uniform": True}, headers=headers)
        assert refused.status_code in {401, 403}
    assert locked.get("/priors/default", headers=TOKENS["predict"]).json()["version"] == 1


def test_a_token_is_compared_whole_and_with_every_other_whatever_it_is(monkeypatch):
    seen = []
    real = tokens.hmac.compare_digest
    monkeypatch.setattr(tokens.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or real(a, b))
    door = tokens.Tokens("adm", "pre")
    for given in ("pre", "adm", "p", "x" * 500, "pr\xe9"):
        seen.clear()
        assert door.let_predict(f"Bearer {given}") == (given in {"pre", "adm"})
        assert len(seen) == 2  # no early way out: neither the place of a match nor a length shows in the time
        assert {len(one) for pair in seen for one in pair} == {32}


SECRETS = ("Traceback", 'File "', "site-packages", ".py", "onnxruntime_src", "/root", "/home")


@pytest.fixture(params=["asgi", pytest.param("http", marks=pytest.mark.slow)])
def watched(request, settings_for, tmp_path, caplog):
    """A client of a service with poisoned bundles, and all that it answers."""
    caplog.set_level(logging.DEBUG, logger="tare")
    tiny.make(tmp_path / "models" / "tiny")
    for name, (make, _) in POISON.items():
        make(tmp_path / "models" / name)
    answers = []
    with client_by(request.param, settings_for(models_dir=tmp_path / "models")) as client:
        real = client.request

        def noted(method, url, **options):
            answer = real(method, url, **options)
            answers.append(answer)
            return answer

        client.request = noted
        yield client, answers


def test_no_answer_and_no_line_below_an_error_has_a_trace_or_a_path(watched, tmp_path, caplog, image):
    client, answers = watched
    paths = client.request("GET", "/openapi.json").json()["paths"]
    bodies = [*BODIES, image, image[:50], b"\xff", b"GIF89a" + bytes(40)]
    for path, operations in paths.items():
        for method in operations:
            for body in bodies if method in {"put", "post"} else [b""]:
                client.request(method.upper(), filled(path), content=body)
    for query in ("tau=x", "model=nobody", "model=exabytes-of-zeros", "priors=../x", "nothing=1", "%ff=%00"):
        for path in ("/predict", "/monitor", "/models"):
            client.request("POST" if path == "/predict" else "GET", f"{path}?{query}", content=image)
    client.request("POST", v2.INFER, content=b'{"inputs": [', headers={v2.LENGTH: "5"})
    for path in ("/v2/repository/index", "/nothing", "/docs", "/docs/../../etc/passwd"):
        client.request("POST", path)
    assert len(answers) > 300
    assert {answer.status_code for answer in answers} >= {200, 400, 404, 405, 415, 422}
    secrets = (*SECRETS, str(tmp_path), str(tmp_path.parent))
    for answer in answers:
        assert answer.status_code < 500, answer.text
        if "/docs" in str(answer.url) or str(answer.url).endswith("/openapi.json"):
            continue  # what the package ships, the same for everybody
        said = answer.text + str(dict(answer.headers))
        assert not [secret for secret in secrets if secret in said], said
    for record in caplog.records:
        if record.levelno < logging.ERROR and record.name.startswith("tare"):
            line = record.getMessage() + str(getattr(record, "fields", ""))
            assert record.exc_info is None
            assert not [secret for secret in secrets if secret in line], line
