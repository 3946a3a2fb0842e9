"""What is kept as files: each video's MP4 and pictures, and what clients upload. Anywhere that fsspec can write.

A file is there whole or not at all. Its size and hash are kept in the database, so that nobody has to ask the file
store for more than bytes.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tenacity import before_sleep_log, retry, retry_if_not_exception_type, stop_after_delay, wait_exponential

from serving.jobs.fragment_log import FragmentLog
from serving.metrics import ARTIFACTS
from serving.threads import background_pool

_log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 18
# A file store that is away for so long costs no attempt at a video.
_PATIENCE_SECONDS = 60
_SCRATCH_SECONDS = 86400
CHECKPOINTS = "checkpoints"
# More than a runner has videos in hand.
_THREADS = 64

_T = TypeVar("_T")


_patient = retry(
    retry=retry_if_not_exception_type(FileNotFoundError),
    stop=stop_after_delay(_PATIENCE_SECONDS),
    wait=wait_exponential(multiplier=0.2, max=10),
    before_sleep=before_sleep_log(_log, logging.WARNING),
    reraise=True,
)


class ArtifactError(OSError):
    """The file store can't be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """One file as the database knows it."""

    size_bytes: int
    sha256: str


class Artifacts:
    """Files by key, such as `videos/video_…/thumbnail.webp`; and `videos_dir`, where the fragment logs are.

    The logs are always in a directory, since they grow by appending. Everybody who makes or watches videos must share
    it, unless `LogCopies` bring the fragments from one to the other.
    """

    def __init__(self, data_dir: Path, url: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        """Files go below `url`, such as `s3://bucket/prefix`, or below `data_dir`. Raises `ArtifactError`."""
        try:
            self._files, self._root = fsspec.core.url_to_fs(url or str(data_dir), **(options or {}))
        except (ImportError, ValueError) as error:
            raise ArtifactError(f"no files can be kept at {url}: {error}") from None
        self._local = isinstance(self._files, LocalFileSystem)
        self.videos_dir = data_dir / "videos"
        self._scratch = data_dir / "scratch"
        for directory in (self.videos_dir, self._scratch):
            directory.mkdir(parents=True, exist_ok=True)
        self._threads = background_pool(_THREADS, "files")

    async def in_thread(self, work: Callable[..., _T], *args: Any) -> _T:
        """Call `work` in a thread for files. asyncio's own few threads must stay free: when a file store hangs, leases
        have to be kept all the same."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A path for a file that is about to be put; what is left of it afterwards is deleted."""
        descriptor, name = tempfile.mkstemp(dir=self._scratch)
        os.close(descriptor)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def put(self, key: str, source: Path) -> Artifact:
        """Take the file `source`, which is gone afterwards; until this returns, nothing shows under `key`.

        Tries for a minute when the file store fails. Raises `OSError` or what fsspec's own kind of file system raises.
        """
        with open(source, "rb") as file:
            artifact = Artifact(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())
            os.fsync(file.fileno())
        with ARTIFACTS.time(operation="put"):
            self._put(self._path(key), source)
        return artifact

    async def read(self, key: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Bytes `start` to `stop` (exclusive) of a file, a piece at a time. Raises `FileNotFoundError`."""
        file = await asyncio.to_thread(self._files.open, self._path(key), "rb")
        try:
            await asyncio.to_thread(file.seek, start)
            while start < stop:
                piece: bytes = await asyncio.to_thread(file.read, min(_PIECE_BYTES, stop - start))
                if not piece:
                    raise EOFError(f"{key} ends at byte {start}")
                start += len(piece)
                yield piece
        finally:
            await asyncio.to_thread(file.close)

    def fetch(self, key: str, target: Path) -> None:
        """Copy a file to `target`. Tries for a minute when the file store fails; raises `FileNotFoundError` at once."""
        with ARTIFACTS.time(operation="fetch"):
            self._fetch(key, target)

    @_patient
    def _fetch(self, key: str, target: Path) -> None:
        with self._files.open(self._path(key), "rb") as file, target.open("wb") as copy:
            shutil.copyfileobj(file, copy, _PIECE_BYTES)

    def put_bytes(self, key: str, data: bytes) -> None:
        """As `put`, for what is in memory; tried once."""
        with self.scratch() as path:
            path.write_bytes(data)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            self._put_once(self._path(key), path)

    @_patient
    def put_bytes_patiently(self, key: str, data: bytes) -> None:
        """As `put`, for what is in memory."""
        self.put_bytes(key, data)

    def get_bytes(self, key: str) -> bytes:
        """All of a file. Raises `FileNotFoundError`."""
        data: bytes = self._files.cat_file(self._path(key))
        return data

    def names(self, key: str) -> list[str]:
        """What lies directly below `key`; nothing when there is no such directory."""
        self._files.invalidate_cache()
        try:
            found = self._files.ls(self._path(key), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def remove_all(self, key: str) -> None:
        """Delete everything below `key`; harmless when nothing is there."""
        self._files.invalidate_cache()
        with suppress(FileNotFoundError):
            self._files.rm(self._path(key), recursive=True)

    @contextmanager
    def lines(self, key: str) -> Iterator[Iterator[bytes]]:
        """A text file's lines, read as they are asked for. Raises `FileNotFoundError`."""
        with self._files.open(self._path(key), "rb") as file:
            yield iter(file)

    def remove(self, key: str) -> None:
        """Delete a file; harmless when it is gone."""
        with suppress(FileNotFoundError):
            self._files.rm_file(self._path(key))

    def remove_video(self, video_id: str) -> None:
        """Delete a video's files and its fragment log; harmless when they are gone. Raises `ValueError` for no id."""
        log = FragmentLog.open(self.videos_dir, video_id)
        for key in (f"videos/{video_id}", checkpoint_key(video_id)):
            self.remove_all(key)
        shutil.rmtree(log.path, ignore_errors=True)

    def clear_scratch(self) -> None:
        """Delete what processes that were killed have left."""
        for path in self._scratch.iterdir():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - _SCRATCH_SECONDS:
                    path.unlink()

    def _path(self, key: str) -> str:
        if not all(part.strip(".") for part in key.split("/")) or "\\" in key:
            raise ValueError(f"not a key: {key!r}")
        return f"{self._root.rstrip('/')}/{key}"

    @_patient
    def _put(self, path: str, source: Path) -> None:
        self._put_once(path, source)

    def _put_once(self, path: str, source: Path) -> None:
        if self._local:
            _move(source, Path(path))
        else:
            self._files.put_file(str(source), path)  # an object appears when all of it has arrived


def video_key(video_id: str, name: str) -> str:
    return f"videos/{video_id}/{name}"


def checkpoint_key(video_id: str) -> str:
    """Apart from the videos, so that those that were left behind are found without looking through all of them."""
    return f"{CHECKPOINTS}/{video_id}"


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = target.with_name(f".{target.name}.{source.name}.tmp")
        try:
            with open(source, "rb") as original, open(beside, "wb") as copy:
                shutil.copyfileobj(original, copy)
                copy.flush()
                os.fsync(copy.fileno())
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
