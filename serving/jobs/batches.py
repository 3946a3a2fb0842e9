"""Batches: many videos asked for in one file, made when nobody is waiting, and answered in two files."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any

from sqlalchemy import RowMapping, Select, func, insert, select, update

from serving.jobs.database import Database
from serving.jobs.holding import balance
from serving.jobs.ids import is_id, new_id
from serving.jobs.keys import locked_key
from serving.jobs.outbox import announce_to
from serving.jobs.pages import Order, page_of
from serving.jobs.store import SqlVideoStore
from serving.jobs.tables import batches as _batches
from serving.jobs.tables import videos as _videos
from serving.jobs.video import HELD, Video, VideoStatus

_LEASE_SECONDS = 120.0


class BatchStatus(StrEnum):
    """OpenAI's words."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


_ENDED = (BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED)


@dataclass(frozen=True, slots=True)
class Batch:
    """Times are seconds since the epoch; `total` is how many lines its file has, once they are checked.

    Its files of answers are kept for `output_lifetime_seconds`, or for as long as any file.
    """

    id: str
    owner: str | None
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: float
    expires_at: float
    status: BatchStatus = BatchStatus.VALIDATING
    custom: Mapping[str, str] | None = None
    errors: Sequence[Mapping[str, Any]] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    expired_at: float | None = None
    cancelling_at: float | None = None
    cancelled_at: float | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    look_at: float = 0.0
    output_lifetime_seconds: float | None = None
    webhook_url: str | None = None


def new_batch_id() -> str:
    return new_id("batch_")


def is_batch_id(text: str) -> bool:
    return is_id("batch_", text)


