"""Where videos are kept until they are made, and after: one protocol, and SQLAlchemy behind it.

A runner claims a video under a lease, keeps the lease alive with heartbeats, and writes with the fence it was given. A
lease that runs out makes the video claimable again under a higher fence, and from then on the old runner's every write
raises `StaleFence`.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any, Protocol

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    RowMapping,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    make_url,
    select,
    update,
)

from serving.jobs.video import StaleFence, Video, VideoStatus, new_video_id

__all__ = ["SqlVideoStore", "StaleFence", "Video", "VideoNotFound", "VideoStatus", "VideoStore", "new_video_id"]

MAX_ATTEMPTS = 3
_BUSY_SECONDS = 30


class VideoNotFound(LookupError):  # noqa: N818 - reads as what it is
    """No video has this id."""


class VideoStore(Protocol):
    """Durable, shared by every process of the service. Methods with a `fence` raise `StaleFence` when it is not the
    video's newest, or when the video is not in progress any more; all but `get` raise `VideoNotFound`."""

    async def create(self, video: Video) -> Video:
        """Put `video` into the queue and return it as stored, `created_at` filled in."""

    async def get(self, video_id: str) -> Video | None: ...

    async def claim(self, runner_id: str, lease_seconds: float) -> Video | None:
        """Take a video whose runner has let its lease run out, else the oldest queued one; None when there is none.

        Counts an attempt and raises the fence. A video that has used up its attempts, or that was cancelled while
        nobody ran it, is failed on the way instead (`attempts_exhausted`, `cancelled`).
        """

    async def heartbeat(self, video_id: str, fence: int, lease_seconds: float) -> Video:
        """Lease it for another `lease_seconds` from now. The answer's `cancel_requested` is news for the runner."""

    async def set_progress(self, video_id: str, fence: int, progress: int) -> Video:
        """Note `progress`, 0 to 100. The answer's `cancel_requested` is news for the runner."""

    async def set_request(self, video_id: str, fence: int, request: Mapping[str, Any]) -> Video:
        """Replace what determines the frames, once more of it is known (the rewritten prompt)."""

    async def complete(self, video_id: str, fence: int, *, expires_at: float | None = None) -> Video: ...

    async def fail(self, video_id: str, fence: int, code: str, message: str) -> Video: ...

    async def requeue(self, video_id: str, fence: int, *, count_attempt: bool = True) -> Video:
        """Give it back for another runner: after an error that may pass, or (`count_attempt=False`) when draining.

        Fails it with `attempts_exhausted` when that was its last attempt.
        """

    async def request_cancel(self, video_id: str) -> Video:
        """A queued video is failed with code `cancelled` at once; its runner does that for a running one. A video that
        has ended stays as it is."""


_metadata = MetaData()
_videos = Table(
    "videos",
    _metadata,
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
    # One index for each half of a claim: both are a seek and one row, however many videos there are.
    Index("videos_queue", "status", "created_at", "id"),
    Index("videos_leases", "status", "lease_until"),
)
_oldest_queued = (
    select(_videos)
    .where(_videos.c.status == VideoStatus.QUEUED)
    .order_by(_videos.c.created_at, _videos.c.id)
    .limit(1)
    .with_for_update(skip_locked=True)
)


