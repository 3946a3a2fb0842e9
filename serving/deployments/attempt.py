"""One attempt at one video: the stages make it, the fragment log shows it, the store knows how it stands. No Ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from tenacity import before_sleep_log, retry_if_not_exception_type, stop_after_delay, wait_exponential
from tenacity.asyncio import AsyncRetrying

from models.bundle import PreviewInfo
from serving.deployments.timing import Timing
from serving.jobs.artifacts import Artifact, Artifacts, checkpoint_key, video_key
from serving.jobs.checkpoint import identity_of
from serving.jobs.fragment_log import FragmentLog, LogError, LogWriter
from serving.jobs.keeper import Keeper
from serving.jobs.log_copies import LogCopies
from serving.jobs.previews import Previews
from serving.jobs.store import StaleFence, Video, VideoNotFound, VideoStore
from serving.jobs.video import BATCH
from serving.logs import about
from serving.media.fmp4 import remux_to_mp4
from serving.media.frames import read_all
from serving.media.latents import latent_preview
from serving.media.previews import sprite_sheet, thumbnail
from serving.pipeline.captioning import Captioner
from serving.pipeline.cleanup import seen_through
from serving.pipeline.generation import generate
from serving.pipeline.rewriting import Rewriter, revise
from serving.pipeline.stages import (
    Decoder,
    Fragment,
    FrameEncoder,
    LatentChunk,
    OtherBundle,
    Steerable,
    StepDone,
    TextEncoder,
    VideoSpec,
)
from serving.tracing import below, record_beginning

_log = logging.getLogger(__name__)

# How often progress is written, and how soon a running video hears at the latest that it was cancelled.
_REPORT_SECONDS = 0.5
# What of `progress` the steps make up; the decoded frames make up the rest.
_STEPS_SHARE = 0.8
# Those that a video is given back to may still be starting.
_OTHER_BUNDLE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Stages:
    """What makes the videos of one model; `bundle_digest` names its weights, `preview` says how latents look."""

    text_encoder: TextEncoder
    denoiser: Steerable
    decoder: Decoder
    rewriter: Rewriter | None = None
    captioner: Captioner | None = None
    encoder: FrameEncoder | None = None
    bundle_digest: str = ""
    preview: PreviewInfo | None = None


@dataclass(frozen=True, slots=True)
class AttemptSettings:
    """Times are in seconds. Every `checkpoint_steps` steps a bidirectional video's sampler is kept; 0 means never."""

    lease_seconds: float
    max_attempts: int
    checkpoint_steps: int = 0
    log_prompts: bool = False


