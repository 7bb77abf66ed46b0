"""Predictions that nobody waits for any longer, that are not taken at all, and where the time went."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest

from service.core.batcher import Capacity
from service.core.exceptions import DeadlineExceeded, Overloaded
from tests.service.predicting import IMAGES, Heard, serving


@asynccontextmanager
async def held_up(folder, monkeypatch, **options):
    """A predictor whose engine waits at a gate; yields an asker, the gate and the parts."""
    gate, entered = threading.Event(), threading.Semaphore(0)
    capacity = Capacity(workers=1, largest_batch=1, queue_items=3)
    async with serving(folder, capacity=capacity, **options) as (predictor, model, store):
        real = model.engine.run

        def slow(*arguments, **options):
            entered.release()
            assert gate.wait(30)
            return real(*arguments, **options)

        monkeypatch.setattr(model.engine, "run", slow)
        adjustment = predictor.adjustment_for(model)

        def ask(images=1, deadline_s=None):
            work = predictor.predict(
                IMAGES[:images], model=model, adjustment=adjustment, top_k=1, deadline_s=deadline_s
            )
            return asyncio.ensure_future(work)

        running = ask()
        await asyncio.to_thread(entered.acquire)
        try:
            yield ask, running, gate, model, store
        finally:
            gate.set()


def test_a_deadline_fires_while_a_batch_runs_and_takes_what_waits_out_of_the_queue(tmp_path, monkeypatch):
    async def main():
        heard = Heard()
        async with held_up(tmp_path, monkeypatch, observer=heard) as (ask, running, gate, model, store):
            late = ask(images=3, deadline_s=0.05)
            with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
                await late  # the batch before it still runs
            assert not running.done()
            assert (model.batcher.queued_items, model.batcher.queued_bytes) == (0, 0)
            assert heard.given_up == ["deadline"]
            gate.set()
            await running
            assert len(store.kept) == 1
            assert len(heard.answered) == 1

    asyncio.run(main())


def test_what_is_past_its_deadline_when_its_batch_ends_is_not_kept(tmp_path, monkeypatch):
    async def main():
        async with held_up(tmp_path, monkeypatch, deadline_s=0.05) as (ask, running, gate, _, store):
            with pytest.raises(DeadlineExceeded):
                await running
            gate.set()
            assert len(await ask(deadline_s=30)) == 1
            assert len(store.kept) == 1

    asyncio.run(main())


def test_a_client_that_leaves_takes_its_images_out_of_the_queue(tmp_path, monkeypatch):
    async def main():
        heard = Heard()
        async with held_up(tmp_path, monkeypatch, observer=heard) as (ask, running, gate, model, store):
            leaving = ask(images=3)
            while model.batcher.queued_items != 3:
                await asyncio.sleep(0.001)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert model.batcher.queued_items == 0
            assert heard.given_up == ["client-left"]
            gate.set()
            await running
            assert len(store.kept) == 1

    asyncio.run(main())


def test_a_full_queue_and_a_store_that_is_behind_are_refused_before_any_work(tmp_path, monkeypatch):
    async def main():
        heard = Heard()
        async with held_up(tmp_path, monkeypatch, observer=heard) as (ask, running, gate, model, store):
            waiting = ask(images=2)
            while model.batcher.queued_items != 2:
                await asyncio.sleep(0.001)
            with pytest.raises(Overloaded) as refused:
                await ask(images=2)
            assert refused.value.code == "queue-full"
            store.full = True
            with pytest.raises(Overloaded) as refused:
                await ask()
            assert refused.value.code == "store-behind"
            assert heard.refused == ["queue-full", "store-behind"]
            gate.set()
            await asyncio.gather(running, waiting)  # what was taken is answered, and kept
            assert len(store.kept) == 3

    asyncio.run(main())


def test_the_stages_of_a_request_make_up_its_time(tmp_path):
    async def main():
        async with serving(tmp_path) as (predictor, model, _):
            asked = {"model": model, "adjustment": predictor.adjustment_for(model), "top_k": 1}
            shaped, stages = await predictor.ask(IMAGES[:3], shape=len, **asked)
            assert shaped == 3
            *parts, total = stages
            assert min(parts) >= 0
            assert sum(parts) == pytest.approx(total)

    asyncio.run(main())
