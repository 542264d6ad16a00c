"""What the queue looks for in a job, and who answers for it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

COLUMNS = (
    sa.Column("kind", sa.String(), nullable=False, server_default=""),
    sa.Column("status", sa.String(), nullable=False, server_default=""),
    sa.Column("priority", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("lane", sa.String(), nullable=False, server_default="cpu"),
    sa.Column("cores", sa.Integer()),
    sa.Column("lease_token", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("lease_holder", sa.String()),
    sa.Column("lease_boot", sa.String()),
    sa.Column("lease_until", sa.Float(), nullable=False, server_default="0"),
)


def upgrade() -> None:
    for column in COLUMNS:
        op.add_column("jobs", column.copy())
    op.execute("UPDATE jobs SET kind = json_extract(document, '$.kind'), status = json_extract(document, '$.status')")
    op.create_index("ix_jobs_status", "jobs", ["status", "id"])


def downgrade() -> None:
    op.drop_index("ix_jobs_status", "jobs")
    for column in COLUMNS:
        op.drop_column("jobs", column.name)
