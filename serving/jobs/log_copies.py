"""Fragment logs for machines that share no directory: copies of the fragments in the file store, and logs made of them.

Whoever makes a video puts each fragment beside its artifacts when it is in the log, an object each, which never changes
(an attempt that is overtaken puts the same bytes). Whoever is asked for a video on another machine makes a log of its
own from them, and everything that reads logs reads that one. How a video ended only the store knows.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict

from serving.jobs.artifacts import Artifacts, video_key
from serving.jobs.fragment_log import FragmentLog, LogEntry, LogError
from serving.jobs.news import LogNews
from serving.jobs.protocol import VideoStore
from serving.jobs.video import StaleFence, Video, VideoStatus

_log = logging.getLogger(__name__)

# How soon a fragment is seen whose news got lost, or with a database that has none.
_LOOK_SECONDS = 0.15
# A log that was made here of copies, and that nobody has read for so long, is made again when it is asked for.
_KEPT_SECONDS = 3600.0
_MARK = "copied"


class LogCopies:
    """The copies of all videos' fragments, for those who make them and those who watch them elsewhere."""

    def __init__(self, artifacts: Artifacts, store: VideoStore, news: LogNews) -> None:
        self._artifacts, self._store, self._news = artifacts, store, news
        self._followed: dict[str, int] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turns: dict[str, asyncio.Lock] = {}

    async def put(self, log: FragmentLog, index: int) -> None:
        """Fragment `index`, which is in the log. Tries for a minute when the file store fails."""
        await self._artifacts.in_thread(self._put, log, index)
        await self._news.tell(log.video_id)

    async def put_missing(self, log: FragmentLog) -> None:
        """What an earlier attempt had in its log, and could not put any more."""
        there = await self._artifacts.in_thread(self._artifacts.names, video_key(log.video_id, "log"))
        for entry in await asyncio.to_thread(log.entries):
            if _name(entry.index) not in there:
                await self.put(log, entry.index)

    @asynccontextmanager
    async def following(self, video_id: str) -> AsyncIterator[None]:
        """Within the block, what is made of the video elsewhere comes into the log here."""
        self._followed[video_id] = self._followed.get(video_id, 0) + 1
        if video_id not in self._tasks:
            self._tasks[video_id] = asyncio.create_task(self._follow(video_id))
        try:
            yield
        finally:
            self._followed[video_id] -= 1
            if self._followed[video_id] == 0:
                del self._followed[video_id]
                task = self._tasks.pop(video_id)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def catch_up(self, video: Video) -> None:
        """All that there is of a video now comes into the log here; and its end, if it has ended. Harmless if it is all
        here already."""
        turn = self._turns.setdefault(video.id, asyncio.Lock())
        try:
            async with turn:
                await self._catch_up(video)
        except StaleFence:
            return  # it is being made on this very machine, and further on than the store said
        finally:
            if not turn.locked():
                self._turns.pop(video.id, None)

    async def _follow(self, video_id: str) -> None:
        await asyncio.to_thread(self._sweep)
        while True:
            try:
                video = await self._store.get(video_id)
                if video is None or video.deleted_at is not None:
                    return
                await self.catch_up(video)
                if video.status.final:
                    return
            except (OSError, LogError):
                _log.warning("%s: its fragments can't be had at the moment", video_id, exc_info=True)
            await self._news.wait(video_id, _LOOK_SECONDS)

    async def _catch_up(self, video: Video) -> None:
        log = FragmentLog.open(self._artifacts.videos_dir, video.id)
        entries, end = await asyncio.to_thread(lambda: (log.entries(), log.end()))
        if end is not None:
            return
        index, writer = len(entries), None
        while (found := await self._artifacts.in_thread(self._get, video.id, index)) is not None:
            entry, init, data = found
            if writer is None:
                writer = await FragmentLog.create(self._artifacts.videos_dir, video.id, fence=video.fence)
                if not entries:
                    await asyncio.to_thread((log.path / _MARK).touch)
            await writer.append(entry.index, entry.first_frame, entry.frames, init, data)
            index += 1
        if not video.status.final or (index == 0 and writer is None):
            return
        writer = writer or await FragmentLog.create(self._artifacts.videos_dir, video.id, fence=video.fence)
        if video.status is VideoStatus.COMPLETED:
            await writer.close()
        else:
            await writer.fail(video.error_code or "failed", video.error_message or "The video failed.")

    def _put(self, log: FragmentLog, index: int) -> None:
        entry, init = log.entries()[index], log.init()
        header = json.dumps(asdict(entry) | {"init_bytes": len(init)}).encode()
        data = header + b"\n" + init + log.fragment(index)
        self._artifacts.put_bytes_patiently(_key(log.video_id, index), data)

    def _get(self, video_id: str, index: int) -> tuple[LogEntry, bytes, bytes] | None:
        try:
            found = self._artifacts.get_bytes(_key(video_id, index))
        except FileNotFoundError:
            return None
        line, _, rest = found.partition(b"\n")
        header = json.loads(line)
        size = header.pop("init_bytes")
        return LogEntry(**header), rest[:size], rest[size:]

    def _sweep(self) -> None:
        """Delete logs that were made here of copies and that nobody reads: whoever sweeps the originals may be on
        another machine."""
        for mark in self._artifacts.videos_dir.glob(f"*/{_MARK}"):
            with suppress(FileNotFoundError):
                old = (mark.parent / "index.jsonl").stat().st_mtime < time.time() - _KEPT_SECONDS
                if old and mark.parent.name not in self._followed:
                    shutil.rmtree(mark.parent)


def _key(video_id: str, index: int) -> str:
    return video_key(video_id, f"log/{_name(index)}")


def _name(index: int) -> str:
    return f"{index:08d}"
