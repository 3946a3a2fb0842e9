"""What has ended is kept until its time is over or the disk is wanted for something newer."""

from __future__ import annotations

import asyncio
import logging

from serving.jobs.artifacts import CHECKPOINTS, Artifacts, checkpoint_key
from serving.jobs.files import FileStore
from serving.jobs.live import LiveSessions
from serving.jobs.protocol import VideoStore
from serving.jobs.video import Video

_log = logging.getLogger(__name__)

_AT_A_TIME = 100


class Sweeper:
    """Deletes videos: first their files and then their records, so that what is cut short is done again.

    Any number of processes may sweep at once.
    """

    def __init__(
        self,
        store: VideoStore,
        artifacts: Artifacts,
        *,
        files: FileStore | None = None,
        live: LiveSessions | None = None,
        quota_bytes: int | None = None,
    ) -> None:
        """Uploaded `files` that have expired go too, and `live` sessions whose replica has died.

        Beyond `quota_bytes` of videos, fragment logs included, those that expire soonest go early.
        """
        self._store, self._artifacts, self._files, self._live = store, artifacts, files, live
        self._quota_bytes = quota_bytes

    async def run(self, every_seconds: float) -> None:
        """Sweep until this is cancelled."""
        while True:
            try:
                await self.sweep()
            except Exception:  # a store that is away for a moment
                _log.warning("the sweep broke off", exc_info=True)
            await asyncio.sleep(every_seconds)

    async def sweep(self) -> int:
        """Delete what may go; how many videos that were."""
        await asyncio.to_thread(self._artifacts.clear_scratch)
        if self._live is not None:
            await self._live.forget_lapsed()
        while self._files is not None and (files := await self._files.expired(_AT_A_TIME)):
            for file in files:
                await self._files.remove(file)
        swept = 0
        while videos := await self._store.expired(_AT_A_TIME):
            for video in videos:
                await self.remove(video)
            swept += len(videos)
        if self._quota_bytes is not None:
            while videos := await self._store.beyond_quota(self._quota_bytes, _AT_A_TIME):
                for video in videos:
                    _log.info("%s goes before its time: there are more than %d bytes", video.id, self._quota_bytes)
                    await self.remove(video)
                swept += len(videos)
        await self._sweep_checkpoints()
        return swept

    async def _sweep_checkpoints(self) -> None:
        """Those of videos that have ended without an attempt that could remove them, or that are gone."""
        for video_id in await self._artifacts.in_thread(self._artifacts.names, CHECKPOINTS):
            video = await self._store.get(video_id)
            if video is None or video.status.final:
                await self._artifacts.in_thread(self._artifacts.remove_all, checkpoint_key(video_id))

    async def remove(self, video: Video) -> None:
        """Delete one video that has ended."""
        await asyncio.to_thread(self._artifacts.remove_video, video.id)
        await self._store.remove(video.id)
