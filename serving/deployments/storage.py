"""What every process of the service opens: the database and what is kept in it."""

from __future__ import annotations

from serving.api.creation import WebhookPolicy
from serving.config import ServiceConfig
from serving.jobs.artifacts import Artifacts
from serving.jobs.database import Database
from serving.jobs.storage import Storage
from serving.jobs.store import SqlVideoStore


def open_storage(config: ServiceConfig) -> Storage:
    """All that `config` names. Raises `DatabaseError` or `ArtifactError`."""
    config.data_dir.mkdir(parents=True, exist_ok=True)
    database = Database.open(config.resolved_store_url)
    videos = SqlVideoStore(
        database,
        max_attempts=config.runner.max_attempts,
        max_lapses=config.runner.max_lapses,
        retention_seconds=config.retention_days * 86400,
    )
    artifacts = Artifacts(config.data_dir, config.artifacts_url, config.artifacts_options)
    return Storage.over(database, videos, artifacts)


def webhook_policy(config: ServiceConfig) -> WebhookPolicy:
    return WebhookPolicy(enabled=config.webhooks.secret is not None, allow_private=config.webhooks.allow_private)
