"""What files a completed video has, and how large they are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("videos", sa.Column("artifacts", sa.JSON))
    op.add_column("videos", sa.Column("stored_bytes", sa.BigInteger, nullable=False, server_default="0"))
    op.create_index("videos_finished", "videos", ["status", "completed_at"])
