"""The batcher: idle it runs at once, busy it gathers, full it refuses, and a failure stays where it arose."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import asynccontextmanager

import pytest

from service.core.batcher import Batcher, Capacity
from service.core.exceptions import Overloaded, Unavailable


class Doubler:
    """Doubles numbers; a closed gate holds every batch on its worker, negative numbers are bad items."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.prepared: list[int] = []
        self.batches: list[list[int]] = []

    def prepare(self, item):
        self.prepared.append(item)
        if item < 0:
            raise ValueError(f"{item} is negative")
        return item

    def run(self, items):
        self.batches.append(list(items))
        self.entered.release()
        assert self.gate.wait(30)
        if 13 in items:
            raise RuntimeError("thirteen")
        return [LookupError("seventeen") if item == 17 else 2 * item for item in items]


@asynccontextmanager
async def batching(doubler, workers=1, largest=16, items=100, size=10_000, listen=None):
    batcher = Batcher(doubler.prepare, doubler.run, Capacity(workers, largest, items, size), listen=listen)
    try:
        yield batcher
    finally:
        doubler.gate.set()
        await batcher.stop(30)


def ask(batcher, *items, size=1):
    return asyncio.ensure_future(batcher.submit(items, [size] * len(items)))


async def held(doubler, batcher, *items):
    """Close the gate and bring one worker to it, with these items."""
    doubler.gate.clear()
    task = ask(batcher, *items)
    await asyncio.to_thread(doubler.entered.acquire)
    return task


async def queued(batcher, n):
    while batcher.queued_items != n:
        await asyncio.sleep(0.001)


def test_a_lone_item_is_run_at_once_and_alone():
    async def main():
        doubler = Doubler()
        async with batching(doubler) as batcher:
            assert await batcher.submit([4], [1]) == [8]
        assert doubler.batches == [[4]]

    asyncio.run(main())


def test_what_comes_while_the_worker_is_busy_makes_one_batch_in_order_of_arrival():
    async def main():
        doubler = Doubler()
        async with batching(doubler) as batcher:
            first = await held(doubler, batcher, 1)
            later = [ask(batcher, 2, 3), ask(batcher, 4), ask(batcher, 5)]
            await queued(batcher, 4)
            doubler.gate.set()
            assert await first == [2]
            assert await asyncio.gather(*later) == [[4, 6], [8], [10]]
        assert doubler.batches == [[1], [2, 3, 4, 5]]

    asyncio.run(main())


def test_a_worker_takes_its_share_and_never_more_than_the_largest_batch():
    async def main():
        doubler = Doubler()
        async with batching(doubler, workers=2, largest=8) as batcher:
            first = await held(doubler, batcher, 100)
            second = ask(batcher, 200)
            await asyncio.to_thread(doubler.entered.acquire)
            later = ask(batcher, *range(1, 11))
            many = ask(batcher, *range(20, 50))
            await queued(batcher, 40)
            doubler.gate.set()
            assert len((await asyncio.gather(first, second, later, many))[3]) == 30
        sizes = [len(batch) for batch in doubler.batches]
        assert max(sizes) == 8
        assert sizes[-1] == 1  # half of what is there, and so on down to the last

    asyncio.run(main())


@pytest.mark.parametrize(("items", "size"), [(3, 10_000), (100, 3)])
def test_a_full_queue_refuses_and_says_when_to_come_back(items, size):
    async def main():
        doubler = Doubler()
        async with batching(doubler, items=items, size=size) as batcher:
            first = await held(doubler, batcher, 1)
            waiting = ask(batcher, 2, 3)
            await queued(batcher, 2)
            with pytest.raises(Overloaded) as refused:
                await batcher.submit([4, 5], [1, 1])
            assert refused.value.code == "queue-full"
            assert 1 <= refused.value.retry_after_s <= 60
            last = ask(batcher, 6)  # what fits is taken still
            await queued(batcher, 3)
            assert batcher.queued_bytes == 3
            doubler.gate.set()
            assert await asyncio.gather(first, waiting, last) == [[2], [4, 6], [12]]
            assert batcher.queued_bytes == 0

    asyncio.run(main())


def test_an_empty_queue_takes_a_request_of_any_size():
    async def main():
        doubler = Doubler()
        async with batching(doubler, items=2, size=2) as batcher:
            assert await batcher.submit(range(1, 10), [5] * 9) == [2 * item for item in range(1, 10)]

    asyncio.run(main())


def test_a_request_without_items_is_answered_without_a_batch():
    async def main():
        doubler = Doubler()
        async with batching(doubler) as batcher:
            assert await batcher.submit([], []) == []
        assert doubler.batches == []

    asyncio.run(main())


def test_a_cancelled_caller_leaves_the_queue_and_costs_no_work():
    async def main():
        doubler = Doubler()
        async with batching(doubler, items=4) as batcher:
            first = await held(doubler, batcher, 1)
            gone, stays = ask(batcher, 2, 3, 4), ask(batcher, 5)
            await queued(batcher, 4)
            gone.cancel()
            await queued(batcher, 1)
            assert batcher.queued_bytes == 1
            last = ask(batcher, 6, 7, 8)  # its room is free again
            await queued(batcher, 4)
            doubler.gate.set()
            assert await asyncio.gather(first, stays, last) == [[2], [10], [12, 14, 16]]
            assert gone.cancelled()
        assert doubler.prepared == [1, 5, 6, 7, 8]

    asyncio.run(main())


