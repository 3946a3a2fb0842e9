"""Keys that may have only so many videos running: of their queue just as many can be claimed, and the rest is held.

So a claim stays what it is, a seek for the first video that isn't held, however many of a key's wait behind it. An open
interactive session takes a video's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Select, func, select, update

from serving.jobs.tables import live_sessions as _live
from serving.jobs.tables import videos as _videos
from serving.jobs.video import HELD, VideoStatus

_columns = _videos.c
_in_turn = (_columns.priority, _columns.created_at, _columns.id)


def balance(connection: Connection, owner: str, max_running: int, now: float) -> None:
    """After `owner`'s queue or sessions have changed, in the same transaction, with its key's row locked.

    Rows that somebody else has locked are left alone: they are being claimed or cancelled, and whoever does that
    balances again.
    """
    running = running_videos(connection, owner) + open_sessions(connection, owner, now)
    queued = (_columns.status == VideoStatus.QUEUED, _columns.priority < HELD)
    free = max_running - running - _count(connection, owner, *queued)
    held = _first(owner).where(_columns.priority >= HELD)
    if free > 0:
        _shift(connection, connection.execute(held.limit(free)).all(), -HELD)
        return
    # What came later but matters more goes first.
    last = select(_columns.id, _columns.priority).where(_columns.owner == owner, *queued)
    last = last.order_by(*(column.desc() for column in _in_turn)).with_for_update(skip_locked=True)
    waiting, ready = connection.execute(held.limit(1)).all(), connection.execute(last.limit(1)).all()
    if free < 0:
        _shift(connection, ready, HELD)
    elif waiting and ready and waiting[0].priority - HELD < ready[0].priority:
        _shift(connection, ready, HELD)
        _shift(connection, waiting, -HELD)


def running_videos(connection: Connection, owner: str) -> int:
    """How many of `owner`'s are being made."""
    return _count(connection, owner, _columns.status == VideoStatus.IN_PROGRESS)


def open_sessions(connection: Connection, owner: str, now: float) -> int:
    """How many interactive sessions of `owner`'s some replica still has."""
    alive = select(func.count()).where(_live.c.owner == owner, _live.c.lease_until > now)
    return int(connection.execute(alive).scalar_one())


def _first(owner: str) -> Select[Any]:
    mine = select(_columns.id, _columns.priority).where(_columns.owner == owner)
    return mine.where(_columns.status == VideoStatus.QUEUED).order_by(*_in_turn).with_for_update(skip_locked=True)


def _count(connection: Connection, owner: str, *conditions: Any) -> int:
    query = select(func.count()).select_from(_videos).where(_columns.owner == owner, *conditions)
    return int(connection.execute(query).scalar_one())


def _shift(connection: Connection, rows: Sequence[Any], by: int) -> None:
    for row in rows:
        connection.execute(update(_videos).where(_columns.id == row.id).values(priority=row.priority + by))
