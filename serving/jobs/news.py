"""Word from one process to the others that a video's log has grown: PostgreSQL's LISTEN and NOTIFY.

It makes waiting short and is nothing to rely on: with another database nobody says anything, and a connection that is
cut loses what was said meanwhile. So whoever waits looks by itself too, only less often.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

from sqlalchemy import text

from serving.jobs.bell import Bell
from serving.jobs.database import Database

_log = logging.getLogger(__name__)

_CHANNEL = "rushes_logs"
_LOOK_SECONDS = 0.5
_PAUSE_SECONDS = 1.0


class LogNews:
    """What this process tells, and hears from the moment on that somebody waits for the first time."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._bell = Bell()
        self._listening: threading.Thread | None = None

    async def tell(self, video_id: str) -> None:
        """The video's log has grown. Never raises: it is heard of anyway, only later."""
        if self._database.is_sqlite:
            return
        try:
            await asyncio.to_thread(self._tell, video_id)
        except Exception:
            _log.warning("%s: nobody could be told of its log", video_id, exc_info=True)

    async def wait(self, video_id: str, seconds: float) -> None:
        """Until there is word of the video, but not for longer."""
        self._listen()
        await self._bell.wait(video_id, seconds)

    def _tell(self, video_id: str) -> None:
        with self._database.write() as connection:
            connection.execute(text("SELECT pg_notify(:channel, :video)"), {"channel": _CHANNEL, "video": video_id})

    def _listen(self) -> None:
        if self._listening is None and not self._database.is_sqlite:
            loop = asyncio.get_running_loop()
            self._listening = threading.Thread(target=self._hear, args=(loop,), name="news", daemon=True)
            self._listening.start()

    def _hear(self, loop: asyncio.AbstractEventLoop) -> None:
        pause = threading.Event()
        while not loop.is_closed():
            try:
                self._hear_until_cut(loop)
            except Exception:
                _log.warning("no word of logs can be heard at the moment", exc_info=True)
                pause.wait(_PAUSE_SECONDS)

    def _hear_until_cut(self, loop: asyncio.AbstractEventLoop) -> None:
        import psycopg

        engine = self._database.engine
        args, options = engine.dialect.create_connect_args(engine.url)
        connection: Any = psycopg.connect(*args, **options, autocommit=True)
        with connection:
            connection.execute(f"LISTEN {_CHANNEL}")
            while not loop.is_closed():
                for note in connection.notifies(timeout=_LOOK_SECONDS):
                    self._bell.ring(note.payload)