def test_a_bad_item_fails_its_own_request_and_no_other_in_the_batch():
    async def main():
        doubler = Doubler()
        async with batching(doubler) as batcher:
            first = await held(doubler, batcher, 1)
            bad, good = ask(batcher, 2, -3, -4), ask(batcher, 5)
            await queued(batcher, 4)
            doubler.gate.set()
            assert await first == [2]
            assert await good == [10]
            with pytest.raises(ValueError, match="-3 is negative"):
                await bad
        assert -4 not in doubler.prepared

    asyncio.run(main())


def test_an_answer_that_is_an_exception_fails_its_own_request():
    async def main():
        doubler = Doubler()
        async with batching(doubler) as batcher:
            first = await held(doubler, batcher, 1)
            bad, good = ask(batcher, 17), ask(batcher, 5)
            await queued(batcher, 2)
            doubler.gate.set()
            assert await asyncio.gather(first, good) == [[2], [10]]
            with pytest.raises(LookupError, match="seventeen"):
                await bad

    asyncio.run(main())


def test_a_failed_batch_fails_whoever_was_in_it_and_the_worker_goes_on():
    async def main():
        doubler = Doubler()
        async with batching(doubler) as batcher:
            first = await held(doubler, batcher, 1)
            lost = [ask(batcher, 13), ask(batcher, 5)]
            await queued(batcher, 2)
            doubler.gate.set()
            await first
            for task in lost:
                with pytest.raises(RuntimeError, match="thirteen"):
                    await task
            assert await batcher.submit([6], [1]) == [12]
            assert batcher.alive

    asyncio.run(main())


def test_the_failure_told_is_that_of_the_first_bad_item_whatever_thread_finds_it():
    async def main():
        doubler = Doubler()
        async with batching(doubler, workers=4, largest=2) as batcher:
            for _ in range(50):
                with pytest.raises(ValueError, match="-7 is negative"):
                    await batcher.submit([1, 2, 3, 4, 5, 6, -7, 8, 9, -10, 11, -12], [1] * 12)
            assert (batcher.queued_items, batcher.queued_bytes) == (0, 0)

    asyncio.run(main())


def test_everyone_gets_their_own_answers_while_others_fail_and_leave():
    async def main():
        doubler, rng = Doubler(), random.Random(11)
        async with batching(doubler, workers=3, largest=5, items=10_000) as batcher:

            async def caller(number):
                items = [rng.choice([-1, 13, *range(100, 200)]) for _ in range(rng.randint(1, 7))]
                if rng.random() < 0.2:
                    with pytest.raises(TimeoutError):
                        async with asyncio.timeout(0):
                            await batcher.submit(items, [1] * len(items))
                    return
                await asyncio.sleep(rng.random() / 100)
                try:
                    answers = await batcher.submit(items, [1] * len(items))
                except ValueError:
                    assert -1 in items
                except RuntimeError:
                    pass  # someone's thirteen was in the batch
                else:
                    assert answers == [2 * item for item in items]

            await asyncio.gather(*(caller(number) for number in range(300)))
            assert (batcher.queued_items, batcher.queued_bytes) == (0, 0)
        assert max(len(batch) for batch in doubler.batches) <= 5

    asyncio.run(main())


def test_stopping_answers_what_waits_and_refuses_what_comes():
    async def main():
        doubler = Doubler()
        async with batching(doubler) as batcher:
            first = await held(doubler, batcher, 1)
            waiting = ask(batcher, 2, 3)
            await queued(batcher, 2)
            stop = asyncio.ensure_future(batcher.stop())
            await asyncio.sleep(0)
            with pytest.raises(Unavailable) as refused:
                await batcher.submit([4], [1])
            assert refused.value.code == "stopping"
            doubler.gate.set()
            await stop
            assert await asyncio.gather(first, waiting) == [[2], [4, 6]]
            assert not batcher.alive

    asyncio.run(main())


def test_stopping_does_not_wait_for_a_worker_that_hangs_beyond_its_grace():
    async def main():
        doubler = Doubler()
        async with batching(doubler) as batcher:
            hangs = await held(doubler, batcher, 1)
            waits = ask(batcher, 2)
            await queued(batcher, 1)
            await batcher.stop(grace_s=0.05)
            for task in (hangs, waits):
                with pytest.raises(Unavailable):
                    await task
            assert batcher.queued_items == 0

    asyncio.run(main())


def test_the_retry_time_grows_with_the_queue_and_the_time_an_item_takes():
    async def main():
        doubler = Doubler()
        async with batching(doubler, items=50) as batcher:
            first = await held(doubler, batcher, 1)
            waiting = [ask(batcher, 2) for _ in range(50)]
            await queued(batcher, 50)
            batcher._seconds_an_item = 0.1
            with pytest.raises(Overloaded) as refused:
                await batcher.submit([3], [1])
            assert refused.value.retry_after_s == 5
            batcher._seconds_an_item = 100
            with pytest.raises(Overloaded) as refused:
                await batcher.submit([3], [1])
            assert refused.value.retry_after_s == 60
            doubler.gate.set()
            await asyncio.gather(first, *waiting)

    asyncio.run(main())


def test_each_batch_is_reported_with_its_failures():
    async def main():
        doubler, reports = Doubler(), []
        async with batching(doubler, listen=reports.append) as batcher:
            first = await held(doubler, batcher, 1)
            others = [ask(batcher, 2), ask(batcher, -3), ask(batcher, 17)]
            await queued(batcher, 3)
            doubler.gate.set()
            await asyncio.gather(first, *others, return_exceptions=True)
        assert [(report.items, report.failed) for report in reports] == [(1, 0), (3, 2)]
        assert all(min(report.waited_s, report.prepare_s, report.run_s) >= 0 for report in reports)

    asyncio.run(main())
