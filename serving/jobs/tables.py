"""The database's tables, as the newest migration leaves them; a test compares the two."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

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
    Column("artifacts", JSON),
    Column("stored_bytes", BigInteger, nullable=False, server_default="0"),
    Column("batch_id", String(64)),
    Column("batch_line", Integer),
    Column("custom_id", String(512)),
    Column("webhook_url", String(2048)),
    Column("lapses", Integer, nullable=False, server_default="0"),
    Column("step", Integer, nullable=False, server_default="0"),
    Column("steps", Integer, nullable=False, server_default="0"),
    # One index for each half of a claim: both are a seek and one row, however many videos there are.
    Index("videos_queue", "status", "priority", "created_at", "id"),
    Index("videos_leases", "status", "lease_until"),
    Index("videos_owned", "owner", "id"),
    # Which of a key's videos may be claimed, and which wait for those to end.
    Index("videos_owned_queue", "owner", "status", "priority", "created_at", "id"),
    Index("videos_expiry", "expires_at"),
    Index("videos_finished", "status", "completed_at"),
    # Unique, so that lines are put into the queue once however often that is tried.
    Index("videos_batch_lines", "batch_id", "batch_line", unique=True),
    Index("videos_batch_status", "batch_id", "status"),
)

# JPEGs of chunks that are denoised and not yet decoded; gone when the video has ended.
previews = Table(
    "previews",
    metadata,
    Column("video_id", String(64), primary_key=True),
    Column("chunk", Integer, primary_key=True),
    Column("picture", LargeBinary, nullable=False),
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

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64)),
    Column("purpose", String(32), nullable=False),
    Column("filename", String(255), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Index("files_owned", "owner", "id"),
    Index("files_expiry", "expires_at"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64)),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(64), nullable=False),
    Column("completion_window", String(16), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("status", String(16), nullable=False),
    Column("custom", JSON),
    Column("errors", JSON),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("in_progress_at", Float),
    Column("finalizing_at", Float),
    Column("completed_at", Float),
    Column("failed_at", Float),
    Column("expired_at", Float),
    Column("cancelling_at", Float),
    Column("cancelled_at", Float),
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("webhook_url", String(2048)),
    Column("output_lifetime_seconds", Float),
    # When somebody should look at it next; in the future while somebody does.
    Column("look_at", Float, nullable=False),
    Index("batches_owned", "owner", "id"),
    Index("batches_queue", "status", "look_at"),
)

# What webhooks are still to be told.
deliveries = Table(
    "deliveries",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("url", String(2048), nullable=False),
    Column("payload", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", Float, nullable=False),
    Index("deliveries_due", "next_at"),
)

# Interactive sessions of keys, as long as the replica that has them says so.
live_sessions = Table(
    "live_sessions",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("lease_until", Float, nullable=False),
    Index("live_sessions_owned", "owner", "lease_until"),
    Index("live_sessions_leases", "lease_until"),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(256), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
    Column("max_per_minute", Integer),
    Column("max_unfinished", Integer),
    Column("max_running", Integer),
    Column("webhook_url", String(2048)),
    Index("keys_digest", "digest", unique=True),
)
