"""A video's fragment log as its watchers see it, together with what only the store knows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, nullcontext, suppress
from dataclasses import dataclass

from fastapi.responses import StreamingResponse

from serving.api.errors import ApiError
from serving.jobs.fragment_log import FragmentLog, LogEnd, LogEntry, LogFailed
from serving.jobs.storage import Storage
from serving.jobs.store import Video, VideoStatus
from serving.media.trailer import error_box

_PIECE_BYTES = 1 << 17


@dataclass(frozen=True, slots=True)
class Shown:
    """What is in the log at one moment; `end` None means that more may come."""

    entries: Sequence[LogEntry]
    end: LogEnd | None


class Watch:
    """One video, for any number of watchers."""

    def __init__(self, storage: Storage, video: Video) -> None:
        self.video = video
        self.log = FragmentLog.open(storage.artifacts.videos_dir, video.id)
        self._store = storage.videos
        self._copies = storage.copies

    async def entries(self, from_fragment: int = 0) -> AsyncGenerator[LogEntry, None]:
        """As `FragmentLog.watch`, until the log is closed. Raises `LogFailed` when the video fails."""
        following = self._copies.following(self.video.id) if self._copies else nullcontext()
        async with following, aclosing(self.log.watch(from_fragment, ask_end=self.end_in_store)) as entries:
            async for entry in entries:
                yield entry

    async def wait_for(self, fragments: int, seconds: float) -> Shown:
        """What is there as soon as there are so many fragments, the video has ended, or the time is over."""
        if fragments > 0:
            with suppress(TimeoutError, LogFailed):
                async with asyncio.timeout(seconds), aclosing(self.entries(fragments - 1)) as entries:
                    async for _ in entries:
                        break
        return await self.shown()

    async def shown(self) -> Shown:
        # The store is asked first: what it says of a video that ended is said after the last fragment.
        in_store = await self.end_in_store()
        entries, end = await asyncio.to_thread(lambda: (self.log.entries(), self.log.end()))
        return Shown(entries, end or in_store)

    async def end_in_store(self) -> LogEnd | None:
        """A video can fail without anybody writing to its log: cancelled in the queue, or after its last attempt.

        And a log can be lost, but a completed video's never grows.
        """
        video = await self._store.get(self.video.id)
        if video is None or video.deleted_at is not None:
            return LogEnd("video_deleted", "The video is gone.")
        if self._copies is not None:
            await self._copies.catch_up(video)
        if video.status is VideoStatus.FAILED:
            return LogEnd(video.error_code or "failed", video.error_message or "The video failed.")
        return LogEnd() if video.status is VideoStatus.COMPLETED else None

    async def fragment(self, index: int) -> bytes:
        return await asyncio.to_thread(self.log.fragment, index)

    async def pieces(self, index: int) -> AsyncIterator[bytes]:
        """A fragment's bytes, a little at a time: that much is what a viewer who stops reading takes of the memory."""
        with await asyncio.to_thread(self.log.opened, index) as file:
            while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
                yield piece

    async def init(self) -> bytes:
        return await asyncio.to_thread(self.log.init)


def nothing_to_show(end: LogEnd) -> ApiError:
    """The answer for a video that ended without a fragment."""
    if end.error_code is None:
        return ApiError(404, "The video's fragments are gone.", param="video_id", code="not_found")
    return ApiError(400, f"The video failed: {end.error_message}", param="video_id", code="video_failed")


def stream_response(watch: Watch, from_fragment: int = 0) -> StreamingResponse:
    """Fragmented MP4. Closing this connection ends the watching, not the video."""
    return StreamingResponse(
        follow_video(watch, from_fragment), media_type="video/mp4", headers=stream_headers(watch.video)
    )


async def follow_video(watch: Watch, from_fragment: int = 0) -> AsyncIterator[bytes]:
    """The init segment, then each fragment as soon as it is in the log, until the video is whole.

    When it fails instead, the last thing is an `emsg` box that says why: players pass over it, and a client can tell
    it from a connection that was cut.
    """
    started = False
    try:
        async with aclosing(watch.entries(from_fragment)) as entries:
            async for entry in entries:
                if not started:
                    yield await watch.init()
                    started = True
                async for piece in watch.pieces(entry.index):
                    yield piece
    except LogFailed as failure:
        yield error_box(failure.code, failure.message)


def stream_headers(video: Video) -> dict[str, str]:
    """No cache, and no proxy that collects the answer before it hands it on."""
    return {"X-Video-Id": video.id, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
