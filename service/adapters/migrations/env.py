"""What Alembic runs for every migration: on the connection that `upgrade` was given, in its transaction."""

from alembic import context

from service.adapters.sql_tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite alters a table by making it anew
)
context.run_migrations()
