"""Videos in a database: the queue, the leases, and what became of each.

A runner claims a video under a lease, keeps the lease alive with heartbeats, and writes with the fence it was given. A
lease that runs out makes the video claimable again under a higher fence, and from then on the old runner's every write
raises `StaleFence`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, func, insert, select, update

from serving.jobs.artifacts import Artifact
from serving.jobs.database import Database
from serving.jobs.holding import balance
from serving.jobs.keys import check_limits, locked_key
from serving.jobs.outbox import announce_to
from serving.jobs.pages import Order, page_of
from serving.jobs.protocol import (
    Idempotency,
    IdempotencyConflict,
    Page,
    VideoNotFound,
    VideoStore,
)
from serving.jobs.tables import idempotency as _keys
from serving.jobs.tables import previews as _previews
from serving.jobs.tables import videos as _videos
from serving.jobs.video import HELD, StaleFence, Video, VideoStatus, new_video_id

__all__ = [
    "Idempotency",
    "IdempotencyConflict",
    "Order",
    "Page",
    "SqlVideoStore",
    "StaleFence",
    "Video",
    "VideoNotFound",
    "VideoStatus",
    "VideoStore",
    "new_video_id",
]

MAX_ATTEMPTS = 3
MAX_LAPSES = 10
RETENTION_SECONDS = 30 * 86400.0
IDEMPOTENCY_SECONDS = 86400.0
# A runner that is told that its video was deleted still writes down how its log ended; that must not come after the
# sweeper.
_LAST_WORDS_SECONDS = 60.0

_ENDED = (VideoStatus.COMPLETED, VideoStatus.FAILED)


class SqlVideoStore:
    """`VideoStore` in an SQLite or PostgreSQL database."""

    def __init__(
        self,
        database: Database | str,
        *,
        max_attempts: int = MAX_ATTEMPTS,
        max_lapses: int = MAX_LAPSES,
        retention_seconds: float = RETENTION_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """A URL is opened. A video that has ended is kept for `retention_seconds`. Raises `DatabaseError`."""
        self._database = Database.open(database) if isinstance(database, str) else database
        self._max_attempts, self._max_lapses = max_attempts, max_lapses
        self._retention_seconds = retention_seconds
        self._clock = clock

    def dispose(self) -> None:
        """Close every connection."""
        self._database.dispose()

    async def create(self, video: Video, idempotency: Idempotency | None = None) -> Video:
        return await asyncio.to_thread(self._create, video, idempotency)

    async def get(self, video_id: str) -> Video | None:
        return await asyncio.to_thread(self._get, video_id)

    async def list(
        self, *, owner: str | None = None, limit: int = 20, order: Order = "desc", after: str | None = None
    ) -> Page:
        return await asyncio.to_thread(self._list, owner, limit, order, after)

    async def claim(self, runner_id: str, lease_seconds: float, *, below: int = HELD) -> Video | None:
        return await asyncio.to_thread(self._claim, runner_id, lease_seconds, below)

    async def heartbeat(self, video_id: str, fence: int, lease_seconds: float) -> Video:
        return await self._write(video_id, fence, lambda _: {"lease_until": self._clock() + lease_seconds})

    async def set_progress(
        self, video_id: str, fence: int, progress: int, *, headway: bool = False, step: int = 0, steps: int = 0
    ) -> Video:
        first = {"attempt": 1, "lapses": 0} if headway else {}
        return await self._write(
            video_id, fence, lambda _: {"progress": progress, "step": step, "steps": steps, **first}
        )

    async def set_request(self, video_id: str, fence: int, request: Mapping[str, Any]) -> Video:
        return await self._write(video_id, fence, lambda _: {"request": dict(request)})

    async def complete(
        self, video_id: str, fence: int, *, artifacts: Mapping[str, Artifact] | None = None, log_bytes: int = 0
    ) -> Video:
        files = {name: asdict(artifact) for name, artifact in (artifacts or {}).items()}
        stored = log_bytes + sum(artifact.size_bytes for artifact in (artifacts or {}).values())
        done = {"status": VideoStatus.COMPLETED, "progress": 100, "artifacts": files, "stored_bytes": stored}
        return await self._write(video_id, fence, lambda video: done | self._ended(video))

    async def fail(self, video_id: str, fence: int, code: str, message: str) -> Video:
        return await self._write(video_id, fence, lambda video: self._failed(video, code, message))

    async def requeue(self, video_id: str, fence: int, *, count_attempt: bool = True) -> Video:
        def changes(video: Video) -> dict[str, Any]:
            if count_attempt and video.attempt - video.lapses >= self._max_attempts:
                return self._exhausted(video)
            attempt = video.attempt if count_attempt else video.attempt - 1
            return {"status": VideoStatus.QUEUED, "attempt": attempt, "runner_id": None, "lease_until": None}

        return await self._write(video_id, fence, changes)

    async def request_cancel(self, video_id: str) -> Video:
        return await asyncio.to_thread(self._request_cancel, video_id)

    async def delete(self, video_id: str) -> Video:
        return await asyncio.to_thread(self._delete, video_id)

    async def expired(self, limit: int) -> Sequence[Video]:
        return await asyncio.to_thread(self._expired, limit)

    async def beyond_quota(self, quota_bytes: int, limit: int) -> Sequence[Video]:
        return await asyncio.to_thread(self._beyond_quota, quota_bytes, limit)

    async def remove(self, video_id: str) -> None:
        await asyncio.to_thread(self._remove, video_id)

    @staticmethod
    def to_row(video: Video) -> dict[str, Any]:
        """As a row of the table `videos`. Not `asdict`, whose copies of everything take as long as the insertion."""
        return {field.name: getattr(video, field.name) for field in fields(Video)}

    @staticmethod
    def from_row(row: RowMapping) -> Video:
        """A row of the table `videos`."""
        values = {field.name: row[field.name] for field in fields(Video)}
        return Video(**values | {"status": VideoStatus(row["status"])})

    def _create(self, video: Video, idempotency: Idempotency | None) -> Video:
        created = replace(video, status=VideoStatus.QUEUED, created_at=video.created_at or self._clock())
        with self._database.write() as connection:
            if idempotency is not None:
                before = self._once(connection, created, idempotency)
                if before is not None:
                    return before
            key = locked_key(connection, created.owner)
            if key is not None:
                check_limits(connection, key, self._clock())
            limit = None if key is None else key.max_running
            held = {} if limit is None else {"priority": created.priority + HELD}
            connection.execute(insert(_videos), self.to_row(created) | held)
            if limit is not None:
                balance(connection, str(created.owner), limit, self._clock())
        return created

    def _once(self, connection: Connection, video: Video, asked: Idempotency) -> Video | None:
        """Take the key for `video`, or return the video that it stands for already."""
        now = self._clock()
        owner = video.owner or ""
        mine = (_keys.c.owner == owner) & (_keys.c.key == asked.key)
        connection.execute(delete(_keys).where(mine, _keys.c.expires_at <= now))
        values = {"owner": owner, "key": asked.key, "digest": asked.digest, "video_id": video.id}
        # Of two at once, the second waits here until the first has committed.
        if self._database.insert_new(connection, _keys, values | {"expires_at": now + IDEMPOTENCY_SECONDS}):
            return None
        used = connection.execute(select(_keys).where(mine)).one()
        if used.digest != asked.digest:
            raise IdempotencyConflict(asked.key)
        row = connection.execute(select(_videos).where(_videos.c.id == used.video_id)).mappings().one()
        return self.from_row(row)

    def _get(self, video_id: str) -> Video | None:
        with self._database.read() as connection:
            row = connection.execute(select(_videos).where(_videos.c.id == video_id)).mappings().one_or_none()
        return None if row is None else self.from_row(row)

    def _list(self, owner: str | None, limit: int, order: Order, after: str | None) -> Page:
        query = page_of(_videos, owner=owner, limit=limit, order=order, after=after)
        query = query.where(_videos.c.deleted_at.is_(None))
        with self._database.read() as connection:
            found = [self.from_row(row) for row in connection.execute(query).mappings()]
        return Page(found[:limit], has_more=len(found) > limit)

    def _claim(self, runner_id: str, lease_seconds: float, below: int) -> Video | None:
        may = select(_videos).where(_videos.c.priority < below).limit(1).with_for_update(skip_locked=True)
        queued = may.where(_videos.c.status == VideoStatus.QUEUED)
        queued = queued.order_by(_videos.c.priority, _videos.c.created_at, _videos.c.id)
        in_progress = may.where(_videos.c.status == VideoStatus.IN_PROGRESS).order_by(_videos.c.lease_until)
        with self._database.write() as connection:
            while True:
                now = self._clock()
                lapsed = in_progress.where(_videos.c.lease_until < now)
                row = connection.execute(lapsed).mappings().first() or connection.execute(queued).mappings().first()
                if row is None:
                    return None
                video = self.from_row(row)
                lapses = video.lapses + (video.status is VideoStatus.IN_PROGRESS)
                if video.cancel_requested:
                    self._update(connection, video, self._cancelled(video))
                elif lapses >= self._max_lapses or video.attempt - lapses >= self._max_attempts:
                    self._update(connection, video, self._exhausted(video))
                else:
                    claimed = {
                        "status": VideoStatus.IN_PROGRESS,
                        "attempt": video.attempt + 1,
                        "lapses": lapses,
                        "fence": video.fence + 1,
                        "runner_id": runner_id,
                        "lease_until": now + lease_seconds,
                        "started_at": now,
                    }
                    return self._update(connection, video, claimed)

    def _request_cancel(self, video_id: str) -> Video:
        with self._database.write() as connection:
            return self._cancel(connection, self._locked(connection, video_id))

    def _delete(self, video_id: str) -> Video:
        with self._database.write() as connection:
            video = self._cancel(connection, self._locked(connection, video_id))
            hidden: dict[str, Any] = {"deleted_at": self._clock()}
            if video.status.final:
                hidden["expires_at"] = self._clock() + _LAST_WORDS_SECONDS
            # The same request again must not be answered with a video that nobody can see.
            connection.execute(delete(_keys).where(_keys.c.video_id == video_id))
            return self._update(connection, video, hidden)

    def _cancel(self, connection: Connection, video: Video) -> Video:
        if video.status is VideoStatus.QUEUED:
            return self._update(connection, video, self._cancelled(video))
        if video.status is VideoStatus.IN_PROGRESS:
            return self._update(connection, video, {"cancel_requested": True})
        return video

    def _expired(self, limit: int) -> Sequence[Video]:
        query = select(_videos).where(_videos.c.expires_at <= self._clock()).order_by(_videos.c.expires_at).limit(limit)
        with self._database.read() as connection:
            return [self.from_row(row) for row in connection.execute(query).mappings()]

    def _beyond_quota(self, quota_bytes: int, limit: int) -> Sequence[Video]:
        latest_first = (_videos.c.expires_at.desc(), _videos.c.id.desc())
        used = (
            select(_videos, func.sum(_videos.c.stored_bytes).over(order_by=latest_first).label("used"))
            .where(_videos.c.status == VideoStatus.COMPLETED)
            .subquery()
        )
        query = select(used).where(used.c.used > quota_bytes).order_by(used.c.used.desc()).limit(limit)
        with self._database.read() as connection:
            return [self.from_row(row) for row in connection.execute(query).mappings()]

    def _remove(self, video_id: str) -> None:
        with self._database.write() as connection:
            gone = connection.execute(delete(_videos).where(_videos.c.id == video_id, _videos.c.status.in_(_ENDED)))
            if gone.rowcount:
                connection.execute(delete(_keys).where(_keys.c.video_id == video_id))
                connection.execute(delete(_previews).where(_previews.c.video_id == video_id))
            connection.execute(delete(_keys).where(_keys.c.expires_at <= self._clock()))

    async def _write(self, video_id: str, fence: int, changes: Callable[[Video], dict[str, Any]]) -> Video:
        return await asyncio.to_thread(self._fenced, video_id, fence, changes)

    def _fenced(self, video_id: str, fence: int, changes: Callable[[Video], dict[str, Any]]) -> Video:
        with self._database.write() as connection:
            video = self._locked(connection, video_id)
            if video.fence != fence or video.status is not VideoStatus.IN_PROGRESS:
                raise StaleFence(f"{video_id}: fence {fence}, but it is {video.status} under fence {video.fence}")
            return self._update(connection, video, changes(video))

    def _locked(self, connection: Connection, video_id: str) -> Video:
        query = select(_videos).where(_videos.c.id == video_id).with_for_update()
        row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise VideoNotFound(video_id)
        return self.from_row(row)

    def _update(self, connection: Connection, video: Video, changes: dict[str, Any]) -> Video:
        connection.execute(update(_videos).where(_videos.c.id == video.id).values(changes))
        changed = replace(video, **changes)
        if changed.status.final and not video.status.final:
            connection.execute(delete(_previews).where(_previews.c.video_id == video.id))
            key = locked_key(connection, video.owner)
            if key is not None and key.max_running is not None:
                balance(connection, key.id, key.max_running, self._clock())
            kind = f"video.{changed.status.value}"
            announce_to(
                connection,
                kind,
                video.id,
                (changed.webhook_url, None if key is None else key.webhook_url),
                self._clock(),
            )
        return changed

    def _cancelled(self, video: Video) -> dict[str, Any]:
        return self._failed(video, "cancelled", "The video was cancelled.") | {"cancel_requested": True}

    def _exhausted(self, video: Video) -> dict[str, Any]:
        said = f"The video was tried {video.attempt} times and never finished."
        return self._failed(video, "attempts_exhausted", said)

    def _failed(self, video: Video, code: str, message: str) -> dict[str, Any]:
        return {"status": VideoStatus.FAILED, "error_code": code, "error_message": _storable(message)} | self._ended(
            video
        )

    def _ended(self, video: Video) -> dict[str, Any]:
        now = self._clock()
        kept = self._retention_seconds if video.deleted_at is None else _LAST_WORDS_SECONDS
        return {"completed_at": now, "lease_until": None, "runner_id": None, "expires_at": now + kept}


def _storable(text: str) -> str:
    """PostgreSQL has no text with a NUL in it."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")
