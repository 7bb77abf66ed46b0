"""Heads of every kind, sent to the service with and without its short way: the same answers by both."""

from __future__ import annotations

import json
import re
import socket
from functools import partial

import pytest
import uvicorn
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from service.api.protocol import Protocol
from service.app import create_app
from service.settings import Settings
from tests import tiny
from tests.service import v2, wire

IMAGE = tiny.png(v2.noise(1)[0])
# What follows each request on its connection: its answer closes it, and shows where the first one ended.
SENTINEL = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
PATIENCE_S = 0.15  # for a body that does not come


@pytest.fixture(scope="module")
def ports(tmp_path_factory, tiny_models):
    """Two servers of one application: with the short way, and without."""
    state = tmp_path_factory.mktemp("heads") / "state"
    app = create_app(Settings(models_dir=tiny_models, state_dir=state, lone_threads=1, predict_token="pre"))
    app.state.intake.patience_s = PATIENCE_S
    with wire.listening(app) as url:
        config = uvicorn.Config(
            app,
            http=partial(Protocol, express=None),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
        )
        with wire.beside(uvicorn.Server(config)) as port:
            yield int(url.rpartition(":")[2]), port


def said(port, request):
    """All that is answered to these bytes: (status, headers, body) each, and whether the end came."""
    with socket.create_connection(("127.0.0.1", port), timeout=10 * PATIENCE_S) as connection:
        came = b""
        try:
            connection.sendall(request)
            while piece := connection.recv(65_536):
                came += piece
            closed = True
        except ConnectionError:
            closed = True
        except TimeoutError:
            closed = False
    answers = []
    while came:
        head, _, came = came.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(one.lower().split(": ", 1) for one in lines)
        size = int(headers.get("content-length", 0))
        body, came = came[:size], came[size:]
        answers.append((line, shown(headers), plain(body)))
    return answers, closed


MADE = re.compile(r"[0-9a-f]{32}")  # an id that the service made


def shown(headers):
    """The headers but for times, and for ids and lengths, which differ from one answer to the next."""
    kept = {name: value for name, value in headers.items() if name not in {"date", "content-length"}}
    kept["server-timing"] = "server-timing" in kept
    if MADE.fullmatch(kept.get("x-request-id", "")):
        kept["x-request-id"] = "made"
    return kept


def plain(body):
    try:
        content = json.loads(body)
    except ValueError:
        return body
    for one in content.get("predictions", ()):
        assert one.pop("prediction_id")
    return content


PATHS = [
    b"/predict",
    *(b"/predict/", b"//predict", b"/Predict", b"/%70redict", b"/predict%2F", b"/./predict", b"/predict;v=1"),
    *(b"http://x/predict", b"HTTP://x:80/predict", b"/predict%3Ftau=1", b"/healthz", b"*", b"predict", b"?"),
]
VALUES = {
    b"tau": [
        b"1",
        b"1.5",
        b"0",
        b"1e1",
        b"1%2E5",
        b"%31",
        b"+1",
        b"-1",
        b"nan",
        b"",
        b"1 ",
        b"\xd9\xa1",
        b"%D9%A1",
    ],
    b"top_k": [b"1", b"3", b"003", b"0", b"1.0", b"9" * 18, b"9" * 19, b"%33", b"1_0"],
    b"model": [b"tiny", b"t%69ny", b"nobody", b"", b"x" * 65, b"\xff", b"%FF", b"%00", b"%", b"%4"],
    b"priors": [b"default", b"nobody", b"d+e", b"..", b"%2e%2e%2f", b"<x>", b'"', b"\x7f"],
    b"method": [b"none", b"logit-adjustment", b"weight-normalisation", b"None", b"x"],
    b"include": [b"logits", b"", b"logits%20", b"x"],
    b"other": [b"1", b""],
    b"t%61u": [b"1", b"2"],
    b"": [b"", b"1"],
}
pairs = st.sampled_from(list(VALUES)).flatmap(
    lambda name: st.sampled_from(VALUES[name]).flatmap(
        lambda value: st.sampled_from([name + b"=" + value, name + b"=" + value, name, name + b"==" + value])
    )
)
queries = st.lists(pairs, max_size=3).flatmap(
    lambda found: st.sampled_from([b"&", b"&", b"&", b"&&", b";", b"&amp;"]).map(
        lambda join: join.join(found)
    )
)
ENDS = [b"#part", b"&", b"?", b"#?tau=1"]


def odd_lengths(size):
    n = b"%d" % size
    values = [b"0" + n, b"+" + n, b"-" + n, n + b", " + n, b" " + n + b" ", b"0x10", b"", n + b".0"]
    values += [b"%d" % number for number in (0, 1, size - 1, size + 1, 2**25 + 1, 2**64, 10**30)]
    return [
        *([(b"Content-Length", value)] for value in values),
        [],
        [(b"content-LENGTH", n)],
        [(b"Content-Length", n), (b"Content-Length", n)],
        [(b"Content-Length", n), (b"Content-Length", b"1")],
        [(b"Content_Length", n)],
        [(b"Content-Length ", n)],
    ]


