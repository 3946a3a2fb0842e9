"""How many videos there are in which state: for whoever watches the service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sqlalchemy import case, func, select

from serving.jobs.database import Database
from serving.jobs.tables import videos as _videos
from serving.jobs.video import HELD, VideoStatus

_columns = _videos.c


@dataclass(frozen=True, slots=True)
class Counted:
    """Unfinished videos. `held` ones wait for their key's others, `lapsed` ones for another runner."""

    by_state: Mapping[str, int]
    oldest_queued_seconds: float


class Census:
    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database, self._clock = database, clock

    async def take(self) -> Counted:
        """One look at the database."""
        return await asyncio.to_thread(self._take)

    def _take(self) -> Counted:
        now = self._clock()
        queued = _columns.status == VideoStatus.QUEUED
        state = case(
            (queued & (_columns.priority >= HELD), "held"),
            (queued, "queued"),
            (_columns.lease_until < now, "lapsed"),
            else_="in_progress",
        )
        query = (
            select(state.label("state"), func.count().label("videos"), func.min(_columns.created_at).label("oldest"))
            .where(_columns.status.in_((VideoStatus.QUEUED, VideoStatus.IN_PROGRESS)))
            .group_by(state)
        )
        by_state = dict.fromkeys(("queued", "held", "in_progress", "lapsed"), 0)
        oldest = now
        with self._database.read() as connection:
            for row in connection.execute(query):
                by_state[row.state] = row.videos
                if row.state == "queued":
                    oldest = row.oldest
        return Counted(by_state, max(0.0, now - oldest))
