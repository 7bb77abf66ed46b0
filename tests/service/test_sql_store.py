"""The store on SQLite: the contract of every store, kills, full disks, a writer that lags, shared commits."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest

from service.adapters import sql_writer
from service.adapters.sql_store import SqlStore
from service.adapters.sqlite_database import SqliteDatabase
from service.core.exceptions import Overloaded, Unavailable
from tests.contracts.calls import Recorded, blocks, kept, run
from tests.contracts.store import StoreContract
from tests.recorded import START, item, model, prediction, prior
from tests.service.stores import opened, plain, pragma, wait_until

ROOT = Path(__file__).parents[2]


class TestSqliteKeepsTheContract(StoreContract):
    @pytest.fixture
    def store(self, tmp_path, clock):
        with opened(tmp_path / "state", clock) as store:
            yield store


# Durability


def test_labels_and_priors_are_synced_and_predictions_are_not(tmp_path, monkeypatch):
    told = []
    real = SqliteDatabase.set_durable

    def told_and_done(connection, durable):
        real(connection, durable)
        level = connection.connection.dbapi_connection.execute("PRAGMA synchronous").fetchone()[0]
        told.append((durable, level))

    monkeypatch.setattr(SqliteDatabase, "set_durable", staticmethod(told_and_done))
    full, normal = (True, 2), (False, 1)
    with opened(tmp_path) as store:
        made = prediction(model())
        run(store.register_model(model(), START))
        assert told == [full]
        run(store.record([made]))
        run(store.record([prediction(model())]))
        assert told == [full, normal]
        run(store.learn([item(made, 0)], START))
        assert told == [full, normal, full]
        run(store.record([prediction(model())]))
        run(store.add_prior(prior(), None))
        assert told == [full, normal, full, normal, full]


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_or_doubled_by_kill_nine(tmp_path):
    rng = random.Random(5)
    said: list[str] = []
    for _ in range(5):
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.service.killed_writer", str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        with child:
            first = child.stdout.readline()  # it has begun
            time.sleep(0.1 + rng.random() * 0.5)
            os.kill(child.pid, signal.SIGKILL)
            rest = child.stdout.read()
        lines = (first + rest).split("\n")
        said += [line.split() for line in lines[:-1]]  # the last one may be cut
        with opened(tmp_path) as store:
            check_acknowledged(store, said)
        assert pragma(tmp_path, "integrity_check") == "ok"
    kinds = Counter(line[0] for line in said)
    assert min(kinds["prediction"], kinds["label"], kinds["prior"]) > 20


def check_acknowledged(store, said):
    decided = {UUID(line[1]): int(line[2]) for line in said if line[0] == "prediction"}
    labelled = {UUID(line[1]): int(line[2]) for line in said if line[0] == "label"}
    for prediction_id, index in decided.items():
        found = run(store.prediction(prediction_id))
        assert found.prediction.decision.top[0].index == index
        if prediction_id in labelled:  # the label that was said, or the one after it
            labels = [one.index for one in found.labels]
            assert labels in ([0], [0, 1]) and len(labels) > labelled[prediction_id]
    assert run(store.traffic(model(), None, None)).sum() >= len(decided)
    for name in {line[1] for line in said if line[0] == "prior"}:
        newest = max(int(line[2]) for line in said if line[:2] == ["prior", name])
        versions = [one.version for one in run(store.prior_versions(prior().label_set, name))]
        assert versions == list(range(versions[0], 0, -1))  # each exactly once
        assert newest <= versions[0]


# Full and broken


def test_a_full_disk_is_unavailable_and_half_writes_nothing(tmp_path):
    tiny = model()
    with opened(tmp_path) as store:
        run(store.register_model(tiny, START))
        first = prediction(tiny)
        run(store.record([first]))
        raw = store._database.writer.raw_connection()
        limit = raw.execute("PRAGMA page_count").fetchone()[0] + 4
        raw.execute(f"PRAGMA max_page_count = {limit}").fetchone()
        acknowledged = 1
        with pytest.raises(Unavailable, match="full") as refused:
            for _ in range(100):
                run(store.record([prediction(tiny) for _ in range(10)]))
                acknowledged += 10
        assert refused.value.code == "store-unavailable"
        assert run(store.traffic(tiny, None, None)).sum() == acknowledged
        with pytest.raises(Unavailable):
            run(store.learn([item(first, 0)] * 1 + [item(first, n % 4) for n in range(3000)], START))
        assert run(store.prediction(first.id)).labels == ()
        raw.execute("PRAGMA max_page_count = 1000000").fetchone()
        run(store.record([prediction(tiny)]))
        assert run(store.learn([item(first, 0)], START)).accepted == 1
        run(store.check_writable())


def test_a_disk_that_takes_no_more_bytes_is_unavailable_until_it_does(tmp_path):
    code = """
import asyncio, resource, signal, sys
from pathlib import Path
from service.adapters.sql_store import SqlStore
from service.core.exceptions import Unavailable
from tests.recorded import START, TurnedClock, model, prediction