class SqlVideoStore:
    """`VideoStore` in any database that SQLAlchemy speaks to; SQLite by default, which several processes may share."""

    def __init__(self, url: str, *, max_attempts: int = MAX_ATTEMPTS, clock: Callable[[], float] = time.time) -> None:
        """Opens `url`, such as `sqlite:////var/lib/rushes/videos.db`, and makes the tables that aren't there."""
        self._engine = _open(url)
        self._writer = self._engine.execution_options(immediate=True)
        self._max_attempts = max_attempts
        self._clock = clock
        with self._writer.begin() as connection:
            _metadata.create_all(connection)

    def dispose(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    async def create(self, video: Video) -> Video:
        return await asyncio.to_thread(self._create, video)

    async def get(self, video_id: str) -> Video | None:
        return await asyncio.to_thread(self._get, video_id)

    async def claim(self, runner_id: str, lease_seconds: float) -> Video | None:
        return await asyncio.to_thread(self._claim, runner_id, lease_seconds)

    async def heartbeat(self, video_id: str, fence: int, lease_seconds: float) -> Video:
        return await self._write(video_id, fence, lambda _: {"lease_until": self._clock() + lease_seconds})

    async def set_progress(self, video_id: str, fence: int, progress: int) -> Video:
        return await self._write(video_id, fence, lambda _: {"progress": progress})

    async def set_request(self, video_id: str, fence: int, request: Mapping[str, Any]) -> Video:
        return await self._write(video_id, fence, lambda _: {"request": dict(request)})

    async def complete(self, video_id: str, fence: int, *, expires_at: float | None = None) -> Video:
        done = {"status": VideoStatus.COMPLETED, "progress": 100, "expires_at": expires_at}
        return await self._write(video_id, fence, lambda _: done | self._ended())

    async def fail(self, video_id: str, fence: int, code: str, message: str) -> Video:
        return await self._write(video_id, fence, lambda _: self._failed(code, message))

    async def requeue(self, video_id: str, fence: int, *, count_attempt: bool = True) -> Video:
        def changes(video: Video) -> dict[str, Any]:
            if count_attempt and video.attempt >= self._max_attempts:
                return self._exhausted()
            attempt = video.attempt if count_attempt else video.attempt - 1
            return {"status": VideoStatus.QUEUED, "attempt": attempt, "runner_id": None, "lease_until": None}

        return await self._write(video_id, fence, changes)

    async def request_cancel(self, video_id: str) -> Video:
        return await asyncio.to_thread(self._request_cancel, video_id)

    def _create(self, video: Video) -> Video:
        created = replace(video, status=VideoStatus.QUEUED, created_at=video.created_at or self._clock())
        with self._writer.begin() as connection:
            connection.execute(insert(_videos), asdict(created))
        return created

    def _get(self, video_id: str) -> Video | None:
        with self._engine.connect() as connection:
            row = connection.execute(select(_videos).where(_videos.c.id == video_id)).mappings().one_or_none()
        return None if row is None else _video(row)

    def _claim(self, runner_id: str, lease_seconds: float) -> Video | None:
        with self._writer.begin() as connection:
            while True:
                now = self._clock()
                lapsed = (
                    select(_videos)
                    .where(_videos.c.status == VideoStatus.IN_PROGRESS, _videos.c.lease_until < now)
                    .order_by(_videos.c.lease_until)
                    .limit(1)
                    .with_for_update(skip_locked=True)
                )
                row = (
                    connection.execute(lapsed).mappings().first()
                    or connection.execute(_oldest_queued).mappings().first()
                )
                if row is None:
                    return None
                video = _video(row)
                if video.cancel_requested:
                    self._update(connection, video, self._cancelled())
                elif video.attempt >= self._max_attempts:
                    self._update(connection, video, self._exhausted())
                else:
                    claimed = {
                        "status": VideoStatus.IN_PROGRESS,
                        "attempt": video.attempt + 1,
                        "fence": video.fence + 1,
                        "runner_id": runner_id,
                        "lease_until": now + lease_seconds,
                    }
                    return self._update(connection, video, claimed)

    def _request_cancel(self, video_id: str) -> Video:
        with self._writer.begin() as connection:
            video = _locked(connection, video_id)
            if video.status is VideoStatus.QUEUED:
                return self._update(connection, video, self._cancelled())
            if video.status is VideoStatus.IN_PROGRESS:
                return self._update(connection, video, {"cancel_requested": True})
            return video

    async def _write(self, video_id: str, fence: int, changes: Callable[[Video], dict[str, Any]]) -> Video:
        return await asyncio.to_thread(self._fenced, video_id, fence, changes)

    def _fenced(self, video_id: str, fence: int, changes: Callable[[Video], dict[str, Any]]) -> Video:
        with self._writer.begin() as connection:
            video = _locked(connection, video_id)
            if video.fence != fence or video.status is not VideoStatus.IN_PROGRESS:
                raise StaleFence(f"{video_id}: fence {fence}, but it is {video.status} under fence {video.fence}")
            return self._update(connection, video, changes(video))

    def _update(self, connection: Connection, video: Video, changes: dict[str, Any]) -> Video:
        connection.execute(update(_videos).where(_videos.c.id == video.id).values(changes))
        return replace(video, **changes)

    def _cancelled(self) -> dict[str, Any]:
        return self._failed("cancelled", "The video was cancelled.") | {"cancel_requested": True}

    def _exhausted(self) -> dict[str, Any]:
        return self._failed("attempts_exhausted", f"The video was tried {self._max_attempts} times and never finished.")

    def _failed(self, code: str, message: str) -> dict[str, Any]:
        return {"status": VideoStatus.FAILED, "error_code": code, "error_message": message} | self._ended()

    def _ended(self) -> dict[str, Any]:
        return {"completed_at": self._clock(), "lease_until": None, "runner_id": None}


def _locked(connection: Connection, video_id: str) -> Video:
    row = connection.execute(select(_videos).where(_videos.c.id == video_id).with_for_update()).mappings().one_or_none()
    if row is None:
        raise VideoNotFound(video_id)
    return _video(row)


def _video(row: RowMapping) -> Video:
    values = {field.name: row[field.name] for field in fields(Video)}
    return Video(**values | {"status": VideoStatus(row["status"])})


def _open(url: str) -> Engine:
    if make_url(url).get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": _BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: Any) -> None:
        # Python's own transaction handling begins late and never IMMEDIATE; SQLAlchemy's documented way around it.
        connection.isolation_level = None
        _use_wal(connection)
        # The default in WAL mode may forget the last commits when the power fails.
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later would fail at once, without waiting, if another wrote between.
        immediate = connection.get_execution_options().get("immediate", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch the database file to WAL, once for its life. SQLite's own busy timeout does not cover the switch, and
    several processes may open a new database at once."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
