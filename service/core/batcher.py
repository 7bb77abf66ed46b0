"""Gathers the items of many callers into batches for a few threads, so that none waits for company.

An idle thread takes its share of what is there at once; while all are busy the queue grows, and the next to
be free takes from it, one item from each request in turn. Nothing here knows what an item is.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from service.core.drain import Drain
from service.core.exceptions import Overloaded, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Capacity:
    """How many threads work, the most they take at once, and the most that may wait, in items and bytes."""

    workers: int = 2
    largest_batch: int = 16
    queue_items: int = 1024
    queue_bytes: int = 256 * 1024 * 1024


@dataclass(frozen=True)
class BatchReport:
    """What became of one batch: its items, those of them that failed or were dropped, and its run's time."""

    items: int
    failed: int
    dropped: int
    run_s: float


class Ticket(Generic[Item, Answer]):
    """One request on its way through a batcher: its items, then their answers or the failure of the first.

    Of `items` there is at least one; `sizes` are their bytes. `to` is told once, on the thread that finished
    it, together with others of the same `to`, unless the ticket was dropped before.

    The times are `time.perf_counter` of the batch that completed it: when that batch left the queue, when it
    was prepared, when it had run.
    """

    __slots__ = (
        "answers",
        "arrived",
        "dropped",
        "failure",
        "items",
        "next",
        "pending",
        "prepared",
        "ran",
        "sizes",
        "taken",
        "to",
    )

    def __init__(
        self, items: Sequence[Item], sizes: Sequence[int], to: Callable[[Sequence[Any]], None]
    ) -> None:
        self.items = items
        self.sizes = sizes
        self.to = to
        self.next = 0  # the first item that still waits
        self.pending = len(items)
        self.answers: list[Answer | None] = [None] * len(items)
        self.failure: tuple[int, Exception] | None = None
        self.dropped = False
        self.arrived = self.taken = self.prepared = self.ran = time.perf_counter()


