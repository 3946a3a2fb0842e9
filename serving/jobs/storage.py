"""All that the service keeps, in one place to pass around."""

from __future__ import annotations

from dataclasses import dataclass

from serving.jobs.artifacts import Artifacts
from serving.jobs.batches import BatchStore
from serving.jobs.database import Database
from serving.jobs.files import FileStore
from serving.jobs.keys import KeyStore
from serving.jobs.live import LiveSessions
from serving.jobs.log_copies import LogCopies
from serving.jobs.news import LogNews
from serving.jobs.outbox import Outbox
from serving.jobs.previews import Previews
from serving.jobs.store import SqlVideoStore


@dataclass(frozen=True, slots=True)
class Storage:
    """The stores share one database; every process of the service opens the same."""

    database: Database
    videos: SqlVideoStore
    artifacts: Artifacts
    files: FileStore
    batches: BatchStore
    outbox: Outbox
    keys: KeyStore
    live: LiveSessions
    previews: Previews
    copies: LogCopies | None = None

    @classmethod
    def over(
        cls, database: Database, videos: SqlVideoStore, artifacts: Artifacts, *, copy_logs: bool = False
    ) -> Storage:
        """Everything else that lies in the same database and beside the same files."""
        return cls(
            database,
            videos,
            artifacts,
            FileStore(database, artifacts),
            BatchStore(database, videos),
            Outbox(database),
            KeyStore(database),
            LiveSessions(database),
            Previews(database),
            LogCopies(artifacts, videos, LogNews(database)) if copy_logs else None,
        )
