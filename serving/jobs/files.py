"""Uploaded files, the ones that batches answer with, and characters: what is known of each; the bytes are an artifact.

A character is a picture under a name of its own, with another kind of id, and in no list of files.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sqlalchemy import RowMapping, delete, insert, select

from serving.jobs.artifacts import Artifacts
from serving.jobs.database import Database
from serving.jobs.ids import is_id, new_id
from serving.jobs.pages import Order, page_of
from serving.jobs.tables import files as _files

FILE, CHARACTER = "file-", "char_"
LONGEST_LIFETIME_SECONDS = 30 * 86400


@dataclass(frozen=True, slots=True)
class StoredFile:
    """Times are seconds since the epoch; `owner` is the id of the API key that it belongs to."""

    id: str
    owner: str | None
    purpose: str
    filename: str
    size_bytes: int
    sha256: str
    created_at: float
    expires_at: float | None

    @property
    def key(self) -> str:
        """Of the artifact."""
        return f"files/{self.id}"


class FileStore:
    """Files: first the bytes are stored and then the record, and the other way around when they are deleted."""

    def __init__(self, database: Database, artifacts: Artifacts, *, clock: Callable[[], float] = time.time) -> None:
        self._database, self._artifacts, self._clock = database, artifacts, clock

    async def add(
        self,
        source: Path,
        *,
        owner: str | None,
        purpose: str,
        filename: str,
        lifetime_seconds: float | None,
        kind: str = FILE,
    ) -> StoredFile:
        """Take the file `source`, which is gone afterwards. `kind` is what its id begins with."""
        return await asyncio.to_thread(self._add, source, owner, purpose, filename, lifetime_seconds, kind)

    async def get(self, file_id: str) -> StoredFile | None:
        """None also for what has expired."""
        return await asyncio.to_thread(self._get, file_id)

    async def list(
        self,
        *,
        owner: str | None = None,
        purpose: str | None = None,
        limit: int = 10_000,
        order: Order = "desc",
        after: str | None = None,
    ) -> tuple[Sequence[StoredFile], bool]:
        """Files by time, those after the id `after`, and whether there are more."""
        return await asyncio.to_thread(self._list, owner, purpose, limit, order, after)

    async def remove(self, file: StoredFile) -> None:
        """Harmless when it is gone."""
        await asyncio.to_thread(self._remove, file)

    async def expired(self, limit: int) -> Sequence[StoredFile]:
        """Files whose time is over."""
        return await asyncio.to_thread(self._expired, limit)

    def _add(
        self,
        source: Path,
        owner: str | None,
        purpose: str,
        filename: str,
        lifetime_seconds: float | None,
        kind: str,
    ) -> StoredFile:
        file_id, now = new_id(kind), self._clock()
        artifact = self._artifacts.put(f"files/{file_id}", source)
        expires_at = None if lifetime_seconds is None else now + lifetime_seconds
        file = StoredFile(file_id, owner, purpose, filename, artifact.size_bytes, artifact.sha256, now, expires_at)
        with self._database.write() as connection:
            connection.execute(insert(_files), asdict(file))
        return file

    def _get(self, file_id: str) -> StoredFile | None:
        with self._database.read() as connection:
            row = connection.execute(select(_files).where(_files.c.id == file_id)).mappings().one_or_none()
        file = None if row is None else _file(row)
        return file if file is not None and not self._over(file) else None

    def _list(
        self, owner: str | None, purpose: str | None, limit: int, order: Order, after: str | None
    ) -> tuple[Sequence[StoredFile], bool]:
        query = page_of(_files, owner=owner, limit=limit, order=order, after=after)
        query = query.where(_files.c.id.startswith(FILE))
        query = query.where((_files.c.expires_at.is_(None)) | (_files.c.expires_at > self._clock()))
        if purpose is not None:
            query = query.where(_files.c.purpose == purpose)
        with self._database.read() as connection:
            found = [_file(row) for row in connection.execute(query).mappings()]
        return found[:limit], len(found) > limit

    def _remove(self, file: StoredFile) -> None:
        with self._database.write() as connection:
            connection.execute(delete(_files).where(_files.c.id == file.id))
        self._artifacts.remove(file.key)

    def _expired(self, limit: int) -> Sequence[StoredFile]:
        query = select(_files).where(_files.c.expires_at <= self._clock()).order_by(_files.c.expires_at).limit(limit)
        with self._database.read() as connection:
            return [_file(row) for row in connection.execute(query).mappings()]

    def _over(self, file: StoredFile) -> bool:
        return file.expires_at is not None and file.expires_at <= self._clock()


def is_file_id(text: str) -> bool:
    return is_id(FILE, text)


def is_character_id(text: str) -> bool:
    return is_id(CHARACTER, text)


def _file(row: RowMapping) -> StoredFile:
    return StoredFile(**{field.name: row[field.name] for field in fields(StoredFile)})
