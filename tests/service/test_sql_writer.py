"""The writer: whose thread commits what, and that nothing waits for a thread that nobody wakes."""

import threading
import time
from contextlib import contextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from service.adapters.sql_writer import GROUP_ROWS, Writer
from service.adapters.sqlite_database import SqliteDatabase, execute
from service.core.exceptions import Unavailable

PATIENCE_S = 5  # less than the writer's thread sleeps when nobody wakes it


class Told:
    """What `then` heard, and on which thread."""

    def __init__(self):
        self.heard = threading.Event()
        self.thread = self.failure = None

    def __call__(self, _result, failure):
        self.thread, self.failure = threading.current_thread(), failure
        self.heard.set()

    def wait(self):
        assert self.heard.wait(PATIENCE_S)
        return self.thread


@pytest.fixture
def database(tmp_path):
    database = SqliteDatabase(tmp_path)
    with database.writer.begin() as connection:
        connection.execute(text("CREATE TABLE numbers (n INTEGER PRIMARY KEY)"))
    yield database
    database.close()


@pytest.fixture
def writer(database):
    writer = Writer(database, lambda _: False)
    yield writer
    writer.close()


def add(connection, numbers):
    for number in numbers:
        execute(connection, "INSERT INTO numbers VALUES (?)", (number,))
    return [None] * len(numbers)


def numbers_in(database):
    with database.reader.connect() as connection:
        return sorted(connection.execute(text("SELECT n FROM numbers")).scalars())


@contextmanager
def somebody_writing(writer):
    """Let a thread write until the block ends; yields that thread."""
    begun, go_on, told = threading.Event(), threading.Event(), Told()

    def slow(connection, numbers):
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return add(connection, numbers)

    def post():
        writer.post(slow, 0, told, durable=False, here=True, one_statement=True)

    thread = threading.Thread(target=post)
    thread.start()
    assert begun.wait(PATIENCE_S)
    try:
        yield thread
    finally:
        go_on.set()
        thread.join()
    assert told.wait() is thread


def test_a_thread_that_finds_nobody_writing_writes_itself(database, writer):
    told = Told()
    writer.post(add, 1, told, durable=False, here=True, one_statement=True)
    assert told.wait() is threading.current_thread()
    assert numbers_in(database) == [1]


def test_what_others_bring_meanwhile_is_written_by_the_thread_that_has_the_turn(database, writer):
    told = [Told() for _ in range(3)]
    with somebody_writing(writer) as thread:
        for number, one in enumerate(told, start=1):
            writer.post(add, number, one, durable=False, here=True, one_statement=True)
    assert [one.wait() for one in told] == [thread] * 3
    assert numbers_in(database) == [0, 1, 2, 3]


def test_what_must_be_synced_is_left_to_the_writers_own_thread(database, writer):
    first, along, synced = Told(), Told(), Told()
    with somebody_writing(writer) as thread:
        writer.post(add, 1, first, durable=True)
        while writer._jobs:  # its thread takes it, and waits for its turn
            time.sleep(0.001)
        writer.post(add, 2, along, durable=False, here=True)
        writer.post(add, 3, synced, durable=True)
    assert along.wait() is thread
    assert first.wait() is synced.wait() is writer._thread
    assert numbers_in(database) == [0, 1, 2, 3]


def test_such_a_thread_takes_one_group_along_and_wakes_the_writers_own_for_the_rest(database, writer):
    told = [Told() for _ in range(3)]
    with somebody_writing(writer) as thread:
        for number, one in enumerate(told, start=1):
            writer.post(add, number, one, durable=False, rows=GROUP_ROWS - 1, here=True)
    assert [one.wait() is thread for one in told] == [True, False, False]
    assert numbers_in(database) == [0, 1, 2, 3]


def test_a_statement_alone_that_fails_is_told_and_costs_nobody_else(database, writer):
    told = [Told() for _ in range(3)]
    for number, one in zip((5, 5, 6), told, strict=True):
        writer.post(add, number, one, durable=False, here=True, one_statement=True)
    assert [type(one.failure) for one in told] == [type(None), IntegrityError, type(None)]
    assert numbers_in(database) == [5, 6]


def test_work_of_several_statements_that_fails_leaves_none_of_them(database, writer):
    def twice(connection, numbers):
        return add(connection, [*numbers, *numbers])[:1]

    told = Told()
    writer.post(twice, 7, told, durable=False, here=True)
    assert isinstance(told.failure, IntegrityError)
    assert numbers_in(database) == []


def test_closing_writes_what_waits_and_refuses_what_comes(database):
    writer = Writer(database, lambda _: False)
    waiting, late = Told(), Told()
    with somebody_writing(writer):
        writer.post(add, 1, waiting, durable=False, here=True, one_statement=True)
        closing = threading.Thread(target=writer.close)
        closing.start()
    closing.join(PATIENCE_S)
    assert not closing.is_alive() and waiting.heard.is_set() and waiting.failure is None
    writer.post(add, 2, late, durable=False, here=True)
    assert isinstance(late.failure, Unavailable)
    assert numbers_in(database) == [0, 1]
