"""Thousands of idle connections beside working ones, and more of them than the process may have."""

import asyncio
import json
import os
import resource
import socket
import time
from pathlib import Path

import pytest

from tests.system.crowd import Probes, answer, asked, connections, get, memory, post
from tests.tiny import png

pytestmark = pytest.mark.slow

MANY = int(os.environ.get("TEST_CONNECTIONS") or 10_000)
SPARE = 500  # for files, and for connections that work
MIB = 2**20


@pytest.fixture
def many():
    """As many connections as may be had, if this process and the service may open so many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = MANY if hard == resource.RLIM_INFINITY else min(MANY, hard - SPARE)
    wanted = max(soft, count + SPARE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield count
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def latencies(port, image, requests=400):
    """Ask one after the other on a connection of its own: the seconds of each, sorted."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seconds = []
    for _ in range(requests):
        started = time.perf_counter()
        writer.write(post(image))
        status, _, body = await answer(reader)
        seconds.append(time.perf_counter() - started)
        assert status == 200, body
    writer.close()
    return sorted(seconds)


def test_idle_connections_cost_little_and_nobody_else_their_answer(service, pixels, many):
    service.start(TARE_HEAD_S="600")
    image, port, process = png(pixels), service.port, service.process.pid

    async def script():
        alone = await latencies(port, image)
        before = memory(process)
        idle = []
        for number in range(many):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            idle.append((reader, writer))
            if number % 2:  # every second has been of use before
                writer.write(get("/healthz"))
                assert (await answer(reader))[0] == 200
        held = memory(process)
        assert connections(process) > many
        async with Probes(port) as probes:
            beside = await latencies(port, image)
        assert {status for _, status, _ in probes.statuses} == {200}
        # They are all still there, and of use.
        for reader, writer in idle[::100]:
            writer.write(post(image))
            assert (await answer(reader))[0] == 200
        for _, writer in idle:
            writer.close()
        return alone, beside, before, held

    alone, beside, before, held = asyncio.run(script())
    while connections(process) > 50:
        time.sleep(0.05)
    assert (held - before) / many < 32 * 1024
    shown = ", ".join(
        f"{name} p50 {took[len(took) // 2] * 1000:.2f}, p99 {took[int(0.99 * len(took))] * 1000:.2f} ms"
        for name, took in (("one client alone:", alone), ("beside them:", beside))
    )
    print(
        f"{many} idle connections: {(held - before) / many / 1024:.1f} KiB each (memory {before / MIB:.1f}, "
        f"then {held / MIB:.1f} MiB); {shown}"
    )


def cpu_s(process):
    """Seconds of CPU time that a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_when_descriptors_run_out_nothing_spins_and_all_is_well_once_there_are_some(service, pixels):
    """The service keeps some for itself, so that those it has let in are served in full."""
    few = ["sh", "-c", 'ulimit -n 180 && exec "$@"', "sh"]  # 52 connections
    client = service.start(within=few, TARE_HEAD_S="600")
    image, process = png(pixels), service.process.pid
    assert client.get("/healthz").status_code == 200
    idle = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(51)]
    status, _, body, _ = asyncio.run(asked(service.port, get("/readyz")))
    assert (status, json.loads(body)["code"]) == (503, "too-many-connections")
    # So many at once that there is no descriptor to say so either: they are cut off.
    idle += [socket.create_connection(("127.0.0.1", service.port)) for _ in range(400)]
    before = cpu_s(process)
    time.sleep(2)
    assert cpu_s(process) - before < 1
    answered = client.post("/predict", content=image)
    assert answered.status_code == 200
    identity = answered.json()["predictions"][0]["prediction_id"]
    assert client.get(f"/predictions/{identity}").status_code == 200
    assert client.get("/readyz").status_code == 200
    assert client.put("/priors", json={"uniform": True}).status_code == 200
    for sock in idle:
        sock.close()
    while connections(process) > 20:
        time.sleep(0.05)
    assert asyncio.run(asked(service.port, get("/readyz")))[0] == 200
    assert [line for line in service.log() if "traceback" in line or line["level"] == "error"] == []
    assert "fewer connections are taken" in str(service.log())
