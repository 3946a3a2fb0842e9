"""How many videos of a key run at a time, and whom it has told of their ends."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("keys", sa.Column("max_running", sa.Integer))
    op.add_column("keys", sa.Column("webhook_url", sa.String(2048)))
    op.create_index("videos_owned_queue", "videos", ["owner", "status", "priority", "created_at", "id"])
    op.drop_index("videos_owned_status", "videos")
