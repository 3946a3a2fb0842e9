"""Pictures of chunks that are denoised and not yet decoded."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.create_table(
        "previews",
        sa.Column("video_id", sa.String(64), primary_key=True),
        sa.Column("chunk", sa.Integer, primary_key=True),
        sa.Column("picture", sa.LargeBinary, nullable=False),
    )
