"""Prediction ids: version 7, rising, and true about their time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import RFC_4122, UUID, uuid4

from service.core.ids import IdMaker, time_of

NOW = datetime(2026, 11, 24, 12, 30, 15, 123_999, tzinfo=UTC)


def test_an_id_is_a_uuid_of_version_7_that_holds_its_time_to_the_millisecond():
    made = IdMaker()(NOW)
    assert (made.version, made.variant) == (7, RFC_4122)
    assert time_of(made) == NOW.replace(microsecond=123_000)
    assert UUID(str(made)) == made


def test_the_layout_is_the_example_of_rfc_9562():
    example = UUID("017F22E2-79B0-7CC3-98C4-DC0C0C07398F")  # appendix A.6
    assert time_of(example) == datetime(2022, 2, 22, 19, 22, 22, tzinfo=UTC)
    assert time_of(IdMaker()(datetime(2022, 2, 22, 19, 22, 22, tzinfo=UTC))) == time_of(example)


def test_ids_of_one_millisecond_rise_in_the_order_they_are_made():
    new_id = IdMaker()
    made = [new_id(NOW) for _ in range(20_000)]
    assert made == sorted(set(made))
    assert {time_of(one) for one in made} == {NOW.replace(microsecond=123_000)}
    assert {one.version for one in made} == {7}


def test_ids_of_later_milliseconds_sort_behind():
    new_id = IdMaker()
    made = [new_id(NOW + timedelta(milliseconds=i)) for i in range(1000)]
    assert made == sorted(made)


def test_a_clock_set_back_gives_ids_of_the_time_it_says():
    new_id = IdMaker()
    first = new_id(NOW)
    earlier = new_id(NOW - timedelta(hours=1))
    assert time_of(earlier) == NOW.replace(microsecond=123_000) - timedelta(hours=1)
    assert time_of(new_id(NOW)) == time_of(first)


def test_two_makers_do_not_meet():
    a, b = IdMaker(), IdMaker()
    assert not {a(NOW) for _ in range(1000)} & {b(NOW) for _ in range(1000)}


def test_threads_never_get_the_same_id():
    new_id = IdMaker()
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: new_id(datetime.now(UTC)), range(5000)))
    assert len(set(made)) == 5000


def test_the_time_is_close_to_now():
    assert abs(time_of(IdMaker()(datetime.now(UTC))).timestamp() - time.time()) < 60


def test_ids_of_other_versions_hold_no_time_and_the_latest_of_all_none_that_can_be_said():
    assert time_of(uuid4()) is None
    assert time_of(UUID("ffffffff-ffff-7fff-bfff-ffffffffffff")) is None
