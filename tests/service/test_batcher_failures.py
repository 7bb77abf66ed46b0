"""What fails in a batch fails for its own request, is told once, and is counted."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

from service.core.batcher import Batcher, Capacity
from tests.service.batching import Doubler, ask, batching, held, queued, submit


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
            assert await submit(batcher, [6], [1]) == [12]
            assert batcher.alive

    asyncio.run(main())


def test_the_failure_told_is_that_of_the_first_bad_item_whatever_thread_finds_it():
    async def main():
        doubler = Doubler()
        async with batching(doubler, workers=4, largest=2) as batcher:
            for _ in range(50):
                with pytest.raises(ValueError, match="-7 is negative"):
                    await submit(batcher, [1, 2, 3, 4, 5, 6, -7, 8, 9, -10, 11, -12], [1] * 12)
            assert (batcher.queued_items, batcher.queued_bytes) == (0, 0)

    asyncio.run(main())


def test_a_later_bad_item_that_fails_first_does_not_hide_the_one_before_it():
    held, gate, failed = threading.Semaphore(0), threading.Event(), threading.Event()

    def prepare(item):
        if item == "hold":
            held.release()
            assert gate.wait(30)
        elif item == "wait":
            assert failed.wait(30)
        else:
            raise ValueError(item)
        return item

    def hear(report):
        if report.failed:
            failed.set()

    async def main():
        capacity = Capacity(workers=2, largest_batch=2)
        batcher = Batcher(prepare, lambda items, alone: items, capacity, listen=hear)
        workers = [ask(batcher, "hold") for _ in range(2)]
        for _ in workers:
            await asyncio.to_thread(held.acquire)
        # One worker takes `wait` and `first`, the other `second`, which fails while the first one waits.
        wait, bad = ask(batcher, "wait"), ask(batcher, "first", "second")
        await queued(batcher, 3)
        gate.set()
        with pytest.raises(ValueError, match="first"):
            await bad
        await asyncio.gather(wait, *workers)
        await asyncio.to_thread(batcher.stop)

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
                            await submit(batcher, items, [1] * len(items))
                    return
                await asyncio.sleep(rng.random() / 100)
                try:
                    answers = await submit(batcher, items, [1] * len(items))
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


def test_each_batch_is_reported_with_its_failures():
    async def main():
        doubler, reports = Doubler(), []
        async with batching(doubler, listen=reports.append) as batcher:
            first = await held(doubler, batcher, 1)
            others = [ask(batcher, 2), ask(batcher, -3), ask(batcher, 17)]
            await queued(batcher, 3)
            doubler.gate.set()
            await asyncio.gather(first, *others, return_exceptions=True)
        counted = [(report.items, report.failed, report.dropped) for report in reports]
        assert counted == [(1, 0, 0), (3, 2, 0)]
        assert all(report.run_s >= 0 for report in reports)

    asyncio.run(main())
