"""Files and batches."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(64)),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("filename", sa.String(255), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float),
    )
    op.create_index("files_owned", "files", ["owner", "id"])
    op.create_index("files_expiry", "files", ["expires_at"])
    times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    op.create_table(
        "batches",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(64)),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("input_file_id", sa.String(64), nullable=False),
        sa.Column("completion_window", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("custom", sa.JSON),
        sa.Column("errors", sa.JSON),
        sa.Column("output_file_id", sa.String(64)),
        sa.Column("error_file_id", sa.String(64)),
        *(sa.Column(f"{name}_at", sa.Float) for name in times),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("completed", sa.Integer, nullable=False),
        sa.Column("failed", sa.Integer, nullable=False),
        sa.Column("look_at", sa.Float, nullable=False),
    )
    op.create_index("batches_owned", "batches", ["owner", "id"])
    op.create_index("batches_queue", "batches", ["status", "look_at"])
    op.add_column("videos", sa.Column("batch_id", sa.String(64)))
    op.add_column("videos", sa.Column("batch_line", sa.Integer))
    op.add_column("videos", sa.Column("custom_id", sa.String(512)))
    op.create_index("videos_batch_lines", "videos", ["batch_id", "batch_line"], unique=True)
    op.create_index("videos_batch_status", "videos", ["batch_id", "status"])
