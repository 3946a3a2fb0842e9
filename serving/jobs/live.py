"""Open interactive sessions of keys: each takes a running video's place among what its key may have.

The replica of the API that has a session renews its lease; when that replica dies, the session ends with it, and its
place is free as soon as the lease has run out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from sqlalchemy import delete, select, update

from serving.jobs.database import Database
from serving.jobs.holding import balance
from serving.jobs.keys import check_running, check_unfinished, locked_key
from serving.jobs.tables import live_sessions as _live

LEASE_SECONDS = 30.0


class LiveSessions:
    """Those of keys; whoever has none isn't limited."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database, self._clock = database, clock

    async def open(self, session_id: str, owner: str) -> None:
        """Take a place for a session. Raises `LimitReached`."""
        await asyncio.to_thread(self._open, session_id, owner)

    async def renew(self, session_id: str, owner: str) -> bool:
        """It is still there; whether its key is still good."""
        return await asyncio.to_thread(self._renew, session_id, owner)

    async def close(self, session_id: str, owner: str) -> None:
        """It has ended: one of the key's videos that wait may go on."""
        await asyncio.to_thread(self._close, session_id, owner)

    async def forget_lapsed(self) -> int:
        """Close those whose replica hasn't been heard of; how many they were."""
        return await asyncio.to_thread(self._forget_lapsed)

    def _open(self, session_id: str, owner: str) -> None:
        with self._database.write() as connection:
            key, now = locked_key(connection, owner), self._clock()
            if key is not None:
                check_unfinished(connection, key, now)
                check_running(connection, key, now)
            self._database.insert_new(connection, _live, self._row(session_id, owner))
            if key is not None and key.max_running is not None:
                balance(connection, owner, key.max_running, now)

    def _renew(self, session_id: str, owner: str) -> bool:
        with self._database.write() as connection:
            key, row = locked_key(connection, owner), self._row(session_id, owner)
            renewed = update(_live).where(_live.c.id == session_id).values(lease_until=row["lease_until"])
            if not connection.execute(renewed).rowcount:
                self._database.insert_new(connection, _live, row)  # it lapsed while the database was away
            return key is None or key.revoked_at is None

    def _close(self, session_id: str, owner: str) -> None:
        with self._database.write() as connection:
            key = locked_key(connection, owner)
            connection.execute(delete(_live).where(_live.c.id == session_id))
            if key is not None and key.max_running is not None:
                balance(connection, owner, key.max_running, self._clock())

    def _forget_lapsed(self) -> int:
        with self._database.read() as connection:
            query = select(_live.c.id, _live.c.owner).where(_live.c.lease_until <= self._clock())
            lapsed = connection.execute(query).all()
        for session in lapsed:
            self._close(session.id, session.owner)
        return len(lapsed)

    def _row(self, session_id: str, owner: str) -> dict[str, object]:
        return {"id": session_id, "owner": owner, "lease_until": self._clock() + LEASE_SECONDS}
