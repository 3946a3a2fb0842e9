"""A video's bytes while it is made: its fragment log, followed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

from serving.jobs.fragment_log import FragmentLog, LogEnd
from serving.jobs.store import VideoStatus, VideoStore


async def follow_video(store: VideoStore, videos_dir: Path, video_id: str) -> AsyncIterator[bytes]:
    """The init segment, then each fragment as soon as it is in the log, until the video is whole.

    Raises `LogFailed` when it never will be: cutting the connection is how a client can tell that from the end.
    """

    async def end_in_store() -> LogEnd | None:
        """A video can fail without anybody writing to its log: cancelled in the queue, or after its last attempt."""
        video = await store.get(video_id)
        if video is None:
            return LogEnd("failed", "The video is gone.")
        if video.status is VideoStatus.FAILED:
            return LogEnd(video.error_code or "failed", video.error_message or "The video is gone.")
        return None

    log = FragmentLog.open(videos_dir, video_id)
    async with aclosing(log.follow(ask_end=end_in_store)) as parts:
        async for part in parts:
            yield part
