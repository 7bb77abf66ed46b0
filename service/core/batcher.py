"""Gathers the items of many callers into batches for a few threads, so that none waits for company.

An idle thread takes what is there at once; while all are busy the queue grows, and the next to be free takes
its share of it, first come first served. Nothing here knows what an item is.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from service.core.exceptions import Overloaded, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Answer = TypeVar("Answer")

_LONGEST_RETRY_S: Final = 60
_MEMORY: Final = 0.8  # weight of the past in the seconds an item takes


@dataclass(frozen=True)
class Capacity:
    """How many threads work, the most they take at once, and the most that may wait, in items and bytes."""

    workers: int = 2
    largest_batch: int = 16
    queue_items: int = 1024
    queue_bytes: int = 256 * 1024 * 1024


@dataclass(frozen=True)
class BatchReport:
    """What became of one batch: its items, how many failed, and where the time went.

    `waited_s` is the longest wait in the queue; preparing is per item, running is the batch as a whole.
    """

    items: int
    failed: int
    waited_s: float
    prepare_s: float
    run_s: float


class Batcher(Generic[Item, Prepared, Answer]):
    """Works from construction on; stop it to end its threads.

    `prepare` takes one item and may fail for that item alone. `run` takes the prepared items of a batch and
    returns as many answers in their order (none is None); an exception among them is that item's failure,
    one that is raised the whole batch's. Both are called on worker threads.
    """

    def __init__(
        self,
        prepare: Callable[[Item], Prepared],
        run: Callable[[Sequence[Prepared]], Sequence[Answer | Exception]],
        capacity: Capacity,
        *,
        name: str = "batcher",
        listen: Callable[[BatchReport], None] | None = None,
    ) -> None:
        """`listen` hears of every batch, on the thread that ran it; it must not raise."""
        self._prepare = prepare
        self._run = run
        self._capacity = capacity
        self._listen = listen
        self._changed = threading.Condition()
        self._queue: deque[_Entry[Item, Answer]] = deque()
        self._queue_bytes = 0
        self._stopping = False
        self._seconds_an_item = 0.0
        self._open: set[_Request[Answer]] = set()  # the loop's thread alone touches it
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(capacity.workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued_items(self) -> int:
        """Items that wait, those in work not counted."""
        return len(self._queue)

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait, as their callers declared them."""
        return self._queue_bytes

    @property
    def alive(self) -> bool:
        """Whether every worker is there to take a batch."""
        return all(thread.is_alive() for thread in self._threads)

    async def submit(self, items: Sequence[Item], sizes: Sequence[int]) -> list[Answer]:
        """Return the answers to `items`, in order; `sizes` are their bytes.

        The items are one request: all are answered or it fails, with the failure of its first bad item. They
        share batches with other requests. A caller that is cancelled takes what still waits with it.
        Raises Overloaded when the queue is full, Unavailable when stopping, else what prepare or run raised.
        """
        if not items:
            return []
        request: _Request[Answer] = _Request(asyncio.get_running_loop().create_future(), len(items))
        self._admit(request, items, sizes)
        self._open.add(request)
        try:
            return await request.future
        except asyncio.CancelledError:
            self._withdraw(request)
            raise
        finally:
            self._open.discard(request)

    async def stop(self, grace_s: float = 30) -> None:
        """Take nothing more, answer what waits, end the threads; refuse what is left after the grace."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        await asyncio.to_thread(self._join, time.monotonic() + grace_s)
        for request in tuple(self._open):
            if not request.future.done():
                request.future.set_exception(_stopping())
                self._withdraw(request)

    def _join(self, deadline: float) -> None:
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))

    def _admit(self, request: _Request[Answer], items: Sequence[Item], sizes: Sequence[int]) -> None:
        """Queue a whole request or refuse it; an empty queue takes any."""
        now = time.perf_counter()
        entries = [
            _Entry(request, position, item, size, now)
            for position, (item, size) in enumerate(zip(items, sizes, strict=True))
        ]
        total = sum(sizes)
        with self._changed:
            if self._stopping:
                raise _stopping()
            if self._queue and (
                len(self._queue) + len(items) > self._capacity.queue_items
                or self._queue_bytes + total > self._capacity.queue_bytes
            ):
                seconds = self._retry_after_s()
                raise Overloaded(
                    "queue-full", f"The queue is full; try again in {seconds} s.", retry_after_s=seconds
                )
            self._queue_bytes += total
            self._queue.extend(entries)
            self._changed.notify(min(len(items), self._capacity.workers))

    def _retry_after_s(self) -> int:
        """Return the seconds in which what waits now is likely done, at the rate of the last batches."""
        seconds = len(self._queue) * self._seconds_an_item / self._capacity.workers
        return min(_LONGEST_RETRY_S, max(1, math.ceil(seconds)))

    def _withdraw(self, request: _Request[Answer], after: int = -1) -> None:
        """Take a request's items behind position `after` out of the queue."""
        with self._changed:
            kept: deque[_Entry[Item, Answer]] = deque()
            for entry in self._queue:
                if entry.request is request and entry.position > after:
                    self._queue_bytes -= entry.size
                    request.pending -= 1
                else:
                    kept.append(entry)
            self._queue = kept

    def _work(self) -> None:
        while batch := self._take():
            self._answer(batch)

    def _take(self) -> list[_Entry[Item, Answer]]:
        """Wait for items and take this worker's share; nothing once all is answered after a stop."""
        with self._changed:
            while not self._queue and not self._stopping:
                self._changed.wait()
            share = math.ceil(len(self._queue) / self._capacity.workers)
            batch = [self._queue.popleft() for _ in range(min(share, self._capacity.largest_batch))]
            self._queue_bytes -= sum(entry.size for entry in batch)
        return batch

    def _answer(self, batch: list[_Entry[Item, Answer]]) -> None:
        started = time.perf_counter()
        outcomes: list[Answer | Exception | None] = [None] * len(batch)
        prepared: list[Prepared] = []
        places: list[int] = []
        lost: set[int] = set()  # requests that failed in this batch already
        for place, entry in enumerate(batch):
            if entry.request.future.done() or id(entry.request) in lost:
                continue  # nobody waits for it
            try:
                prepared.append(self._prepare(entry.item))
                places.append(place)
            except Exception as failure:  # noqa: BLE001 - one bad item must not cost the others their answer
                outcomes[place] = failure
                lost.add(id(entry.request))
        ready = time.perf_counter()
        if prepared:
            try:
                answers = list(zip(places, self._run(prepared), strict=True))
            except Exception as failure:  # noqa: BLE001 - one bad batch must not end the worker
                answers = [(place, failure) for place in places]
            for place, answer in answers:
                outcomes[place] = answer
        done = time.perf_counter()
        seconds = (done - started) / len(batch)
        past = self._seconds_an_item or seconds
        self._seconds_an_item = _MEMORY * past + (1 - _MEMORY) * seconds
        loop = batch[0].request.future.get_loop()
        if not loop.is_closed():  # a loop that is gone has taken its callers along
            loop.call_soon_threadsafe(self._settle, batch, outcomes)
        if self._listen is not None:
            failed = sum(isinstance(outcome, Exception) for outcome in outcomes)
            waited = started - batch[0].arrived
            self._listen(BatchReport(len(batch), failed, waited, ready - started, done - ready))

    def _settle(self, batch: list[_Entry[Item, Answer]], outcomes: list[Answer | Exception | None]) -> None:
        """Hand outcomes to their requests, on the loop's thread; a request is done with its last item."""
        for entry, outcome in zip(batch, outcomes, strict=True):
            request = entry.request
            request.pending -= 1
            if isinstance(outcome, Exception):
                if request.failure is None or entry.position < request.failure[0]:
                    request.failure = (entry.position, outcome)
                    self._withdraw(request, after=entry.position)
            elif outcome is not None:  # None: skipped, for the request is cancelled or has failed
                request.answers[entry.position] = outcome
            if not request.pending and not request.future.done():
                request.resolve()


def _stopping() -> Unavailable:
    return Unavailable("stopping", "The service is stopping; try again in a few seconds.")


class _Request(Generic[Answer]):
    """The items of one caller: `pending` are those not settled, `failure` the first bad one's."""

    def __init__(self, future: asyncio.Future[list[Answer]], items: int) -> None:
        self.future = future
        self.pending = items
        self.answers: dict[int, Answer] = {}
        self.failure: tuple[int, Exception] | None = None

    def resolve(self) -> None:
        """Answer the caller."""
        if self.failure is not None:
            self.future.set_exception(self.failure[1])
        else:
            self.future.set_result([answer for _, answer in sorted(self.answers.items())])


@dataclass(frozen=True, eq=False)
class _Entry(Generic[Item, Answer]):
    """An item in the queue, with the place it has in its request and the time it came."""

    request: _Request[Answer]
    position: int
    item: Item
    size: int
    arrived: float
