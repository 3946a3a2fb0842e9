"""API keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("revoked_at", sa.Float),
        sa.Column("max_per_minute", sa.Integer),
        sa.Column("max_unfinished", sa.Integer),
    )
    op.create_index("keys_digest", "keys", ["digest"], unique=True)
    op.create_index("videos_owned_status", "videos", ["owner", "status"])
