"""Run by Alembic, with the connection that `Database.migrate` hands it: inside its transaction and under its lock."""

from __future__ import annotations

from alembic import context

from nvila.recordings.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=connection.dialect.name == "sqlite")
with context.begin_transaction():
    context.run_migrations()
