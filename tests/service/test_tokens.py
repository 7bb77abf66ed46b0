"""Who may do what, with each combination of tokens set."""

import pytest
from fastapi import APIRouter, Depends, FastAPI
from starlette.testclient import TestClient

from service.api import problems
from service.api.tokens import AdminDep, Tokens, may_predict

router = APIRouter()


@router.get("/thing")
async def look() -> None:
    return None


@router.put("/thing", dependencies=[AdminDep])
async def change() -> None:
    return None


def statuses(admin, predict, header):
    """What (GET, PUT) answer."""
    app = FastAPI()
    problems.install(app)
    app.state.tokens = Tokens(admin, predict)
    app.include_router(router, dependencies=[Depends(may_predict)])
    headers = {} if header is None else {"Authorization": header}
    with TestClient(app) as client:
        answers = [client.get("/thing", headers=headers), client.put("/thing", headers=headers)]
    for answer in answers:
        assert ("WWW-Authenticate" in answer.headers) == (answer.status_code == 401)
    return tuple(answer.status_code for answer in answers)


@pytest.mark.parametrize(
    ("admin", "predict", "header", "expected"),
    [
        (None, None, None, (200, 200)),
        (None, None, "Bearer whatever", (200, 200)),
        ("adm", None, None, (200, 401)),
        ("adm", None, "Bearer adm", (200, 200)),
        ("adm", None, "Bearer wrong", (200, 401)),
        ("adm", "pre", None, (401, 401)),
        ("adm", "pre", "Bearer pre", (200, 403)),
        ("adm", "pre", "Bearer adm", (200, 200)),
        ("adm", "pre", "bearer adm", (200, 200)),
        ("adm", "pre", "Basic adm", (401, 401)),
        ("adm", "pre", "Bearer ", (401, 401)),
        ("adm", "pre", "adm", (401, 401)),
        ("adm", "pre", "Bearer admi", (401, 401)),
        ("adm", "pre", "Bearer ad", (401, 401)),
        (None, "pre", None, (401, 401)),
        (None, "pre", "Bearer pre", (200, 200)),
    ],
)
def test_each_token_opens_what_it_should(admin, predict, header, expected):
    assert statuses(admin, predict, header) == expected


def test_a_token_of_other_bytes_than_ascii_is_unknown_and_no_failure():
    assert statuses("adm", None, b"Bearer \xff\xfe") == (200, 401)