class Batcher(Generic[Item, Prepared, Answer]):
    """Works from construction on; stop it to end its threads.

    `prepare` takes one item and may fail for that item alone. `run` takes the prepared items of a batch, and
    whether nothing else is in work or waits; it returns as many answers in their order (none is None). An
    exception among them is that item's failure, one that is raised the whole batch's. Both are called on
    worker threads.
    """

    def __init__(
        self,
        prepare: Callable[[Item], Prepared],
        run: Callable[[Sequence[Prepared], bool], Sequence[Answer | Exception]],
        capacity: Capacity,
        *,
        name: str = "batcher",
        listen: Callable[[BatchReport], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`listen` hears of every batch, on the thread that ran it; it must not raise."""
        self._prepare = prepare
        self._run = run
        self._capacity = capacity
        self._listen = listen
        self._changed = threading.Condition(threading.Lock())
        self._ring: OrderedDict[Ticket[Item, Answer], None] = OrderedDict()  # those with items that wait
        self._open: set[Ticket[Item, Answer]] = set()
        self._queued_items = 0
        self._queued_bytes = 0
        self._busy = 0
        self._stopping = False
        self._drain = Drain(clock)
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(capacity.workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued_items(self) -> int:
        """Items that wait, those in work not counted."""
        return self._queued_items

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait, as their callers declared them."""
        return self._queued_bytes

    @property
    def alive(self) -> bool:
        """Whether every worker is there to take a batch."""
        return all(thread.is_alive() for thread in self._threads)

    def admit(self, ticket: Ticket[Item, Answer]) -> None:
        """Queue a request whole, or refuse it; an empty queue takes any.

        All its items are answered or it fails, with the failure of the first bad one. They share batches with
        those of others, each request in its turn, so that one with many does not hold up one with few.
        Raises Overloaded when the queue is full, Unavailable when stopping.
        """
        total, count = sum(ticket.sizes), len(ticket.items)
        with self._changed:
            if self._stopping:
                raise _stopping()
            if not self._ring:
                self._drain.begins()
            elif (
                self._queued_items + count > self._capacity.queue_items
                or self._queued_bytes + total > self._capacity.queue_bytes
            ):
                seconds = self._drain.retry_after_s(self._queued_items)
                raise Overloaded(
                    "queue-full", f"The queue is full; try again in {seconds} s.", retry_after_s=seconds
                )
            self._queued_items += count
            self._queued_bytes += total
            self._ring[ticket] = None
            self._open.add(ticket)
            self._changed.notify(count)

    def drop(self, ticket: Ticket[Item, Answer]) -> None:
        """Take back what still waits of a request: nobody waits for it, and nobody will be told of it."""
        with self._changed:
            ticket.dropped = True
            self._open.discard(ticket)
            self._withdraw(ticket)

    def stop(self, grace_s: float = 30) -> None:
        """Take nothing more, answer what waits, end the threads; refuse what is left after the grace."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        deadline = time.monotonic() + grace_s
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))
        with self._changed:
            left = list(self._open)
            for ticket in left:
                ticket.failure = (0, _stopping())
                ticket.dropped = True  # a batch that comes back later has nobody to tell
                self._withdraw(ticket)
            self._open.clear()
        _tell(left)

    def _withdraw(self, ticket: Ticket[Item, Answer]) -> None:
        """Take a request's waiting items out of the queue. Under the lock."""
        if self._ring.pop(ticket, self) is self:
            return
        left = len(ticket.items) - ticket.next
        self._queued_items -= left
        self._queued_bytes -= sum(ticket.sizes[ticket.next :])
        ticket.pending -= left

    def _work(self) -> None:
        while batch := self._take():
            self._answer(*batch)

    def _take(self) -> tuple[list[_Entry[Item, Answer]], bool] | None:
        """Wait for items and take this worker's share; nothing once all is answered after a stop."""
        with self._changed:
            while not self._ring:
                if self._stopping:
                    return None
                self._changed.wait()
            # Shared with idle workers: what is left to a busy one would wait.
            share = math.ceil(self._queued_items / (self._capacity.workers - self._busy))
            batch = [self._next() for _ in range(min(share, self._capacity.largest_batch))]
            self._drain.left(len(batch))
            self._busy += 1
            return batch, self._busy == 1 and len(batch) == 1 and not self._ring

    def _next(self) -> _Entry[Item, Answer]:
        """Take one item of the request whose turn it is, which goes behind the others if it has more."""
        ticket, _ = self._ring.popitem(last=False)
        position = ticket.next
        ticket.next += 1
        self._queued_items -= 1
        self._queued_bytes -= ticket.sizes[position]
        if ticket.next < len(ticket.items):
            self._ring[ticket] = None
        return ticket, position

    def _answer(self, batch: list[_Entry[Item, Answer]], alone: bool) -> None:
        taken = time.perf_counter()
        outcomes: list[Answer | Exception | None] = [None] * len(batch)  # None: nobody waits for it
        prepared: list[Prepared] = []
        places: list[int] = []
        lost: set[Ticket[Item, Answer]] = set()  # requests that failed in this batch already
        for place, (ticket, position) in enumerate(batch):
            if ticket.dropped or ticket in lost:
                continue
            if ticket.failure is not None and ticket.failure[0] < position:
                continue  # what comes before a failure may hold the one to be told
            try:
                prepared.append(self._prepare(ticket.items[position]))
                places.append(place)
            except Exception as failure:  # noqa: BLE001 - one bad item must not cost the others their answer
                outcomes[place] = failure
                lost.add(ticket)
        ready = time.perf_counter()
        if prepared:
            try:
                answers = list(zip(places, self._run(prepared, alone), strict=True))
            except Exception as failure:  # noqa: BLE001 - one bad batch must not end the worker
                answers = [(place, failure) for place in places]
            for place, answer in answers:
                outcomes[place] = answer
        done = time.perf_counter()
        finished = self._settle(batch, outcomes)
        for ticket in finished:
            ticket.taken, ticket.prepared, ticket.ran = taken, ready, done
        _tell(finished)
        if self._listen is not None:
            failed = sum(isinstance(outcome, Exception) for outcome in outcomes)
            self._listen(BatchReport(len(batch), failed, outcomes.count(None), done - ready))

    def _settle(
        self, batch: list[_Entry[Item, Answer]], outcomes: list[Answer | Exception | None]
    ) -> list[Ticket[Item, Answer]]:
        """Hand outcomes to their requests; return those that are finished and still waited for."""
        finished = []
        with self._changed:
            self._busy -= 1
            for (ticket, position), outcome in zip(batch, outcomes, strict=True):
                ticket.pending -= 1
                if isinstance(outcome, Exception):
                    if ticket.failure is None or position < ticket.failure[0]:
                        ticket.failure = (position, outcome)
                    self._withdraw(ticket)
                else:
                    ticket.answers[position] = outcome
                if not ticket.pending and not ticket.dropped:
                    self._open.discard(ticket)
                    finished.append(ticket)
        return finished


_Entry = tuple[Ticket[Item, Answer], int]


def _tell(finished: Sequence[Ticket[Any, Any]]) -> None:
    """Tell whoever asked, once for all the requests of theirs that a batch has finished."""
    for to, tickets in groupby(finished, key=attrgetter("to")):
        to(list(tickets))


def _stopping() -> Unavailable:
    return Unavailable("stopping", "The service is stopping; try again in a few seconds.")
