"""A video's bytes while it is made: its fragment log, followed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

from serving.jobs.fragment_log import FragmentLog, LogFailed
from serving.jobs.store import VideoStatus, VideoStore

# A video can fail without anybody writing to its log: cancelled in the queue, or after its last attempt.
_LOOK_AT_STORE_SECONDS = 2.0


async def follow_video(store: VideoStore, videos_dir: Path, video_id: str) -> AsyncIterator[bytes]:
    """The init segment, then each fragment as soon as it is in the log, until the video is whole.

    Raises `LogFailed` when it never will be: cutting the connection is how a client can tell that from the end.
    """
    log = FragmentLog.open(videos_dir, video_id)
    async with aclosing(log.follow()) as parts:
        while True:
            following = asyncio.ensure_future(anext(parts, None))
            try:
                while not (await asyncio.wait({following}, timeout=_LOOK_AT_STORE_SECONDS))[0]:
                    video = await store.get(video_id)
                    if video is None or (video.status is VideoStatus.FAILED and log.end() is None):
                        code = (video and video.error_code) or "failed"
                        raise LogFailed(code, (video and video.error_message) or "The video is gone.")
                part = following.result()
            finally:
                # The generator can be closed only when nothing is waiting inside it.
                following.cancel()
                await asyncio.wait({following})
            if part is None:
                return
            yield part
