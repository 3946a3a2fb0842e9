"""API keys: whose request it is, and how much its owner may have in hand. Only a hash of each is kept."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

from sqlalchemy import Connection, RowMapping, func, insert, select, update

from serving.jobs.database import Database
from serving.jobs.holding import open_sessions, running_videos
from serving.jobs.ids import new_id
from serving.jobs.tables import keys as _keys
from serving.jobs.tables import videos as _videos
from serving.jobs.video import VideoStatus

_MINUTE_SECONDS = 60.0
_BUSY_SECONDS = 5.0


class LimitReached(RuntimeError):  # noqa: N818
    """The key's owner has asked for too much; it may be otherwise after `retry_seconds`."""

    def __init__(self, message: str, retry_seconds: float) -> None:
        super().__init__(message)
        self.message, self.retry_seconds = message, retry_seconds


@dataclass(frozen=True, slots=True)
class ApiKey:
    """None means no limit: on videos asked for in a minute, on those that are queued or running at a time, and on those
    that are running. An open interactive session counts as a running video.

    A batch's videos count only for the last: they wait until nobody else does. `webhook_url` is told of every video's
    and every batch's end, beside the one that its request names.
    """

    id: str
    name: str
    created_at: float
    revoked_at: float | None = None
    max_per_minute: int | None = None
    max_unfinished: int | None = None
    max_running: int | None = None
    webhook_url: str | None = None


class KeyStore:
    """Keys are 256 random bits, so one round of SHA-256 is all that hiding them takes."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database, self._clock = database, clock

    def create(
        self,
        name: str,
        *,
        max_per_minute: int | None = None,
        max_unfinished: int | None = None,
        max_running: int | None = None,
        webhook_url: str | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key, and the secret that is never shown again."""
        secret = f"sk-rushes-{secrets.token_urlsafe(32)}"
        key = ApiKey(
            new_id("key_"), name, self._clock(), None, max_per_minute, max_unfinished, max_running, webhook_url
        )
        with self._database.write() as connection:
            connection.execute(insert(_keys), asdict(key) | {"digest": _digest(secret)})
        return key, secret

    def list(self) -> Sequence[ApiKey]:
        """All of them, the oldest first."""
        with self._database.read() as connection:
            return [_key(row) for row in connection.execute(select(_keys).order_by(_keys.c.id)).mappings()]

    def revoke(self, key_id: str) -> bool:
        """From now on it opens nothing; whether there was such a key."""
        with self._database.write() as connection:
            revoked = update(_keys).where(_keys.c.id == key_id).values(revoked_at=self._clock())
            return connection.execute(revoked).rowcount > 0

    async def find(self, secret: str) -> ApiKey | None:
        """The key with this secret, unless it was revoked."""
        return await asyncio.to_thread(self._find, secret)

    def _find(self, secret: str) -> ApiKey | None:
        query = select(_keys).where(_keys.c.digest == _digest(secret), _keys.c.revoked_at.is_(None))
        with self._database.read() as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else _key(row)


def locked_key(connection: Connection, owner: str | None) -> ApiKey | None:
    """The key that a video is of, locked, so that changes to its queue come one after another."""
    if owner is None:
        return None
    row = connection.execute(select(_keys).where(_keys.c.id == owner).with_for_update()).mappings().one_or_none()
    return None if row is None else _key(row)


def check_limits(connection: Connection, key: ApiKey, now: float) -> None:
    """In the transaction that is about to create a video of this locked key's. Raises `LimitReached`."""
    owner = key.id
    mine = select(func.count(), func.min(_videos.c.created_at)).where(
        _videos.c.owner == owner, _videos.c.batch_id.is_(None)
    )
    check_unfinished(connection, key, now)
    if key.max_per_minute is not None:
        # Ids sort by time, which is what the index on them is good for.
        count, oldest = connection.execute(
            mine.where(_videos.c.created_at > now - _MINUTE_SECONDS).where(
                _videos.c.id > f"video_{int((now - 2 * _MINUTE_SECONDS) * 1000):012x}"
            )
        ).one()
        if count >= key.max_per_minute:
            raise LimitReached(
                f"At most {key.max_per_minute} videos may be asked for in a minute.", oldest + _MINUTE_SECONDS - now
            )


def check_unfinished(connection: Connection, key: ApiKey, now: float) -> None:
    """Whether one more video or session may be begun. Raises `LimitReached`."""
    if key.max_unfinished is None:
        return
    unfinished = select(func.count()).where(
        _videos.c.owner == key.id,
        _videos.c.batch_id.is_(None),
        _videos.c.status.in_((VideoStatus.QUEUED, VideoStatus.IN_PROGRESS)),
    )
    if connection.execute(unfinished).scalar_one() + open_sessions(connection, key.id, now) >= key.max_unfinished:
        message = f"At most {key.max_unfinished} videos and sessions may be queued or running."
        raise LimitReached(message, _BUSY_SECONDS)


def check_running(connection: Connection, key: ApiKey, now: float) -> None:
    """Whether one more may run at once: for a session, which can't wait. Raises `LimitReached`."""
    if key.max_running is None:
        return
    if running_videos(connection, key.id) + open_sessions(connection, key.id, now) >= key.max_running:
        raise LimitReached(f"At most {key.max_running} videos and sessions may run at a time.", _BUSY_SECONDS)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _key(row: RowMapping) -> ApiKey:
    return ApiKey(**{field.name: row[field.name] for field in fields(ApiKey)})
