"""What /readyz and the metrics say while parts fail and recover."""

import asyncio

import pytest

from service.core.exceptions import Unavailable
from service.core.readiness import Readiness


class Parts:
    """Models and a store whose failures the test commands, and an observer that remembers."""

    def __init__(self):
        self.failure = None
        self.seen = []

    def get(self, name):
        assert name is None
        return self

    async def check(self):
        if self.failure == "engine":
            raise Unavailable("engine-failed", "The engine failed.")

    async def check_writable(self):
        if self.failure == "store":
            raise Unavailable("store-unavailable", "The disk is full.")

    def looked_ready(self, ready):
        self.seen.append(ready)


@pytest.mark.parametrize("failure", ["engine", "store"])
def test_what_fails_is_said_and_logged_once_and_so_is_its_recovery(failure, caplog):
    caplog.set_level("INFO")
    parts = Parts()
    readiness = Readiness(parts, parts, parts)

    async def story():
        await readiness.check()
        parts.failure = failure
        for _ in range(3):
            with pytest.raises(Unavailable):
                await readiness.check()
        parts.failure = None
        await readiness.check()
        await readiness.check()

    asyncio.run(story())
    assert parts.seen == [True, False, False, False, True, True]
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


def test_the_watch_goes_on_looking_after_a_failure():
    parts = Parts()
    parts.failure = "store"
    readiness = Readiness(parts, parts, parts)

    async def story():
        watch = asyncio.create_task(readiness.watch(every_s=0.001))
        while len(parts.seen) < 3:
            await asyncio.sleep(0.001)
        parts.failure = None
        while True not in parts.seen:
            await asyncio.sleep(0.001)
        watch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watch

    asyncio.run(story())
