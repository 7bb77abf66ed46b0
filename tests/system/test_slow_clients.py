"""Clients that send slowly, read slowly, stop half way or shut one side, against a real process."""

import asyncio
import json
import socket
import struct

import pytest

from tests.system.crowd import Probes, answer, asked, connections, get, memory, metric, post
from tests.tiny import png

pytestmark = pytest.mark.slow

LIMITS = {"TARE_HEAD_S": "0.5", "TARE_BODY_S": "1", "TARE_UNREAD_S": "1"}
MIB = 2**20
MANY = 200
DEAF = 50


@pytest.fixture
def limited(service):
    """A service with little patience."""
    service.start(**LIMITS)
    return service


def run(port, *scripts):
    """Run the scripts side by side while probes ask; return what they return."""

    async def main():
        async with Probes(port) as probes:
            results = await asyncio.wait_for(asyncio.gather(*scripts), 60)
            await asyncio.sleep(0.2)
        assert {status for _, status, _ in probes.statuses} == {200}
        return results

    return asyncio.run(main())


async def dribbled(port, request, *, whole=0):
    """Send a request, all but its first bytes one by one, until the other side has had enough."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request[:whole])
    answering = asyncio.ensure_future(answer(reader))
    for byte in request[whole:]:
        if answering.done():
            break
        writer.write(bytes([byte]))
        await asyncio.sleep(0.1)
    status, _, body = await answering
    # What is left of the request is not waited for: the connection ends, whatever goes on being sent.
    try:
        while True:
            writer.write(b"x")
            await writer.drain()
            if await asyncio.wait_for(reader.read(1), 0.1) == b"":
                break
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return status, json.loads(body)["code"]


def settled(service):
    """Wait until no body is held; return the metrics."""
    while True:
        shown = service.client.get("/metrics").text
        if not metric(shown, "tare_held_body_bytes") + metric(shown, "tare_queue_images"):
            return shown


def test_slow_heads_and_bodies_are_given_up_while_others_are_answered(limited, pixels):
    image = png(pixels)
    head = post(image)
    half = len(head) - len(image) + 10
    chunked = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 50
    feedback = post(b" " * 100, path="/feedback")
    outcomes = run(
        limited.port,
        *(dribbled(limited.port, head) for _ in range(MANY)),
        *(dribbled(limited.port, head, whole=half) for _ in range(MANY)),
        *(dribbled(limited.port, chunked, whole=70) for _ in range(20)),
        *(dribbled(limited.port, feedback, whole=len(feedback) - 90) for _ in range(20)),
    )
    assert outcomes[:MANY] == [(400, "malformed-request")] * MANY
    assert outcomes[MANY:] == [(400, "body-timeout")] * (MANY + 40)
    settled(limited)
    assert [line for line in limited.log() if "traceback" in line] == []


def test_answers_that_nobody_reads_cost_little_memory_and_their_connections_after_a_while(limited):
    limited.client.get("/openapi.json")
    before, idle = memory(limited.process.pid), connections(limited.process.pid)
    deaf = []
    for _ in range(DEAF):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", limited.port))
        sock.setblocking(False)
        try:
            while True:  # as many requests as it takes, and never a look at the answers
                sock.send(get("/openapi.json") * 100)
        except BlockingIOError:
            deaf.append(sock)
    peaks = []
    while connections(limited.process.pid) > idle:
        peaks.append(memory(limited.process.pid))
        assert limited.client.get("/healthz").status_code == 200
    for sock in deaf:
        sock.close()
    assert max(peaks) - before < DEAF * 2 * MIB
    assert [line for line in limited.log() if "traceback" in line] == []
    print(f"{DEAF} deaf clients: memory before {before / MIB:.1f}, peak {max(peaks) / MIB:.1f} MiB")


def test_a_client_that_shuts_its_side_is_answered_by_every_way(limited, pixels):
    image = png(pixels)

    async def half_closed(request):
        reader, writer = await asyncio.open_connection("127.0.0.1", limited.port)
        writer.write(request)
        writer.write_eof()
        everything = await reader.read()
        writer.close()
        return everything

    requests = [
        *(post(image) for _ in range(20)),
        *(post(image, path="/predict?model=tiny", Expect="100-continue") for _ in range(5)),
        *(post(b'{"logits": [[1, 2, 3, 4]]}', path="/adjust") for _ in range(5)),
        *(get("/models") * 3 for _ in range(5)),
    ]
    answers = run(limited.port, *(half_closed(request) for request in requests))
    assert [text.count(b"HTTP/1.1 200 ") for text in answers] == [1] * 30 + [3] * 5
    settled(limited)


def test_connections_aborted_anywhere_leave_nothing_behind(limited, pixels):
    """With a reset, in the middle of a head, of a body, of a form, and while the answer is made."""
    image = png(pixels)
    request = post(image)
    form = b'--b\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n' + image + b"\r\n--b--\r\n"
    multipart = post(form, **{"Content-Type": "multipart/form-data; boundary=b"})
    assert limited.client.post("/predict", content=image).status_code == 200
    idle, before = connections(limited.process.pid), memory(limited.process.pid)
    for _ in range(10):
        for cut in [*range(1, len(request), 40), len(request)]:
            abort(limited.port, request[:cut])
        for cut in [*range(1, len(multipart), 60), len(multipart)]:
            abort(limited.port, multipart[:cut])
    settled(limited)
    while connections(limited.process.pid) > idle:
        assert limited.client.get("/healthz").status_code == 200
    assert memory(limited.process.pid) - before < 30 * MIB
    assert limited.client.post("/predict", content=image).status_code == 200
    assert [line for line in limited.log() if "traceback" in line] == []


def abort(port, data):
    """Send this and reset the connection."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(data)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_thousands_of_requests_sent_ahead_are_answered_one_by_one_in_little_memory(limited):
    before = memory(limited.process.pid)

    async def piped():
        reader, writer = await asyncio.open_connection("127.0.0.1", limited.port)
        writer.write(get("/healthz") * 2000)
        for _ in range(2000):
            assert (await answer(reader))[0] == 200
        writer.close()

    run(limited.port, *(piped() for _ in range(3)))
    assert memory(limited.process.pid, "VmHWM") - before < 30 * MIB
    assert asyncio.run(asked(limited.port, get("/healthz")))[0] == 200
