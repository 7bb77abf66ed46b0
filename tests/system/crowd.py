"""Many connections from one thread, and what the process behind them takes meanwhile."""

import asyncio
import contextlib
import json
import re
import time
from pathlib import Path


def post(body, path="/predict", **headers):
    """The bytes of a POST."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode() + body


def get(path):
    """The bytes of a GET."""
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


async def answer(reader):
    """Read one answer: its status, its head in lower case, its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    size = int(re.search(r"content-length: (\d+)", head)[1])
    return int(head.split(" ", 2)[1]), head, await reader.readexactly(size)


async def asked(port, request):
    """Ask one thing on a connection of its own: status, head, body and the seconds it took."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return *await answer(reader), time.perf_counter() - started
    finally:
        writer.close()


class Probes:
    """Asks health, readiness and metrics now and then, each on a new connection, and keeps what they said."""

    def __init__(self, port):
        self._port = port
        self.statuses = {}
        self.seconds = []

    async def __aenter__(self):
        self._task = asyncio.ensure_future(self._probe())
        return self

    async def __aexit__(self, *_):
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def p99_s(self):
        """The seconds that 99 of 100 probes took at most."""
        return sorted(self.seconds)[int(0.99 * len(self.seconds))]

    async def _probe(self):
        while True:
            for path in ("/healthz", "/readyz", "/metrics"):
                status, _, body, seconds = await asked(self._port, get(path))
                said = json.loads(body).get("code") if status != 200 else None
                self.statuses.setdefault((path, status, said), []).append(time.perf_counter())
                self.seconds.append(seconds)
            await asyncio.sleep(0.1)


def memory(process, entry="VmRSS"):
    """Bytes of a process's memory: `VmRSS` now, `VmHWM` at its highest."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(rf"{entry}:\s+(\d+) kB", status)[1]) * 1024


def connections(process):
    """How many sockets a process has open."""
    count = 0
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += str(entry.readlink()).startswith("socket:")
    return count


def metric(text, name):
    """The value of a metric without regard to its labels, summed."""
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.M))