OTHERS = [
    *(
        (b"Content-Type", value)
        for value in (b"image/png", b"", b"multipart/form-data", b"MULTIPART/form-data; boundary=x")
    ),
    *((b"Content-Type", value) for value in (b"application/json", b"text/multipart", b"\xff", b"a" * 300)),
    *((b"X-Request-Id", value) for value in (b"mine", b"", b"my id", b"\xe9", b"x" * 129, b"a/b=c")),
    *(
        (b"X-Request-Timeout-Ms", value)
        for value in (b"60000", b"0", b"", b"1e3", b"600001", b"+5", b"\xb2", b" 60000 ")
    ),
    *(
        (b"Authorization", value)
        for value in (b"Bearer pre", b"bearer pre", b"Bearer  pre", b"Bearer", b"Basic pre", b"")
    ),
    *(
        (b"Authorization", value)
        for value in (b"Bearer wrong", b"Bearer pr\xc3\xa9", b"pre", b"Bearer pre, Bearer pre")
    ),
    *(
        (b"Connection", value)
        for value in (b"close", b"keep-alive", b"Close", b"upgrade", b"x", b"close, keep-alive")
    ),
    *((b"Upgrade", value) for value in (b"websocket", b"h2c")),
    *((b"Expect", value) for value in (b"100-continue", b"200-ok", b"")),
    *((b"Content-Encoding", value) for value in (b"gzip", b"identity")),
    *((b"Transfer-Encoding", value) for value in (b"identity", b"gzip", b"chunked, gzip", b"xchunked")),
    (b"Host", b"y"),
    (b"X-Folded", b"a\r\n b"),
    (b"X-Null", b"a\0b"),
    (b"X Blank", b"1"),
    (b"", b"empty"),
    (b"Inference-Header-Content-Length", b"5"),
    (b"X-Long", b"x" * 20_000),
]


METHODS = [b"GET", b"PUT", b"DELETE", b"OPTIONS", b"post", b"BREW"]
VERSIONS = [b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/1.1 "]
BODIES = [b"", IMAGE[:60], b"<html>", IMAGE + b"more", b"\r\n"]
CODINGS = [b"chunked", b"Chunked", b"gzip, chunked"]
ASPECTS = [
    "method",
    "version",
    "path",
    "query",
    "query",
    "end",
    "length",
    "chunks",
    "other",
    "other",
    "body",
    "token",
]


@st.composite
def requests(draw):
    """A request and what its client sends with it: plain but for three things at most."""
    odd = draw(st.sets(st.sampled_from(ASPECTS), max_size=3))

    def part(aspect, usual, choices):
        return draw(st.sampled_from(choices)) if aspect in odd else usual

    method, version = part("method", b"POST", METHODS), part("version", b"HTTP/1.1", VERSIONS)
    target = part("path", b"/predict", PATHS)
    if "query" in odd:
        target += b"?" + draw(queries)
    target += part("end", b"", ENDS)
    body = part("body", IMAGE, BODIES)
    headers = [(b"Host", b"x")] + [(b"Authorization", b"Bearer pre")] * ("token" not in odd)
    if "length" in odd or "chunks" not in odd:
        headers += part("length", [(b"Content-Length", b"%d" % len(body))], odd_lengths(len(body)))
    if "chunks" in odd:
        headers.append((b"Transfer-Encoding", draw(st.sampled_from(CODINGS))))
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
    if "other" in odd:
        headers += draw(st.lists(st.sampled_from(OTHERS), min_size=1, max_size=2))
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in draw(st.permutations(headers)))
    return method + b" " + target + b" " + version + b"\r\n" + lines + b"\r\n" + body


def post(*headers, target=b"/predict", body=IMAGE, length=True):
    lines = [b"Host: x", b"Authorization: Bearer pre", *headers]
    lines += [b"Content-Length: %d" % len(body)] if length else []
    return b"POST " + target + b" HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + body


@pytest.mark.slow  # for it waits for bodies that do not come
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@example(post())
@example(post(b"X-Request-Id: ", b"X-Request-Id: second"))
@example(post(b"Transfer-Encoding: chunked"))
@example(post(b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"))
@example(post(b"Expect: 100-continue"))
@example(post(target=b"/predict?tau=1&tau=1"))
@example(post(target=b"/predict?tau=1&t%61u=1"))
@example(post(b"Content-Length: 5"))
@given(requests())
def test_whatever_the_head_both_ways_answer_alike(ports, request_bytes):
    short, usual = (said(port, request_bytes + SENTINEL) for port in ports)
    assert short == usual
    assert all(" 500 " not in line for line, _, _ in short[0])