class Attempt:
    """Drives a claimed video to its end, unless its fence goes stale or the runner must go."""

    def __init__(
        self,
        video: Video,
        stages: Stages,
        store: VideoStore,
        artifacts: Artifacts,
        settings: AttemptSettings,
        copies: LogCopies | None = None,
        previews: Previews | None = None,
    ) -> None:
        """`copies` is where other machines get the fragments from, if they don't see the log itself; `previews` where
        chunks are to be seen before they are decoded."""
        self._video, self._stages, self._settings = video, stages, settings
        self._store, self._artifacts, self._copies, self._previews = store, artifacts, copies, previews
        self._showing: set[asyncio.Task[None]] = set()
        self._finished: dict[str, Artifact] = {}
        self._log_bytes = 0
        self._spec = VideoSpec(**video.request)
        self._timing = Timing(video, self._spec.frames)
        self._step = StepDone(0, 0)
        self._frames_done = 0
        self._appended = 0
        self._headway_told = 0
        self._keeper: Keeper | None = None
        self._told = asyncio.Event()
        self._cancel_requested = False
        self._stale = False

    def tell(self) -> None:
        """The store has news of the video: look now, and not only when the next report is due."""
        self._told.set()

    async def run(self) -> None:
        """Returns when the video has ended, is queued for another try, or belongs to another attempt.

        When this is cancelled the video goes back to the queue, and the try doesn't count.
        """
        video = self._video
        numbers = {"attempt": video.attempt, "fence": video.fence}
        if video.batch_id is not None and video.fence == 1:
            created, batch = int(1e9 * video.created_at), {"batch.id": video.batch_id}
            record_beginning(video.id, "batch line", created, time.time_ns(), model=video.model, **batch)
        with about(video_id=video.id, attempt=video.attempt), below(video.id, "attempt", model=video.model, **numbers):
            said = f": {video.prompt}" if self._settings.log_prompts else ""
            _log.info("attempt %d at %s of %s s begins%s", video.attempt, video.size, video.seconds, said)
            await self._run()

    async def _run(self) -> None:
        making = asyncio.create_task(self._make())
        reporting = asyncio.create_task(self._report(making))
        try:
            await asyncio.wait({making})
        except asyncio.CancelledError:
            await seen_through(self._hand_back(making))
            raise
        finally:
            await _stop(reporting)
        await seen_through(self._end(making))

    async def _hand_back(self, making: asyncio.Task[None]) -> None:
        await _stop(making)
        await self._stop_keeping()
        with suppress(StaleFence):
            await self._store.requeue(self._video.id, self._video.fence, count_attempt=False)
            self._timing.ended("requeued")

    async def _end(self, making: asyncio.Task[None]) -> None:
        await self._stop_keeping()
        outcome = "stale"
        if not self._stale:
            with suppress(StaleFence):
                outcome = await self._settle(making)
        self._timing.ended(outcome)

    async def _make(self) -> None:
        video = self._video
        spec = await revise(self._spec, self._stages.rewriter)
        if spec != self._spec:
            # Before anything depends on it: another attempt takes this one, whatever a rewriter would say then.
            await self._written(lambda: self._store.set_request(video.id, video.fence, asdict(spec)))
            self._spec = spec
        identity = identity_of(self._stages.bundle_digest, asdict(spec))
        directory = self._artifacts.videos_dir
        writer = await FragmentLog.create(directory, video.id, fence=video.fence, origin=identity)
        self._keeper = Keeper(self._artifacts, video.id, identity, writer.check_fence)
        self._frames_done = writer.frames
        if self._copies is not None:
            await self._copies.put_missing(writer.log)
        # An attempt that ended between the last fragment and the finished file left nothing to be denoised or decoded.
        if not writer.trusted or writer.frames < spec.frames:
            await self._generate(writer, self._keeper)
        await writer.close()
        await self._artifacts.in_thread(self._finish, writer.log)

    async def _generate(self, writer: LogWriter, keeper: Keeper) -> None:
        async def append(fragment: Fragment) -> None:
            await writer.append(fragment.index, fragment.first_frame, fragment.frames, fragment.init, fragment.data)
            if self._copies is not None:
                await self._copies.put(writer.log, fragment.index)
            self._frames_done = writer.frames
            if fragment.index >= writer.trusted:
                self._appended += 1
                self._timing.chunk(fragment.first_frame)

        await generate(
            self._video.id,
            self._spec,
            text_encoder=self._stages.text_encoder,
            denoiser=self._stages.denoiser,
            decoder=self._stages.decoder,
            sink=append,
            on_progress=self._on_step,
            captioner=self._stages.captioner,
            encoder=self._stages.encoder,
            source=await self._source(),
            keeping=keeper,
            state_every=self._settings.checkpoint_steps,
            shown=writer.trusted,
            interactive=self._video.priority < BATCH,
            on_chunk=self._on_chunk if self._is_shown_early else None,
        )

    @property
    def _is_shown_early(self) -> bool:
        """A tiny decoder is about as quick as the picture's way through the database; of a batch nobody sees any."""
        return self._video.priority < BATCH and self._spec.decoder == "full"

    def _on_chunk(self, chunk: LatentChunk) -> None:
        """The making doesn't wait for its picture."""
        if self._previews is not None and self._stages.preview is not None:
            showing = asyncio.create_task(self._show(self._previews, chunk, self._stages.preview))
            self._showing.add(showing)
            showing.add_done_callback(self._showing.discard)

    async def _show(self, previews: Previews, chunk: LatentChunk, colours: PreviewInfo) -> None:
        try:
            picture = await asyncio.to_thread(latent_preview, chunk.latents, colours)
            await previews.put(self._video.id, chunk.index, picture)
        except Exception:
            _log.warning("%s: chunk %d is not to be seen early", self._video.id, chunk.index, exc_info=True)

    async def _source(self) -> NDArray[np.uint8] | None:
        """The frames that the video begins from."""
        spec = self._spec
        if spec.source is None:
            return None
        with self._artifacts.scratch() as path:
            await self._artifacts.in_thread(self._artifacts.fetch, spec.source, path)
            # What was kept has the size and the rate already: it was checked when the video was asked for.
            return await self._artifacts.in_thread(read_all, path, spec.width, spec.height, spec.source_frames)

    def _finish(self, log: FragmentLog) -> None:
        """The log as one file, and the pictures of it."""
        artifacts, made = self._artifacts, {}
        with artifacts.scratch() as video, artifacts.scratch() as picture:
            remux_to_mp4(log.init(), log.fragments(), video)
            for name, derive in (("thumbnail.webp", thumbnail), ("spritesheet.jpg", sprite_sheet)):
                picture.write_bytes(derive(video))
                made[name] = artifacts.put(video_key(log.video_id, name), picture)
            made["video.mp4"] = artifacts.put(video_key(log.video_id, "video.mp4"), video)
        self._finished, self._log_bytes = made, sum(entry.size_bytes for entry in log.entries())

    async def _settle(self, making: asyncio.Task[None]) -> str:
        """Write down how it went, and say it."""
        video, store = self._video, self._store
        error = None if making.cancelled() else making.exception()
        if isinstance(error, StaleFence):
            return "stale"
        if not making.cancelled() and error is None:
            await self._forget_checkpoint()
            await self._written(
                lambda: store.complete(video.id, video.fence, artifacts=self._finished, log_bytes=self._log_bytes)
            )
            return "completed"
        if self._cancel_requested:
            await self._fail("cancelled", "The video was cancelled.")
            return "cancelled"
        if isinstance(error, OtherBundle):
            # This runner is of the bundle before, and is to go: its successors know what becomes of the video.
            await asyncio.sleep(_OTHER_BUNDLE_SECONDS)
            await self._written(lambda: store.requeue(video.id, video.fence, count_attempt=False))
            return "requeued"
        _log.error("%s: attempt %d failed", video.id, video.attempt, exc_info=error)
        if self._headway() > self._headway_told:
            video = await self._written(self._report_progress)
        # What is in the log can't be made to fit by trying again.
        hopeless = isinstance(error, LogError) or video.attempt - video.lapses >= self._settings.max_attempts
        if not hopeless:
            await self._written(lambda: store.requeue(video.id, video.fence))
            return "requeued"
        # Ray wraps a replica's error in its whole remote traceback: the last line says what it was.
        said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        await self._fail("generation_failed", said[:500])
        return "failed"

    async def _written(self, write: Callable[[], Awaitable[Video]]) -> Video:
        """What has been made is not to be lost because the store is away for a moment, such as for a restart."""
        gone = retry_if_not_exception_type((StaleFence, VideoNotFound, asyncio.CancelledError))
        waits, stops = wait_exponential(multiplier=0.1, max=1), stop_after_delay(self._settings.lease_seconds)
        says = before_sleep_log(_log, logging.WARNING)

        async def once() -> Video:
            return await write()

        return await AsyncRetrying(retry=gone, wait=waits, stop=stops, before_sleep=says, reraise=True)(once)

    async def _fail(self, code: str, message: str) -> None:
        video, videos_dir = self._video, self._artifacts.videos_dir
        try:
            # Before the store knows: a video that has ended may be deleted, and nothing may be written after that.
            writer: LogWriter = await FragmentLog.create(videos_dir, video.id, fence=video.fence)
            await writer.fail(code, message)
        except (OSError, LogError):
            _log.warning("%s: its log has no end", video.id, exc_info=True)
        await self._forget_checkpoint()
        await self._written(lambda: self._store.fail(video.id, video.fence, code, message))

    async def _stop_keeping(self) -> None:
        """Nothing more is kept or shown from here on; what the next attempt can use has been put by then."""
        for showing in self._showing:
            showing.cancel()
        if self._keeper is not None:
            await self._keeper.close(flush=not self._cancel_requested and not self._stale)

    async def _forget_checkpoint(self) -> None:
        """It has served its purpose; what can't be removed now is swept later."""
        try:
            await self._artifacts.in_thread(self._artifacts.remove_all, checkpoint_key(self._video.id))
        except Exception:
            _log.warning("%s: its checkpoint could not be removed", self._video.id, exc_info=True)

    def _on_step(self, done: StepDone) -> None:
        self._step = done

    def _progress(self) -> int:
        """Whole per cent, never less than an earlier attempt said; 100 is kept for the video that can be downloaded."""
        steps_done = self._step.step / self._step.steps if self._step.steps else 0.0
        part = _STEPS_SHARE * steps_done + (1 - _STEPS_SHARE) * self._frames_done / self._spec.frames
        return max(self._video.progress, min(99, int(100 * part)))

    def _headway(self) -> int:
        """How much of what this attempt has made the next one need not make again."""
        return self._appended + (self._keeper.kept if self._keeper else 0)

    async def _report_progress(self) -> Video:
        headway = self._headway()
        told = await self._store.set_progress(
            self._video.id,
            self._video.fence,
            self._progress(),
            headway=headway > self._headway_told,
            step=self._step.step,
            steps=self._step.steps,
        )
        self._headway_told = headway
        return told

    async def _report(self, making: asyncio.Task[None]) -> None:
        """Write progress as it changes and keep the lease; stop the making when either says so."""
        video, settings = self._video, self._settings
        written = video.progress
        leased_at = time.monotonic()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(_REPORT_SECONDS, settings.lease_seconds / 6)):
                    await self._told.wait()
            asked = self._told.is_set()
            self._told.clear()
            news = video
            try:
                if asked or time.monotonic() - leased_at > settings.lease_seconds / 3:
                    news = await self._store.heartbeat(video.id, video.fence, settings.lease_seconds)
                    leased_at = time.monotonic()
                if not news.cancel_requested and (self._progress() != written or self._headway() > self._headway_told):
                    written = self._progress()
                    news = await self._report_progress()
            except StaleFence:
                self._stale = True
                making.cancel()
                return
            except Exception:  # a store that is away for a moment; the lease says how long that may last
                _log.warning("%s: the store could not be written", video.id, exc_info=True)
            if news.cancel_requested:
                self._cancel_requested = True
                making.cancel()
                return


async def _stop(task: asyncio.Task[object]) -> None:
    task.cancel()
    await asyncio.wait({task})
