"""Retention: what is past its time goes, and where space is short the oldest unlabelled go first."""

from __future__ import annotations

import sqlite3
from datetime import timedelta

from sqlalchemy.exc import OperationalError

from tests.contracts.calls import blocks, run
from tests.recorded import START, TurnedClock, item, model, prediction
from tests.service.stores import opened, plain, pragma, wait_until


def test_predictions_past_their_time_go_with_their_labels(tmp_path, busy_chores):
    clock, tiny = TurnedClock(), model()
    with opened(tmp_path, clock, keep_days=2) as store:
        run(store.register_model(tiny, START))
        old = [prediction(tiny, START + timedelta(seconds=i)) for i in range(700)]
        new = [prediction(tiny, START + timedelta(days=1, seconds=i)) for i in range(50)]
        run(store.record(old + new))
        run(store.learn([item(one, 0) for one in (*old[:300], *new[:20])], START))
        clock.turn(days=2, hours=1)
        wait_until(lambda: run(store.traffic(tiny, None, None)).sum() == 50)
        (block,) = run(blocks(store.labelled(tiny, None, None, with_logits=False)))
        assert len(block.labels) == 20
        assert run(store.prediction(old[0].id)) is None
        assert run(store.prediction(new[0].id)).labels[0].index == 0
    connection = plain(tmp_path)
    assert connection.execute("SELECT count(*) FROM label_history").fetchone() == (20,)
    connection.close()


def test_space_is_made_by_the_oldest_unlabelled_first_and_the_file_shrinks(tmp_path, busy_chores):
    wide = model(labels=tuple(f"class-{i}" for i in range(500)))
    with opened(tmp_path) as store:
        run(store.register_model(wide, START))
        made = [prediction(wide, START + timedelta(seconds=i)) for i in range(3000)]
        for start in range(0, 3000, 500):
            run(store.record(made[start : start + 500]))
        run(store.learn([item(one, 0) for one in made[:400]], START))
    full = (tmp_path / "tare.db").stat().st_size
    with opened(tmp_path, max_bytes=full // 2) as store:
        wait_until(lambda: full // 2 - pragma(tmp_path, "page_count") * pragma(tmp_path, "page_size") > 0)
        left = run(store.traffic(wide, None, None)).sum()
        assert 1000 < left < 2000
        (block,) = run(blocks(store.labelled(wide, None, None, with_logits=False)))
        assert len(block.labels) == 400
        assert run(store.prediction(made[400].id)) is None
        assert run(store.prediction(made[-1].id)) is not None
    assert (tmp_path / "tare.db").stat().st_size <= full // 2


def test_where_only_labelled_predictions_are_left_the_oldest_of_them_make_space(tmp_path, busy_chores):
    tiny = model()
    with opened(tmp_path) as store:
        run(store.register_model(tiny, START))
        made = [prediction(tiny, START + timedelta(seconds=i)) for i in range(3000)]
        run(store.record(made))
        run(store.learn([item(one, 0) for one in made], START))
    full = (tmp_path / "tare.db").stat().st_size
    with opened(tmp_path, max_bytes=full // 2) as store:
        wait_until(lambda: pragma(tmp_path, "page_count") * pragma(tmp_path, "page_size") <= full // 2)
        assert run(store.prediction(made[0].id)) is None
        assert run(store.prediction(made[-1].id)) is not None
        assert 500 < run(store.traffic(tiny, None, None)).sum() < 2500


def test_a_bound_that_nothing_can_meet_leaves_the_store_working(tmp_path, busy_chores):
    tiny = model()
    with opened(tmp_path, max_bytes=1) as store:
        run(store.register_model(tiny, START))
        run(store.record([prediction(tiny)]))
        wait_until(lambda: run(store.traffic(tiny, None, None)).sum() == 0)
        run(store.check_writable())


def test_a_full_disk_is_told_in_one_line_without_a_trace(tmp_path, busy_chores, monkeypatch, caplog):
    def fail(self, connection):
        raise OperationalError("DELETE", {}, sqlite3.OperationalError("database or disk is full"))

    monkeypatch.setattr("service.adapters.retention.Retention.__call__", fail)
    with opened(tmp_path):
        wait_until(lambda: len(caplog.records) > 1)
    for record in caplog.records:
        assert record.getMessage().endswith("will be tried again: database or disk is full")
        assert not record.exc_info
