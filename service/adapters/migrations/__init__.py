"""How the state's tables came to be, one step a file; `upgrade` brings a database to the newest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from service.core.exceptions import StateTooNew

if TYPE_CHECKING:
    from sqlalchemy import Connection


def upgrade(connection: Connection) -> None:
    """Bring the tables to the newest version, inside the connection's transaction.

    Raises StateTooNew where they already are of a version that is not known here.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    steps = ScriptDirectory.from_config(config)
    present = MigrationContext.configure(connection).get_current_revision()
    if present == steps.get_current_head():
        return
    if present is not None and present not in {step.revision for step in steps.walk_revisions()}:
        raise StateTooNew(
            f"The state is of version {present}, newer than this Tare's {steps.get_current_head()}: "
            "start the newer Tare, or name another TARE_STATE_DIR."
        )
    command.upgrade(config, "head")
