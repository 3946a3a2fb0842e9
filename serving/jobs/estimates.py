"""How long a video will still take, as far as the ones before it tell."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from sqlalchemy import Connection, Select, func, select, tuple_

from serving.jobs.database import Database
from serving.jobs.tables import videos as _videos
from serving.jobs.video import Video, VideoStatus

# So many of the last videos say how fast the service is, and so much of the queue is looked at: an estimate must not
# cost more than the answer that it goes with.
_SAMPLE = 20
_QUEUE_AHEAD = 200
_PACE_SECONDS = 5.0
# A place in the queue beyond this one is told as this one.
_POSITIONS = 10_000


class Estimates:
    """Seconds, measured on this service's own last videos; nothing is known before the first one is completed."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._pace: float | None = None
        self._pace_until = 0.0

    async def seconds_left(self, video: Video) -> float | None:
        """Until it is completed; None when nothing is known, 0 when it has ended."""
        if video.status.final:
            return 0.0
        running = video.status is VideoStatus.IN_PROGRESS
        if running and video.progress >= 5 and video.started_at is not None:
            return (self._clock() - video.started_at) * (100 - video.progress) / video.progress
        return await asyncio.to_thread(self._from_pace, video)

    async def unfinished(self) -> tuple[int, int]:
        """How many videos are queued, and how many in progress."""
        return await asyncio.to_thread(self._unfinished)

    def _unfinished(self) -> tuple[int, int]:
        with self._database.read() as connection:
            return _count(connection, VideoStatus.QUEUED), _count(connection, VideoStatus.IN_PROGRESS)

    async def videos_ahead(self, video: Video) -> int:
        """How many queued videos come before this queued one, as far as one looks."""
        return await asyncio.to_thread(self._videos_ahead, video)

    def _videos_ahead(self, video: Video) -> int:
        ahead = _ahead(video).limit(_POSITIONS).subquery()
        with self._database.read() as connection:
            count: int = connection.execute(select(func.count()).select_from(ahead)).scalar_one()
        return count

    def _from_pace(self, video: Video) -> float | None:
        with self._database.read() as connection:
            if self._clock() >= self._pace_until:
                self._pace, self._pace_until = _pace(connection), self._clock() + _PACE_SECONDS
            if self._pace is None:
                return None
            if video.status is VideoStatus.IN_PROGRESS:
                spent = self._clock() - (video.started_at or self._clock())
                return max(0.0, self._pace * video.work - spent)
            return self._pace * (
                video.work + _work_ahead(connection, video) / max(1, _count(connection, VideoStatus.IN_PROGRESS))
            )


def _pace(connection: Connection) -> float | None:
    """Seconds that a unit of work took a video, whatever ran beside it."""
    columns = _videos.c
    last = (
        select(columns.work, columns.started_at, columns.completed_at)
        .where(columns.status == VideoStatus.COMPLETED, columns.completed_at.is_not(None))
        .order_by(columns.completed_at.desc())
        .limit(_SAMPLE)
    )
    rows = [row for row in connection.execute(last) if row.work and row.started_at is not None]
    work = sum(row.work for row in rows)
    return sum(row.completed_at - row.started_at for row in rows) / work if work else None


def _ahead(video: Video) -> Select[tuple[float]]:
    """The work of the queued videos that come before this one, in order."""
    columns = _videos.c
    return (
        select(columns.work)
        .where(
            columns.status == VideoStatus.QUEUED,
            tuple_(columns.priority, columns.created_at, columns.id) < (video.priority, video.created_at, video.id),
        )
        .order_by(columns.priority, columns.created_at, columns.id)
    )


def _work_ahead(connection: Connection, video: Video) -> float:
    ahead = _ahead(video).limit(_QUEUE_AHEAD).subquery()
    total: float | None = connection.execute(select(func.sum(ahead.c.work))).scalar_one()
    return total or 0.0


def _count(connection: Connection, status: VideoStatus) -> int:
    query = select(func.count()).select_from(_videos).where(_videos.c.status == status)
    count: int = connection.execute(query).scalar_one()
    return count
