"""Tries that ended with their runner are counted apart from those that failed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("videos", sa.Column("lapses", sa.Integer, nullable=False, server_default="0"))