async def main():
    tiny, clock, acknowledged = model(), TurnedClock(), 0
    with SqlStore(Path(sys.argv[1]), keep_days=90, max_bytes=1 << 34, clock=clock) as store:
        await store.register_model(tiny, START)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
        try:
            while True:
                await store.record([prediction(tiny) for _ in range(50)])
                acknowledged += 50
        except Unavailable as refusal:
            print(refusal.code)
        try:
            for _ in range(200):  # each takes a little of the room that the failed write left
                clock.turn(seconds=1)
                await store.check_writable()
        except Unavailable:
            print("not writable")
        assert (await store.traffic(tiny, None, None)).sum() == acknowledged > 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        clock.turn(seconds=1)
        await store.check_writable()
        await store.record([prediction(tiny)])
        assert (await store.traffic(tiny, None, None)).sum() == acknowledged + 1

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
asyncio.run(main())
"""
    child = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines() == ["store-unavailable", "not writable"]


def test_a_writer_that_lags_refuses_what_it_cannot_keep_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sql_writer, "BACKLOG_BYTES", 5_000)
    tiny = model()
    with opened(tmp_path) as store:
        run(store.register_model(tiny, START))
        held = plain(tmp_path)
        held.execute("BEGIN IMMEDIATE")  # the writer has to wait

        async def pile_up() -> list[object]:
            work = [asyncio.ensure_future(store.record([prediction(tiny)])) for _ in range(100)]
            await asyncio.sleep(0.2)
            probe = asyncio.ensure_future(store.check_writable())  # a full queue is no broken store
            await asyncio.sleep(0.05)
            held.execute("ROLLBACK")
            return await asyncio.gather(*work, probe, return_exceptions=True)

        *outcomes, probe = run(pile_up())
        held.close()
        refused = [one for one in outcomes if isinstance(one, Overloaded)]
        assert {(one.code, one.retry_after_s) for one in refused} == {("store-behind", 1)}
        assert probe is None
        kept = outcomes.count(None)
        assert 0 < kept < 100 and kept + len(refused) == 100
        assert run(store.traffic(tiny, None, None)).sum() == kept
        run(store.record([prediction(tiny)]))


def test_predictions_that_were_admitted_are_kept_however_far_the_writer_lags(tmp_path, monkeypatch):
    monkeypatch.setattr(sql_writer, "BACKLOG_BYTES", 2_000)
    tiny = model()
    with opened(tmp_path) as store:
        run(store.register_model(tiny, START))
        held = plain(tmp_path)
        held.execute("BEGIN IMMEDIATE")  # the first to write waits, and so do all behind it
        told: list[Exception | None] = []
        threads = [
            threading.Thread(target=store.keep, args=([Recorded([prediction(tiny)])], told.append))
            for _ in range(30)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: store._writer._backlog_bytes > 2_000)
        with pytest.raises(Overloaded) as refused:
            store.check_room(1, 4)
        assert refused.value.code == "store-behind"
        held.execute("ROLLBACK")
        for thread in threads:
            thread.join()
        wait_until(lambda: len(told) == 30)
        held.close()
        assert told == [None] * 30
        store.check_room(1, 4)
        assert run(store.traffic(tiny, None, None)).sum() == 30


def test_a_store_that_is_closed_keeps_nothing_and_says_so(tmp_path):
    tiny = model()
    with opened(tmp_path) as store:
        run(store.register_model(tiny, START))
    assert isinstance(kept(store, [Recorded([prediction(tiny)])]), Unavailable)


def test_a_store_that_cannot_write_in_time_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("service.adapters.sql_store._PROBE_PATIENCE_S", 0.1)
    with opened(tmp_path) as store:
        held = plain(tmp_path)
        held.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match="within"):
            run(store.check_writable())
        held.execute("ROLLBACK")
        held.close()
        run(store.check_writable())


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_file_that_was_taken_away_is_unavailable_and_takes_nothing_more(tmp_path, how):
    tiny = model()
    with opened(tmp_path) as store:
        run(store.register_model(tiny, START))
        for file in tmp_path.glob("tare.db*"):
            file.rename(tmp_path / f"old-{file.name}")
        if how == "replaced":
            (tmp_path / "tare.db").touch()
        time.sleep(0.15)  # it looks ten times a second
        with pytest.raises(Unavailable, match="moved or deleted"):
            run(store.record([prediction(tiny)]))
        with pytest.raises(Unavailable):
            run(store.check_writable())


def test_the_thread_outlives_chores_that_fail(tmp_path, busy_chores, monkeypatch):
    failed = []

    def fail(self, connection):
        failed.append(connection.begin())
        raise RuntimeError("no such luck")

    monkeypatch.setattr("service.adapters.retention.Retention.__call__", fail)
    with opened(tmp_path) as store:
        wait_until(lambda: len(failed) > 2)
        run(store.check_writable())


def test_many_callers_share_commits(tmp_path):
    tiny = model()
    with opened(tmp_path) as store:
        run(store.register_model(tiny, START))
        made = [prediction(tiny, START, i % 4) for i in range(400)]

        async def all_at_once() -> None:
            await asyncio.gather(*(store.record([one]) for one in made))
            await asyncio.gather(*(store.learn([item(one, 1)], START) for one in made))

        run(all_at_once())
        assert run(store.traffic(tiny, None, None)).tolist() == [100] * 4
        (block,) = run(blocks(store.labelled(tiny, None, None, with_logits=False)))
        assert block.labels.tolist() == [1] * 400


def test_what_waits_is_written_before_the_store_closes(tmp_path):
    tiny = model()

    async def leave(store: SqlStore) -> None:
        work = [asyncio.ensure_future(store.record([prediction(tiny)])) for _ in range(300)]
        await asyncio.sleep(0)
        store.close()
        await asyncio.gather(*work)

    store = opened(tmp_path)
    run(store.register_model(tiny, START))
    run(leave(store))
    with opened(tmp_path) as store:
        assert run(store.traffic(tiny, None, None)).sum() == 300


def test_float16_keeps_the_decision_of_nearly_all_rows():
    logits = np.random.default_rng(3).normal(0, 6, (20_000, 100)).astype(np.float32)
    changed = (logits.argmax(axis=1) != logits.astype(np.float16).argmax(axis=1)).mean()
    assert changed < 0.003
