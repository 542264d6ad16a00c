"""Datasets, jobs, adapters, models and evaluations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

TABLES = ("datasets", "jobs", "adapters", "models", "evaluations")


def upgrade() -> None:
    for table in TABLES:
        op.create_table(
            table,
            sa.Column("id", sa.String(), primary_key=True),
            sa.Column("name", sa.String(), nullable=False),
            sa.Column("document", sa.String(), nullable=False),
        )
        op.create_index(f"ix_{table}_name", table, ["name"])


def downgrade() -> None:
    for table in TABLES:
        op.drop_table(table)
