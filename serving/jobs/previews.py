"""Small pictures of the chunks of running videos, from whoever makes them to whoever watches, on any machine.

In the database and not beside the fragments: they are a kilobyte or two, must be seen before the chunk is, and nobody
wants them when the video has ended, which is when the store deletes them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from sqlalchemy import select

from serving.jobs.database import Database
from serving.jobs.tables import previews as _previews


class Previews:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, video_id: str, chunk: int, picture: bytes) -> None:
        """A JPEG of the chunk. Another attempt's is the same."""
        await asyncio.to_thread(self._put, video_id, chunk, picture)

    async def since(self, video_id: str, chunk: int) -> Sequence[tuple[int, bytes]]:
        """Those of this chunk and later ones, in order."""
        return await asyncio.to_thread(self._since, video_id, chunk)

    def _put(self, video_id: str, chunk: int, picture: bytes) -> None:
        with self._database.write() as connection:
            row = {"video_id": video_id, "chunk": chunk, "picture": picture}
            self._database.insert_new(connection, _previews, row)

    def _since(self, video_id: str, chunk: int) -> Sequence[tuple[int, bytes]]:
        found = select(_previews.c.chunk, _previews.c.picture).where(
            _previews.c.video_id == video_id, _previews.c.chunk >= chunk
        )
        with self._database.read() as connection:
            return [(row.chunk, row.picture) for row in connection.execute(found.order_by(_previews.c.chunk))]
