"""The database's tables, as the newest migration leaves them; a test compares the two."""

from __future__ import annotations

from sqlalchemy import JSON, Boolean, Column, Float, Index, Integer, MetaData, String, Table, Text

metadata = MetaData()

videos = Table(
    "videos",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("model", String(256), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("seconds", String(16), nullable=False),
    Column("size", String(16), nullable=False),
    Column("request", JSON, nullable=False),
    Column("status", String(16), nullable=False),
    Column("progress", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("completed_at", Float),
    Column("expires_at", Float),
    Column("error_code", String(64)),
    Column("error_message", Text),
    Column("attempt", Integer, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("runner_id", String(128)),
    Column("lease_until", Float),
    Column("cancel_requested", Boolean, nullable=False),
    Column("owner", String(64)),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("work", Float, nullable=False, server_default="0"),
    Column("started_at", Float),
    Column("deleted_at", Float),
    # One index for each half of a claim: both are a seek and one row, however many videos there are.
    Index("videos_queue", "status", "priority", "created_at", "id"),
    Index("videos_leases", "status", "lease_until"),
    Index("videos_owned", "owner", "id"),
    Index("videos_expiry", "expires_at"),
)

# What an `Idempotency-Key` was used for.
idempotency = Table(
    "idempotency",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("key", String(256), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("video_id", String(64), nullable=False),
    Column("expires_at", Float, nullable=False),
    Index("idempotency_video", "video_id"),
    Index("idempotency_expiry", "expires_at"),
)
