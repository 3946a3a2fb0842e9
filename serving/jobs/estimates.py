"""How long a video will still take: by the bundle's measured cost at first, by the service's own last videos then."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate

from sqlalchemy import Connection, func, select

from serving.jobs.database import Database
from serving.jobs.tables import videos as _videos
from serving.jobs.video import Video, VideoStatus

# So many of the last videos say how fast the service is, and so much of the queue is looked at, once in a while for
# all requests: an estimate must not cost more than the answer that it goes with.
_SAMPLE = 20
_QUEUE_AHEAD = 1000
_LOOK_SECONDS = 2.0

_columns = _videos.c


@dataclass(frozen=True, slots=True)
class _Look:
    """The service at one moment.

    `pace` is seconds for a unit of work by model; `places` are the first of the queue in its order, and `seconds_until`
    what is to be done before each of them, and before what comes after them. `at_once` is how many are made beside each
    other: as many as run, if the pace is of videos that did.
    """

    at: float
    pace: Mapping[str, float]
    at_once: int
    places: list[tuple[int, float, str]]
    seconds_until: list[float]
    queued: int

    def seconds_ahead(self, video: Video) -> float:
        index = self._index(video)
        ahead = self.seconds_until[index]
        if unseen := self._unseen_before(video, index):
            ahead *= 1 + unseen / len(self.places)
        return ahead / self.at_once

    def videos_ahead(self, video: Video) -> int:
        index = self._index(video)
        return index + round(self._unseen_before(video, index))

    def _index(self, video: Video) -> int:
        return bisect_left(self.places, (video.priority, video.created_at, video.id))

    def _unseen_before(self, video: Video, index: int) -> float:
        """How many come before it that were not looked at: told by when it came, and taken to be like the first."""
        unseen = self.queued - len(self.places)
        if index < len(self.places) or unseen <= 0:
            return 0.0
        last = self.places[-1]
        came = (video.created_at - last[1]) / max(1e-9, self.at - last[1]) if video.priority == last[0] else 1.0
        return min(1.0, max(0.0, came)) * unseen


class Estimates:
    """`priced` are the models whose videos' `work` is in seconds: before the first one is completed it counts as it
    is. Nothing is known of another model until then."""

    def __init__(
        self, database: Database, *, priced: Collection[str] = (), clock: Callable[[], float] = time.time
    ) -> None:
        self._database, self._priced, self._clock = database, priced, clock
        self._look: _Look | None = None
        self._looking = asyncio.Lock()

    async def seconds_left(self, video: Video) -> float | None:
        """Until it is completed; None when nothing is known, 0 when it has ended."""
        if video.status.final:
            return 0.0
        running = video.status is VideoStatus.IN_PROGRESS
        if running and video.progress >= 5 and video.started_at is not None:
            return (self._clock() - video.started_at) * (100 - video.progress) / video.progress
        look = await self._recent()
        pace = look.pace.get(video.model)
        if pace is None:
            return None
        if running:
            return max(0.0, pace * video.work - (self._clock() - (video.started_at or self._clock())))
        return pace * video.work + look.seconds_ahead(video)

    async def unfinished(self) -> tuple[int, int]:
        """How many videos are queued, and how many in progress."""
        return await asyncio.to_thread(self._unfinished)

    async def videos_ahead(self, video: Video) -> int:
        """How many queued videos come before this queued one; told exactly for the first ones."""
        return (await self._recent()).videos_ahead(video)

    def _unfinished(self) -> tuple[int, int]:
        with self._database.read() as connection:
            return _count(connection, VideoStatus.QUEUED), _count(connection, VideoStatus.IN_PROGRESS)

    async def _recent(self) -> _Look:
        async with self._looking:
            if self._look is None or not 0 <= self._clock() - self._look.at < _LOOK_SECONDS:
                self._look = await asyncio.to_thread(self._look_at_it)
            return self._look

    def _look_at_it(self) -> _Look:
        with self._database.read() as connection:
            seen = _pace(connection)
            pace = dict.fromkeys(self._priced, 1.0) | seen
            queue = (
                select(_columns.priority, _columns.created_at, _columns.id, _columns.model, _columns.work)
                .where(_columns.status == VideoStatus.QUEUED)
                .order_by(_columns.priority, _columns.created_at, _columns.id)
                .limit(_QUEUE_AHEAD)
            )
            rows = connection.execute(queue).all()
            places = [(row.priority, row.created_at, row.id) for row in rows]
            seconds = [row.work * pace.get(row.model, 0.0) for row in rows]
            queued = len(rows) if len(rows) < _QUEUE_AHEAD else _count(connection, VideoStatus.QUEUED)
            at_once = max(1, _count(connection, VideoStatus.IN_PROGRESS)) if seen else 1
        return _Look(self._clock(), pace, at_once, places, list(accumulate(seconds, initial=0.0)), queued)


def _pace(connection: Connection) -> dict[str, float]:
    """Seconds that a unit of work took a video of each model, whatever ran beside it."""
    last = (
        select(_columns.model, _columns.work, _columns.started_at, _columns.completed_at)
        .where(_columns.status == VideoStatus.COMPLETED, _columns.completed_at.is_not(None))
        .order_by(_columns.completed_at.desc())
        .limit(_SAMPLE)
    )
    work: dict[str, float] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)
    for row in connection.execute(last):
        if row.work and row.started_at is not None:
            work[row.model] += row.work
            seconds[row.model] += row.completed_at - row.started_at
    return {model: seconds[model] / work[model] for model in work}


def _count(connection: Connection, status: VideoStatus) -> int:
    query = select(func.count()).select_from(_videos).where(_columns.status == status)
    return int(connection.execute(query).scalar_one())
