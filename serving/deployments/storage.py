"""What every process of the service opens: the database and what is kept in it."""

from __future__ import annotations

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from serving.api.creation import WebhookPolicy
from serving.config import ServiceConfig
from serving.jobs.artifacts import Artifacts
from serving.jobs.database import Database, DatabaseAway
from serving.jobs.storage import Storage
from serving.jobs.store import SqlVideoStore

# How long a replica waits for a database that is being restarted.
REPLICA_PATIENCE_SECONDS = 60.0


def open_storage(config: ServiceConfig, *, patience_seconds: float = 0.0) -> Storage:
    """All that `config` names. Raises `DatabaseError` or `ArtifactError`.

    A database that doesn't answer is waited for: a replica that starts while it is away must not give up.
    """
    config.data_dir.mkdir(parents=True, exist_ok=True)
    waiting = Retrying(
        retry=retry_if_exception_type(DatabaseAway),
        stop=stop_after_delay(patience_seconds),
        wait=wait_fixed(0.5),
        reraise=True,
    )
    database = waiting(Database.open, config.resolved_store_url)
    videos = SqlVideoStore(
        database,
        max_attempts=config.runner.max_attempts,
        max_lapses=config.runner.max_lapses,
        retention_seconds=config.retention_days * 86400,
    )
    artifacts = Artifacts(config.data_dir, config.artifacts_url, config.artifacts_options)
    return Storage.over(database, videos, artifacts, copy_logs=config.log_sharing == "artifacts")


def webhook_policy(config: ServiceConfig) -> WebhookPolicy:
    return WebhookPolicy(enabled=config.webhooks.secret is not None, allow_private=config.webhooks.allow_private)
