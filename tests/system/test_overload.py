"""Twenty times more than the service can do: refused in order, told truthfully, and forgotten afterwards."""

import asyncio
import json
import os
import time
from collections import Counter

import pytest

from tests.system.crowd import Probes, answer, memory, metric, post
from tests.tiny import png

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("TEST_OVERLOAD_S") or 5)
# One worker, 0.2 s a batch of 16: 80 images a second, of which 16 may wait.
QUEUE = 16
PER_S = 80
TIMES = 20
CLIENTS = TIMES * QUEUE
# Between two requests of a client; a fifth less, for those that wait in the queue meanwhile.
PERIOD_S = CLIENTS / (TIMES * PER_S) / 1.2
MIB = 2**20


async def overload(port, image, process):
    """Ask from CLIENTS connections, TIMES PER_S requests a second; return all that came of it."""
    statuses, answered, retry_after, codes, memories = Counter(), [], [], set(), []
    until = time.monotonic() + SECONDS

    async def ask(number):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        # Every fourth has no patience for a queue.
        request = post(image, **({"X-Request-Timeout-Ms": 150} if number % 4 == 0 else {}))
        turn = time.monotonic() - PERIOD_S * number / CLIENTS
        while (turn := max(turn + PERIOD_S, time.monotonic())) < until:
            await asyncio.sleep(turn - time.monotonic())
            writer.write(request)
            status, head, body = await answer(reader)
            statuses[status] += 1
            if status == 200:
                answered.append(json.loads(body)["predictions"][0]["prediction_id"])
            else:
                codes.add((status, json.loads(body)["code"]))
            if status == 429:
                retry_after.append(int(head.split("retry-after: ")[1].split("\r\n")[0]))
        writer.close()

    async def weigh():
        while True:
            memories.append(memory(process))
            await asyncio.sleep(0.1)

    weighing = asyncio.ensure_future(weigh())
    async with Probes(port) as probes:
        await asyncio.gather(*(ask(number) for number in range(CLIENTS)))
    weighing.cancel()
    return statuses, answered, retry_after, codes, memories, probes


def test_twenty_times_the_load_is_refused_in_order_and_leaves_nothing_behind(service, pixels):
    fault = service.folder / "fault"
    client = service.start(
        module="tests.service.broken_engine",
        ENGINE_FAULT=str(fault),
        TARE_WORKERS="1",
        TARE_LONE_THREADS="1",
        TARE_QUEUE_IMAGES=str(QUEUE),
    )
    image = png(pixels)
    for _ in range(200):
        assert client.post("/predict", content=image).status_code == 200
    fault.write_text("slow")
    before = memory(service.process.pid)
    statuses, answered, retry_after, codes, memories, probes = asyncio.run(
        overload(service.port, image, service.process.pid)
    )

    assert set(statuses) == {200, 429, 504}, statuses
    assert codes == {(429, "queue-full"), (504, "deadline-exceeded")}
    assert all(1 <= seconds <= 60 for seconds in retry_after)
    # Sixteen images are gone in less than a second: it would be wrong to send anyone away for long.
    assert sorted(retry_after)[len(retry_after) // 2] <= 2
    assert set(probes.statuses) == {(path, 200, None) for path in ("/healthz", "/readyz", "/metrics")}
    assert max(probes.seconds) < 5
    assert max(memories) - before < 48 * MIB

    shown = client.get("/metrics").text
    while metric(shown, "tare_queue_images") + metric(shown, "tare_held_body_bytes"):
        shown = client.get("/metrics").text
    fault.write_text("")
    assert client.post("/predict", content=image).status_code == 200
    for identity in answered:
        assert client.get(f"/predictions/{identity}").status_code == 200
    # A deadline may pass while the commit is under way: kept, and not told.
    kept = client.get("/monitor").json()["predictions"] - 201
    assert len(answered) <= kept <= len(answered) + statuses[504]
    assert all("traceback" not in line for line in service.log())
    print(
        f"{SECONDS:g} s, {CLIENTS} connections, {statuses.total() / SECONDS:.0f} requests a second where "
        f"{PER_S} can be answered: {dict(statuses)}; median Retry-After "
        f"{sorted(retry_after)[len(retry_after) // 2]} s; {len(probes.seconds)} probes, p99 "
        f"{probes.p99_s() * 1000:.0f} ms; memory before {before / MIB:.1f}, peak {max(memories) / MIB:.1f}, "
        f"after {memory(service.process.pid) / MIB:.1f} MiB"
    )
