"""The runner: claims queued videos and takes each through the stages, several at a time. No Ray."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict

from serving.deployments.attempt import Attempt, AttemptSettings, Stages
from serving.jobs.checkpoint import identity_of
from serving.jobs.fragment_log import FragmentLog
from serving.jobs.storage import Storage
from serving.jobs.store import StaleFence, Video
from serving.jobs.video import BATCH, HELD
from serving.pipeline.cleanup import seen_through
from serving.pipeline.stages import VideoSpec
from serving.pipeline.turns import most_of_others

_log = logging.getLogger(__name__)


class Runner:
    """Works on up to `max_videos` videos of `stages`' models at a time. Start it with `run`, end it with `drain`.

    A batch's never have all of these places, so that a video that somebody is waiting for finds one.
    """

    def __init__(
        self,
        storage: Storage,
        stages: Mapping[str, Stages],
        settings: AttemptSettings,
        *,
        max_videos: int,
        poll_seconds: float,
        retiring: Mapping[str, Stages] | None = None,
    ) -> None:
        """`retiring` are the stages of bundles that models had before."""
        self.id = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._store, self._artifacts, self._copies = storage.videos, storage.artifacts, storage.copies
        self._previews = storage.previews
        self._stages, self._retiring, self._settings = stages, retiring or {}, settings
        self._poll_seconds = poll_seconds
        self._places, self._batch_places = asyncio.Semaphore(max_videos), most_of_others(max_videos)
        self._attempts: set[asyncio.Task[None]] = set()
        self._by_video: dict[str, Attempt] = {}
        self._news, self._taking = asyncio.Event(), asyncio.Lock()
        self._draining = False

    @property
    def running(self) -> int:
        """Videos in hand."""
        return len(self._attempts)

    @property
    def draining(self) -> bool:
        return self._draining

    def wake(self) -> None:
        """There may be something in the queue."""
        self._news.set()

    def tell(self, video_id: str) -> None:
        """Somebody wants a video to stop: the store says so, and its attempt had better look. It may not be here."""
        if attempt := self._by_video.get(video_id):
            attempt.tell()

    async def run(self) -> None:
        """Claim and work until `drain`. When this is cancelled, what is in hand goes back to the queue."""
        try:
            while not self._draining:
                await self._places.acquire()
                # A claim that is broken off may have been made all the same, of a video that nobody would know of.
                if not await seen_through(self._take()):
                    await self._wait_for_news()
            await self._rest()
        finally:
            await asyncio.sleep(0)  # an attempt that is cancelled before it has begun never puts its video back
            for attempt in self._attempts:
                attempt.cancel()
            await self._rest()

    async def drain(self) -> None:
        """Take nothing new, and return when what is in hand has ended."""
        self._draining = True
        self._news.set()
        async with self._taking:
            pass
        await self._rest()

    async def _rest(self) -> None:
        while self._attempts:
            await asyncio.wait(set(self._attempts))

    async def _take(self) -> bool:
        """The next video in the queue, and begin with it; whether there was one. Its place is taken already."""
        async with self._taking:
            video = None if self._draining else await self._claim()
            if video is None:
                self._places.release()
                return False
            self._start(video)
            return True

    async def _claim(self) -> Video | None:
        self._news.clear()
        try:
            below = HELD if self._batch_places else BATCH
            return await self._store.claim(self.id, self._settings.lease_seconds, below=below)
        except Exception:  # the store is away for a moment: look again after a pause
            _log.warning("no claim could be made", exc_info=True)
            return None

    async def _wait_for_news(self) -> None:
        try:
            async with asyncio.timeout(self._poll_seconds):
                await self._news.wait()
        except TimeoutError:
            pass

    def _start(self, video: Video) -> None:
        attempt = asyncio.create_task(self._attempt(video))
        self._attempts.add(attempt)
        self._batch_places -= video.priority >= BATCH
        attempt.add_done_callback(lambda attempt: self._ended(attempt, video))

    async def _attempt(self, video: Video) -> None:
        try:
            stages = await self._stages_of(video)
            if stages is None:
                await self._store.fail(
                    video.id, video.fence, "model_not_found", f"There is no model {video.model!r} any more."
                )
                return
            attempt = Attempt(video, stages, self._store, self._artifacts, self._settings, self._copies, self._previews)
            self._by_video[video.id] = attempt
            await attempt.run()
        except asyncio.CancelledError:
            if video.id not in self._by_video:
                with suppress(StaleFence):
                    await self._store.requeue(video.id, video.fence, count_attempt=False)
            raise
        except Exception:  # the lease runs out, and then it is tried again
            _log.exception("%s: the attempt broke off", video.id)
        finally:
            self._by_video.pop(video.id, None)

    async def _stages_of(self, video: Video) -> Stages | None:
        """Its model's; for a video that began with the bundle before, those of that one."""
        before = self._retiring.get(video.model)
        if before is not None:
            log = FragmentLog.open(self._artifacts.videos_dir, video.id)
            origin = await asyncio.to_thread(log.origin)
            if origin == identity_of(before.bundle_digest, asdict(VideoSpec(**video.request))):
                return before
        return self._stages.get(video.model)

    def _ended(self, attempt: asyncio.Task[None], video: Video) -> None:
        self._attempts.discard(attempt)
        self._places.release()
        if video.priority >= BATCH:
            self._batch_places += 1
            self._news.set()  # the next of a batch may be claimed