class BatchStore:
    """Batches, and the videos of each. Whoever works on one has it for two minutes; every write is safe to repeat."""

    def __init__(self, database: Database, videos: SqlVideoStore, *, clock: Callable[[], float] = time.time) -> None:
        self._database, self._videos, self.clock = database, videos, clock

    async def create(self, batch: Batch) -> Batch:
        return await asyncio.to_thread(self._create, batch)

    async def get(self, batch_id: str) -> Batch | None:
        """With the counts as they are now."""
        return await asyncio.to_thread(self._get, batch_id)

    async def list(
        self, *, owner: str | None = None, limit: int = 20, order: Order = "desc", after: str | None = None
    ) -> tuple[Sequence[Batch], bool]:
        """Batches by time, those after the id `after`, and whether there are more."""
        return await asyncio.to_thread(self._list, owner, limit, order, after)

    async def change(self, batch_id: str, expected: Sequence[BatchStatus], **changes: Any) -> Batch | None:
        """Write if its status is one of `expected`; the batch as it is then, or None where nothing was written."""
        return await asyncio.to_thread(self._change, batch_id, expected, changes)

    async def claim(self) -> Batch | None:
        """An unfinished batch that it is time to look at, for the next two minutes or until `put_back`."""
        return await asyncio.to_thread(self._claim)

    def keep(self, batch_id: str) -> None:
        """Have it for another two minutes: a large file takes longer."""
        self._put_back(batch_id, _LEASE_SECONDS)

    async def put_back(self, batch_id: str, after_seconds: float) -> None:
        """Look at it again then."""
        await asyncio.to_thread(self._put_back, batch_id, after_seconds)

    def add_videos(self, videos: Sequence[Video]) -> None:
        """Put a batch's videos into the queue, but for those whose line is there already."""
        with self._database.write() as connection:
            key = locked_key(connection, videos[0].owner if videos else None)
            limit = None if key is None else key.max_running
            held = 0 if limit is None else HELD
            changes = [{"created_at": v.created_at or self.clock(), "priority": v.priority + held} for v in videos]
            rows = [SqlVideoStore.to_row(video) | change for video, change in zip(videos, changes, strict=True)]
            self._database.insert_all_new(connection, _videos, rows)
            if key is not None and limit is not None:
                balance(connection, key.id, limit, self.clock())

    async def pending(self, batch_id: str, limit: int) -> Sequence[str]:
        """Ids of its videos that have not ended and were not told to."""
        unfinished = select(_videos.c.id).where(
            _videos.c.batch_id == batch_id,
            _videos.c.status.in_((VideoStatus.QUEUED, VideoStatus.IN_PROGRESS)),
            _videos.c.cancel_requested.is_(False),
        )
        return [row.id for row in await asyncio.to_thread(self._rows, unfinished.limit(limit))]

    async def videos(self, batch_id: str, after_line: int, limit: int) -> Sequence[Video]:
        """Its videos by line."""
        query = select(_videos).where(_videos.c.batch_id == batch_id, _videos.c.batch_line > after_line)
        rows = await asyncio.to_thread(self._rows, query.order_by(_videos.c.batch_line).limit(limit))
        return [SqlVideoStore.from_row(row._mapping) for row in rows]

    def _create(self, batch: Batch) -> Batch:
        with self._database.write() as connection:
            connection.execute(insert(_batches), asdict(batch))
        return batch

    def _get(self, batch_id: str) -> Batch | None:
        with self._database.read() as connection:
            row = connection.execute(select(_batches).where(_batches.c.id == batch_id)).mappings().one_or_none()
        return None if row is None else self._counted(_batch(row))

    def _list(self, owner: str | None, limit: int, order: Order, after: str | None) -> tuple[Sequence[Batch], bool]:
        query = page_of(_batches, owner=owner, limit=limit, order=order, after=after)
        with self._database.read() as connection:
            found = [_batch(row) for row in connection.execute(query).mappings()]
        return [self._counted(batch) for batch in found[:limit]], len(found) > limit

    def _counted(self, batch: Batch) -> Batch:
        """What isn't pending and wasn't completed has failed, a video that somebody deleted included."""
        if batch.status not in (BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING):
            return batch
        query = (
            select(_videos.c.status, func.count().label("many"))
            .where(_videos.c.batch_id == batch.id)
            .group_by(_videos.c.status)
        )
        counts = {row.status: row.many for row in self._rows(query)}
        completed = counts.get(VideoStatus.COMPLETED, 0)
        pending = counts.get(VideoStatus.QUEUED, 0) + counts.get(VideoStatus.IN_PROGRESS, 0)
        return replace(batch, completed=completed, failed=max(0, batch.total - completed - pending))

    def _change(self, batch_id: str, expected: Sequence[BatchStatus], changes: dict[str, Any]) -> Batch | None:
        with self._database.write() as connection:
            found = select(_batches).where(_batches.c.id == batch_id, _batches.c.status.in_(expected)).with_for_update()
            row = connection.execute(found).mappings().one_or_none()
            if row is None:
                return None
            connection.execute(update(_batches).where(_batches.c.id == batch_id).values(changes))
            batch = replace(_batch(row), **changes)
            if batch.status in _ENDED:
                key = locked_key(connection, batch.owner)
                urls = (batch.webhook_url, None if key is None else key.webhook_url)
                announce_to(connection, f"batch.{batch.status.value}", batch.id, urls, self.clock())
            return batch

    def _claim(self) -> Batch | None:
        active = (
            BatchStatus.VALIDATING,
            BatchStatus.IN_PROGRESS,
            BatchStatus.FINALIZING,
            BatchStatus.CANCELLING,
        )
        with self._database.write() as connection:
            now = self.clock()
            query = (
                select(_batches)
                .where(_batches.c.status.in_(active), _batches.c.look_at <= now)
                .order_by(_batches.c.look_at)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            row = connection.execute(query).mappings().first()
            if row is None:
                return None
            taken = {"look_at": now + _LEASE_SECONDS}
            connection.execute(update(_batches).where(_batches.c.id == row["id"]).values(taken))
            batch = _batch(row)
        return self._counted(batch)

    def _put_back(self, batch_id: str, after_seconds: float) -> None:
        with self._database.write() as connection:
            later = {"look_at": self.clock() + after_seconds}
            connection.execute(update(_batches).where(_batches.c.id == batch_id).values(later))

    def _rows(self, query: Select[Any]) -> Sequence[Any]:
        with self._database.read() as connection:
            return connection.execute(query).all()


def _batch(row: RowMapping) -> Batch:
    values = {field.name: row[field.name] for field in fields(Batch)}
    return Batch(**values | {"status": BatchStatus(row["status"])})
