"""Owners, priorities, deletion, and idempotency keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    for column in (
        sa.Column("owner", sa.String(64)),
        sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
        sa.Column("work", sa.Float, nullable=False, server_default="0"),
        sa.Column("started_at", sa.Float),
        sa.Column("deleted_at", sa.Float),
    ):
        op.add_column("videos", column)
    op.drop_index("videos_queue", "videos")
    op.create_index("videos_queue", "videos", ["status", "priority", "created_at", "id"])
    op.create_index("videos_owned", "videos", ["owner", "id"])
    op.create_index("videos_expiry", "videos", ["expires_at"])
    op.create_table(
        "idempotency",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(256), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("video_id", sa.String(64), nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
    )
    op.create_index("idempotency_video", "idempotency", ["video_id"])
    op.create_index("idempotency_expiry", "idempotency", ["expires_at"])
