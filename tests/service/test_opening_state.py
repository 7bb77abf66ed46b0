"""Opening a state folder: who may, what of another version is brought up, what is refused in one line."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from service.adapters import migrations
from service.adapters.sql_tables import metadata
from service.adapters.sqlite_database import SqliteDatabase
from service.core.exceptions import StateLocked, StateTooNew, StateUnusable
from tests.contracts.calls import run
from tests.recorded import START, model, prediction
from tests.service.stores import opened, plain, pragma

ROOT = Path(__file__).parents[2]


def test_what_was_written_is_there_after_a_restart(tmp_path):
    made = prediction(model())
    with opened(tmp_path) as store:
        run(store.register_model(model(), START))
        run(store.record([made]))
    with opened(tmp_path) as store:
        assert run(store.prediction(made.id)) is not None
        run(store.record([prediction(model())]))  # known without being registered again
        assert run(store.traffic(model(), None, None)).sum() == 2


def test_a_second_service_on_the_same_state_is_refused_with_one_line(tmp_path):
    with opened(tmp_path), pytest.raises(StateLocked) as refused:
        opened(tmp_path)
    assert str(os.getpid()) in str(refused.value) and "\n" not in str(refused.value)
    opened(tmp_path).close()


def test_a_file_of_a_newer_version_is_refused_and_left_as_it_is(tmp_path):
    opened(tmp_path).close()
    connection = plain(tmp_path)
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(StateTooNew, match="9999") as refused:
        opened(tmp_path)
    assert "\n" not in str(refused.value)
    with pytest.raises(StateTooNew):  # the lock is free again
        opened(tmp_path)


def test_a_file_that_is_no_database_is_refused_with_one_line(tmp_path):
    (tmp_path / "tare.db").write_bytes(b"no database at all " * 1000)
    with pytest.raises(StateUnusable, match="not a database") as refused:
        opened(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_folder_that_cannot_be_made_is_refused_with_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateUnusable, match="Not a directory"):
        opened(tmp_path / "file" / "state")


def test_migrations_from_nothing_give_the_tables_of_the_code(tmp_path):
    database = SqliteDatabase(tmp_path)
    try:
        with database.writer.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, metadata) == []
            names = {row[0] for row in connection.exec_driver_sql("SELECT name FROM sqlite_master")}
    finally:
        database.close()
    indices = {index.name for table in metadata.tables.values() for index in table.indexes}
    assert indices <= names


def test_a_state_of_the_first_version_is_brought_up_with_all_that_is_in_it(tmp_path):
    made = prediction(model(), logits=np.array([3.0, 1, 2, 0]))
    with opened(tmp_path) as store:
        run(store.register_model(model(), START))
        run(store.record([made]))
    lowered = np.array([0, -10, -65504, -65504], dtype="<f2")  # how version 0001 kept logits of 1.9e6
    with sqlite3.connect(tmp_path / "tare.db") as old:
        old.execute("ALTER TABLE model_versions DROP COLUMN weight_normalisation")
        old.execute("UPDATE alembic_version SET version_num = '0001'")
        old.execute("UPDATE predictions SET logits = ?", (lowered.tobytes(),))
    old.close()
    with opened(tmp_path) as store:
        (version,) = run(store.model_versions("tiny"))
        assert version.weight_normalisation is None and version.labels == model().labels
        found = run(store.prediction(made.id))
        assert found.prediction.decision.top == made.decision.top
        np.testing.assert_array_equal(found.prediction.decision.logits, lowered.astype(np.float32))


def test_the_newest_migration_is_the_one_that_the_code_names():
    steps = ScriptDirectory(Path(migrations.__file__).parent)
    assert steps.get_heads() == [migrations.HEAD]


def test_a_state_that_is_up_to_date_is_opened_without_alembic(tmp_path):
    opened(tmp_path).close()
    code = (
        "import sys; from pathlib import Path; from service.adapters.sqlite_database import SqliteDatabase; "
        "SqliteDatabase(Path(sys.argv[1])).close(); sys.exit('alembic' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)


def test_the_file_is_in_wal_mode_and_can_shrink_step_by_step(tmp_path):
    opened(tmp_path).close()
    assert pragma(tmp_path, "journal_mode") == "wal"
    assert pragma(tmp_path, "auto_vacuum") == 2
