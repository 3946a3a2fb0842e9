"""What is to be told to somebody: written with the change that it tells of, and kept until it was heard."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from serving.jobs.database import Database
from serving.jobs.ids import new_id
from serving.jobs.tables import deliveries as _deliveries

_LEASE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """`payload` is the event as JSON text: the same bytes each time it is sent."""

    id: str
    url: str
    payload: str
    created_at: float
    attempts: int
    next_at: float


def announce(connection: Connection, kind: str, subject: str, url: str, now: float) -> None:
    """Put an event such as `video.completed` about `subject`, an id, into the outbox, in the caller's transaction."""
    identity = new_id("evt_")
    event = {"id": identity, "object": "event", "type": kind, "created_at": int(now), "data": {"id": subject}}
    payload = json.dumps(event, separators=(",", ":"))
    row = Delivery(identity, url, payload, created_at=now, attempts=0, next_at=now)
    connection.execute(insert(_deliveries), {field.name: getattr(row, field.name) for field in fields(row)})


def announce_to(connection: Connection, kind: str, subject: str, urls: Iterable[str | None], now: float) -> None:
    """`announce` to each of these that is one, once."""
    for url in dict.fromkeys(urls):
        if url is not None:
            announce(connection, kind, subject, url, now)


class Outbox:
    """Deliveries that are due. Whoever claims one has it for two minutes."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database, self.clock = database, clock

    async def claim(self) -> Delivery | None:
        """One that is due, with this attempt counted."""
        return await asyncio.to_thread(self._claim)

    async def retry(self, delivery: Delivery, after_seconds: float) -> None:
        """It could not be made."""
        await asyncio.to_thread(self._retry, delivery, after_seconds)

    async def remove(self, delivery: Delivery) -> None:
        """It was made, or given up."""
        await asyncio.to_thread(self._remove, delivery)

    def _claim(self) -> Delivery | None:
        with self._database.write() as connection:
            now = self.clock()
            query = (
                select(_deliveries)
                .where(_deliveries.c.next_at <= now)
                .order_by(_deliveries.c.next_at)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            row = connection.execute(query).mappings().first()
            if row is None:
                return None
            taken: dict[str, Any] = {"attempts": row["attempts"] + 1, "next_at": now + _LEASE_SECONDS}
            connection.execute(update(_deliveries).where(_deliveries.c.id == row["id"]).values(taken))
            return Delivery(**{**row, **taken})

    def _retry(self, delivery: Delivery, after_seconds: float) -> None:
        with self._database.write() as connection:
            later = {"next_at": self.clock() + after_seconds}
            connection.execute(update(_deliveries).where(_deliveries.c.id == delivery.id).values(later))

    def _remove(self, delivery: Delivery) -> None:
        with self._database.write() as connection:
            connection.execute(delete(_deliveries).where(_deliveries.c.id == delivery.id))
