"""A batcher under test: work that a test can hold, and requests that it can wait for."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest

from service.core.batcher import Batcher, Capacity, Ticket
from service.core.exceptions import Overloaded


class Gate:
    """Open, closed, or letting so many through."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = True
        self._passes = 0

    def set(self):
        self._change(True, 0)

    def clear(self):
        self._change(False, 0)

    def let(self, passes):
        self._change(False, passes)

    def _change(self, is_open, passes):
        with self._changed:
            self._open, self._passes = is_open, passes
            self._changed.notify_all()

    def wait(self, timeout):
        with self._changed:
            passed = self._changed.wait_for(lambda: self._open or self._passes, timeout)
            self._passes = max(0, self._passes - 1)
            return passed


class Doubler:
    """Doubles numbers; a closed gate holds every batch on its worker, negative numbers are bad items."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.entered = threading.Semaphore(0)
        self.prepared: list[int] = []
        self.batches: list[list[int]] = []
        self.alone: list[bool] = []

    def prepare(self, item):
        self.prepared.append(item)
        if item < 0:
            raise ValueError(f"{item} is negative")
        return item

    def run(self, items, alone):
        self.alone.append(alone)
        self.batches.append(list(items))
        self.entered.release()
        assert self.gate.wait(30)
        if 13 in items:
            raise RuntimeError("thirteen")
        return [LookupError("seventeen") if item == 17 else 2 * item for item in items]


@asynccontextmanager
async def batching(doubler, workers=1, largest=16, items=100, size=10_000, **options):
    batcher = Batcher(doubler.prepare, doubler.run, Capacity(workers, largest, items, size), **options)
    try:
        yield batcher
    finally:
        doubler.gate.set()
        await asyncio.to_thread(batcher.stop, 30)


async def submit(batcher, items, sizes):
    """Return the answers, or raise the failure; whoever is cancelled drops the request."""
    future = asyncio.get_running_loop().create_future()

    def tell(tickets):
        for ticket in tickets:
            ticket.future.get_loop().call_soon_threadsafe(settle, ticket)

    def settle(ticket):
        if ticket.future.done():
            return
        if ticket.failure is not None:
            ticket.future.set_exception(ticket.failure[1])
        else:
            ticket.future.set_result(ticket.answers)

    ticket = Awaited(list(items), sizes, tell)
    ticket.future = future
    batcher.admit(ticket)
    try:
        return await future
    except asyncio.CancelledError:
        batcher.drop(ticket)
        raise


class Awaited(Ticket):
    """A ticket with room for a future."""


def ask(batcher, *items, size=1):
    return asyncio.ensure_future(submit(batcher, items, [size] * len(items)))


async def held(doubler, batcher, *items):
    """Close the gate and bring one worker to it, with these items."""
    doubler.gate.clear()
    task = ask(batcher, *items)
    await asyncio.to_thread(doubler.entered.acquire)
    return task


async def queued(batcher, n):
    async with asyncio.timeout(10):
        while batcher.queued_items != n:
            await asyncio.sleep(0.001)


async def refusal(batcher):
    with pytest.raises(Overloaded) as refused:
        await submit(batcher, [3], [1])
    return refused.value.retry_after_s
