"""The batcher: idle it runs at once, busy it gathers in turn; full it refuses, stopped it drains."""

from __future__ import annotations

import asyncio

import pytest

from service.core.exceptions import Overloaded, Unavailable
from tests.service.batching import Doubler, ask, batching, held, queued, refusal, submit


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
