"""Alembic runs inside the process that opens the database, on the connection that it is given."""

from __future__ import annotations

from alembic import context

from lorasmith.store.database import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
