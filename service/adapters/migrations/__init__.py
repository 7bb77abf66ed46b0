"""How the state's tables came to be, one step a file; `upgrade` brings a database to the newest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import sqlalchemy
from sqlalchemy import column, select, table

from service.core.exceptions import StateTooNew

if TYPE_CHECKING:
    from sqlalchemy import Connection

HEAD: Final = "0002"
"""The newest step, written out so that a state that has it is opened without loading Alembic."""


def upgrade(connection: Connection) -> None:
    """Bring the tables to the newest version, inside the connection's transaction.

    Raises StateTooNew where they already are of a version that is not known here.
    """
    present = _present(connection)
    if present == HEAD:
        return
    from alembic import command  # noqa: PLC0415 - a fifth of a second, at the first start only
    from alembic.config import Config  # noqa: PLC0415
    from alembic.script import ScriptDirectory  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {step.revision for step in ScriptDirectory.from_config(config).walk_revisions()}
    if present is not None and present not in known:
        raise StateTooNew(
            f"The state is of version {present}, newer than this Tare's {HEAD}: "
            "start the newer Tare, or name another TARE_STATE_DIR."
        )
    command.upgrade(config, HEAD)


def _present(connection: Connection) -> str | None:
    """Return the version that Alembic left in the database, None for an empty one."""
    if not sqlalchemy.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(select(column("version_num")).select_from(table("alembic_version"))).scalar()
