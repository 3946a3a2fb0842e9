"""Interactive sessions that are open, which count for their keys' limits."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.create_table(
        "live_sessions",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("lease_until", sa.Float, nullable=False),
    )
    op.create_index("live_sessions_owned", "live_sessions", ["owner", "lease_until"])
    op.create_index("live_sessions_leases", "live_sessions", ["lease_until"])
