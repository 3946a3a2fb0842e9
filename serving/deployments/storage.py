"""What every process of the service opens: the database and what is kept in it."""

from __future__ import annotations

from serving.config import ServiceConfig
from serving.jobs.database import Database
from serving.jobs.store import SqlVideoStore


def open_store(config: ServiceConfig) -> SqlVideoStore:
    """The store that `config` names. Raises `DatabaseError`."""
    config.data_dir.mkdir(parents=True, exist_ok=True)
    return SqlVideoStore(
        Database.open(config.resolved_store_url),
        max_attempts=config.runner.max_attempts,
        retention_seconds=config.retention_days * 86400,
    )
