"""What a hostile or clumsy client sends gets a 4xx, never a 500, and the next client is served."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests import tiny

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
TAKEN = {200, 413, 415, 422}


@pytest.fixture(scope="module", params=["asgi", "http"])
def way(request):
    """The application itself, and its server, which takes plain predictions before the application."""
    return request.param


def encoded(form, rng):
    pixels = rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return bytearray(buffer.getvalue())


# Pillow warns of damaged tags that it reads around; the service logs that and goes on.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_a_damaged_image_is_an_image_or_refused(lasting_client, form):
    rng = np.random.default_rng(FORMATS.index(form))
    statuses = set()
    for _ in range(60):
        data = encoded(form, rng)
        for _ in range(int(rng.integers(1, 8))):
            data[int(rng.integers(4, len(data)))] = int(rng.integers(0, 256))
        if rng.random() < 0.3:
            data = data[: int(rng.integers(0, len(data)))]
        answer = lasting_client.post("/predict", content=bytes(data))
        assert answer.status_code in TAKEN, (answer.status_code, bytes(data))
        statuses.add(answer.status_code)
    assert statuses - {200}
    assert lasting_client.get("/readyz").status_code == 200


def test_a_header_that_promises_billions_of_pixels_is_refused_before_decoding(lasting_client):
    data = bytearray(encoded("PNG", np.random.default_rng(0)))
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    answer = lasting_client.post("/predict", content=bytes(data))
    # The checksum of that chunk is wrong too; either is a reason, and neither takes 30 GB.
    assert answer.status_code in {413, 422}


@pytest.mark.parametrize(
    "path",
    [
        "/models/" + "x" * 10_000,
        "/models/%00",
        "/models/%ff%fe",
        "/models/..%2f..%2fetc%2fpasswd",
        "/priors/" + "x" * 10_000,
        "/priors/%F0%9F%A6%A6",
        "/priors/default/versions/1",
        "/predictions/not-a-uuid",
        "/predictions/00000000-0000-0000-0000-000000000000",
        "/predictions/ffffffff-ffff-7fff-bfff-ffffffffffff",
        "/monitor?version=zzz",
        "/monitor?model=nobody",
        "/monitor?priors=nobody",
        "/docs/../../etc/passwd",
        "/docs/swagger-ui.css.map",
    ],
)
def test_a_path_that_leads_nowhere_is_a_4xx(lasting_client, path):
    answer = lasting_client.get(path)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert "root:" not in answer.text


@pytest.mark.parametrize(
    "query",
    [
        *("since=nan", "since=2026-01-01", "since=9999-12-31T23:59:59%2B14:00", "since=0001-01-01T00:00:00Z"),
        *("until=2026-01-01T00:00:60Z", "last=0h", "last=99999999999d", "last=1h&since=2026-01-01T00:00:00Z"),
        *(
            "since=2026-01-02T00:00:00Z&until=2026-01-01T00:00:00Z",
            "tau=1_0",
            "tau=%00",
            "model=%00",
            "%ff=1",
        ),
        *("tau=1;top_k=2", "=1", "tau[]=1", "a" * 10_000 + "=1"),
    ],
)
def test_a_monitor_query_is_answered_or_refused(lasting_client, query):
    assert lasting_client.get(f"/monitor?{query}").status_code in {200, 422, 404}
    assert lasting_client.get(f"/monitor/tau-curve?{query}").status_code in {200, 422, 404}


ITEM = b'{"prediction_id": "01890a5d-ac96-774b-bcce-b302099a8057", '
BODIES = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"0",
    b'"x"',
    b"{" * 5000,
    b'{"a":' * 5000,
    b'{"items": []}',
    b'{"items": {}}',
    b'{"items": [null]}',
    b'{"items": [[]]}',
    b'{"items": [{"prediction_id": "x", "index": 0}]}',
    ITEM + b'"index": 99999999999999999999999}',
    ITEM + b'"index": -1}',
    ITEM + b'"label": "\\u0000"}',
    ITEM + b'"index": 0, "sampling_probability": 1e-320}',
    ITEM + b'"index": 0, "sampling_probability": 0}',
    ITEM + b'"index": 0, "labelled_at": "0001-01-01T00:00:00+23:59"}',
    ITEM + b'"index": 0, "labelled_at": "9999-12-31T23:59:59-23:59"}',
    b'{"probabilities": []}',
    b'{"probabilities": {}}',
    b'{"probabilities": [1e308, 1e308, 1e308, 1e308]}',
    b'{"probabilities": [0.25, 0.25, 0.25, 0.25, 0]}',
    b'{"probabilities": {"red": 1}}',
    b'{"probabilities": {"": 1}}',
    b'{"counts": [1e308, 1e308, 1e308, 1e308]}',
    b'{"counts": [5e-324, 0, 0, 0]}',
    b'{"counts": [1, 1, 1, 1], "smoothing": 1e308}',
    b'{"counts": [0, 0, 0, 0]}',
    b'{"counts": [-1, 1, 1, 1]}',
    b'{"uniform": false}',
    b'{"uniform": true, "source": true}',
    b'{"uniform": true, "note": "\\u0000"}',
    b'{"uniform": true, "note": "' + b"x" * 1001 + b'"}',
    b'{"version": 0}',
    b'{"version": 99999999999999999999999}',
    b'{"version": 1.0}',
    b'{"logits": [[]]}',
    b'{"logits": [[1, 2, 3, 4]], "tau": 1e308}',
    b'{"logits": [[1e38, -1e38, 1e38, 0]], "tau": 100}',
    b'{"logits": [[1, 2, 3, 4]], "top_k": 99999999999999999999999}',
    b'{"logits": [[1, 2, 3, 4]], "target_prior": {}}',
    b'{"logits": [[1, 2, 3, 4]], "target_prior": "x"}',
    b'{"logits": [[1, 2, 3, 4]], "target_prior": [5e-324, 0.5, 0.5, 0]}',
    b'{"logits": [[1, 2, 3, 4]], "model": ""}',
    b'{"logits": [[1, 2, 3, 4]], "priors": "../x"}',
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_a_json_body_is_taken_or_refused_on_every_route(lasting_client, body):
    routes = [("POST", "/adjust"), ("PUT", "/priors"), ("PUT", "/priors/other"), ("POST", "/feedback")]
    for method, path in [*routes, ("POST", "/priors/default/rollback"), ("POST", "/priors/nobody/rollback")]:
        answer = lasting_client.request(method, path, content=body)
        assert answer.status_code < 500, (method, path, answer.text)
        json.loads(answer.text, parse_constant=pytest.fail)
    assert lasting_client.get("/readyz").status_code == 200


@pytest.mark.parametrize("value", ['"x"', "*", "W/*", '"', ",,,", "", "x" * 10_000, '"a", "b"', 'W/"a"'])
def test_a_strange_entity_tag_matches_nothing_or_is_the_star(lasting_client, value):
    for header in ("If-Match", "If-None-Match"):
        answer = lasting_client.put("/priors", json={"uniform": True}, headers={header: value})
        assert answer.status_code in {200, 412}, (header, answer.text)


def test_a_form_of_hostile_parts_is_refused(lasting_client):
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="a"; filename="%s"\r\n\r\n'
    for body in (
        b"--x--\r\n",
        b"--x\r\n\r\n\r\n--x--\r\n",
        part % b"../../etc/passwd" + b"junk\r\n--x--\r\n",
        part % (b"\xff" * 1000) + b"junk\r\n--x--\r\n",
        (part % b"a" + b"\r\n") * 65 + b"--x--\r\n",
        b"--x\r\nContent-Disposition: " + b"a" * 100_000 + b"\r\n\r\n--x--\r\n",
    ):
        assert 400 <= lasting_client.post("/predict", content=body, headers=kind).status_code < 500
    assert lasting_client.get("/readyz").status_code == 200


def test_what_one_client_breaks_costs_no_other_its_answer(lasting_client):
    rng = np.random.default_rng(1)
    good = bytes(encoded("PNG", rng))
    wanted = lasting_client.post("/predict?tau=0", content=good).json()["predictions"][0]["top"]
    for junk in (b"", good[: len(good) // 2], b"\x89PNG\r\n\x1a\n" + bytes(rng.bytes(100))):
        assert lasting_client.post("/predict", content=junk).status_code in {415, 422}
        assert lasting_client.post("/predict?tau=0", content=good).json()["predictions"][0]["top"] == wanted
    assert wanted[0]["label"] in tiny.LABELS
