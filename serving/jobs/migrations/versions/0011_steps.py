"""How many of its steps a video has been denoised by, and of how many."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    for name in ("step", "steps"):
        op.add_column("videos", sa.Column(name, sa.Integer, nullable=False, server_default="0"))
