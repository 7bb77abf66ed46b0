"""The batcher: idle it runs at once, busy it gathers, full it refuses, and a failure stays where it arose."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import asynccontextmanager

import pytest

from service.core.batcher import Batcher, Capacity, Ticket
from service.core.exceptions import Overloaded, Unavailable


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


def test_a_lone_item_is_run_at_once_and_alone():
    async def main():
        doubler = Doubler()
        async with batching(doubler) as batcher:
            assert await submit(batcher, [4], [1]) == [8]
        assert doubler.batches == [[4]]

    asyncio.run(main())


def test_what_comes_while_the_worker_is_busy_makes_one_batch_with_an_item_of_each_request_in_turn():
    async def main():
        doubler = Doubler()
        async with batching(doubler) as batcher:
            first = await held(doubler, batcher, 1)
            later = [ask(batcher, 2, 3), ask(batcher, 4), ask(batcher, 5)]
            await queued(batcher, 4)
            doubler.gate.set()
            assert await first == [2]
            assert await asyncio.gather(*later) == [[4, 6], [8], [10]]
        assert doubler.batches == [[1], [2, 4, 5, 3]]

    asyncio.run(main())


def test_idle_workers_share_what_waits_and_take_no_more_than_the_largest_batch():
    async def main():
        doubler = Doubler()
        async with batching(doubler, workers=2, largest=8) as batcher:
            doubler.gate.clear()
            shared = ask(batcher, *range(6))
            for _ in range(2):
                await asyncio.to_thread(doubler.entered.acquire)
            later = ask(batcher, *range(20, 60))
            await queued(batcher, 40)
            doubler.gate.set()
            await asyncio.gather(shared, later)
        sizes = [len(batch) for batch in doubler.batches]
        assert sizes[:2] == [3, 3]
        assert max(sizes) == 8

    asyncio.run(main())


def test_nothing_is_left_to_a_worker_that_is_busy():
    async def main():
        doubler = Doubler()
        async with batching(doubler, workers=2, largest=8) as batcher:
            first = await held(doubler, batcher, 100)
            rest = ask(batcher, *range(6))
            await asyncio.to_thread(doubler.entered.acquire)
            doubler.gate.set()
            await asyncio.gather(first, rest)
        assert [len(batch) for batch in doubler.batches] == [1, 6]

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
                await submit(batcher, [4, 5], [1, 1])
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
            assert await submit(batcher, range(1, 10), [5] * 9) == [2 * item for item in range(1, 10)]

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


def test_a_request_of_many_items_takes_turns_with_those_of_few():
    async def main():
        doubler = Doubler()
        async with batching(doubler, largest=4) as batcher:
            first = await held(doubler, batcher, 1)
            many = ask(batcher, *range(100, 112))
            few = [ask(batcher, number) for number in (2, 3, 4)]
            await queued(batcher, 15)
            doubler.gate.set()
            await asyncio.gather(first, many, *few)
            assert many.result() == [2 * item for item in range(100, 112)]
        assert doubler.batches == [
            [1],
            [100, 2, 3, 4],
            *([*range(at, at + 4)] for at in (101, 105)),
            [109, 110, 111],
        ]

    asyncio.run(main())


def test_two_requests_of_many_items_share_every_batch():
    async def main():
        doubler = Doubler()
        async with batching(doubler, largest=4) as batcher:
            first = await held(doubler, batcher, 1)
            one, other = ask(batcher, *range(30, 34)), ask(batcher, *range(20, 24))
            await queued(batcher, 8)
            doubler.gate.set()
            assert await asyncio.gather(first, one, other) == [[2], [60, 62, 64, 66], [40, 42, 44, 46]]
        assert doubler.batches == [[1], [30, 20, 31, 21], [32, 22, 33, 23]]

    asyncio.run(main())


def test_only_a_single_item_with_nothing_beside_it_is_run_alone():
    async def main():
        doubler = Doubler()
        async with batching(doubler, workers=2) as batcher:
            first = await held(doubler, batcher, 1)
            second = ask(batcher, 2)
            await asyncio.to_thread(doubler.entered.acquire)
            doubler.gate.set()
            await asyncio.gather(first, second)
            await submit(batcher, [3], [1])
        assert doubler.alone == [True, False, True]

    asyncio.run(main())


def test_what_was_dropped_while_it_ran_is_not_told_and_leaves_nothing_behind():
    async def main():
        doubler, reports = Doubler(), []
        async with batching(doubler, largest=1, listen=reports.append) as batcher:
            gone = await held(doubler, batcher, 1, 2, 3)
            stays = ask(batcher, 4)
            await queued(batcher, 3)
            gone.cancel()
            await queued(batcher, 1)
            doubler.gate.set()
            assert await stays == [8]
            assert (batcher.queued_items, batcher.queued_bytes, batcher._open) == (0, 0, set())
        assert doubler.batches == [[1], [4]]

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


def test_stopping_answers_what_waits_and_refuses_what_comes():
    async def main():
        doubler = Doubler()
        async with batching(doubler) as batcher:
            first = await held(doubler, batcher, 1)
            waiting = ask(batcher, 2, 3)
            await queued(batcher, 2)
            stop = asyncio.ensure_future(asyncio.to_thread(batcher.stop))
            while not batcher._stopping:
                await asyncio.sleep(0.001)
            with pytest.raises(Unavailable) as refused:
                await submit(batcher, [4], [1])
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
            await asyncio.to_thread(batcher.stop, 0.05)
            for task in (hangs, waits):
                with pytest.raises(Unavailable):
                    await task
            assert batcher.queued_items == 0

    asyncio.run(main())


def test_the_retry_time_is_what_waits_at_the_rate_at_which_it_has_been_leaving():
    async def main():
        doubler, now = Doubler(), [100.0]
        async with batching(doubler, items=60, largest=4, clock=lambda: now[0]) as batcher:
            first = await held(doubler, batcher, 1)
            waiting = [ask(batcher, 2) for _ in range(60)]
            await queued(batcher, 60)
            now[0] += 2  # nothing has left in two seconds
            assert await refusal(batcher) == 2
            doubler.gate.let(1)
            await queued(batcher, 56)  # and now four have
            waiting.append(ask(batcher, *range(20, 24)))
            await queued(batcher, 60)
            assert await refusal(batcher) == 30
            now[0] += 1000
            assert await refusal(batcher) == 60
            doubler.gate.set()
            await asyncio.gather(first, *waiting)

    asyncio.run(main())


async def refusal(batcher):
    with pytest.raises(Overloaded) as refused:
        await submit(batcher, [3], [1])
    return refused.value.retry_after_s


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
