"""One video from prompt to fragments, over any text encoder, denoiser and decoder that keep the three protocols."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from serving.pipeline.stages import (
    Decoder,
    Denoiser,
    DenoiseRequest,
    Fragment,
    LatentChunk,
    LostSession,
    StepDone,
    TextEncoder,
    VideoSpec,
)

# Chunks handed to the decoder and not yet taken by the sink: one being decoded, one waiting behind it.
WINDOW = 2
# A video whose decoder session is lost this often for one chunk is given up.
MAX_REPLAYS = 3

Sink = Callable[[Fragment], Awaitable[None]]
OnProgress = Callable[[StepDone], None]

_T = TypeVar("_T")


async def generate(
    video_id: str,
    spec: VideoSpec,
    *,
    text_encoder: TextEncoder,
    denoiser: Denoiser,
    decoder: Decoder,
    sink: Sink,
    on_progress: OnProgress | None = None,
) -> None:
    """Await `sink` with every fragment once, in order, while later chunks are still being made.

    Returns after the sink took the last fragment. When cancelled, or when a stage or the sink raises, every stage is
    told to stop and has let go of the video before this returns. Raises `LostSession` when decoders keep losing the
    session.
    """
    run = _Generation(video_id, spec, text_encoder, denoiser, decoder, on_progress)
    try:
        await run.to(sink)
    except BaseException:
        await run.abandon()
        raise


class _Generation:
    def __init__(
        self,
        video_id: str,
        spec: VideoSpec,
        text_encoder: TextEncoder,
        denoiser: Denoiser,
        decoder: Decoder,
        on_progress: OnProgress | None,
    ) -> None:
        self._video_id, self._spec = video_id, spec
        self._text_encoder, self._denoiser, self._decoder = text_encoder, denoiser, decoder
        self._on_progress = on_progress
        self._chunks: list[LatentChunk] = []
        self._decodes: asyncio.Queue[asyncio.Task[Fragment] | None] = asyncio.Queue()
        self._places = asyncio.Semaphore(WINDOW)
        self._tasks: set[asyncio.Task[Any]] = set()

    async def to(self, sink: Sink) -> None:
        denoising = self._start(self._denoise())
        while (decode := await self._decodes.get()) is not None:
            await sink(await decode)
            self._places.release()
        await denoising

    async def abandon(self) -> None:
        """Stop what runs, and wait until it has stopped: the denoiser's rows and the decoder's cache are free then."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._decoder.close(self._video_id)

    async def _denoise(self) -> None:
        previous: asyncio.Task[Fragment] | None = None
        try:
            async with aclosing(self._denoiser.denoise(await self._encode())) as events:
                async for event in events:
                    if isinstance(event, LatentChunk):
                        await self._places.acquire()
                        self._chunks.append(event)
                        previous = self._start(self._decode(event, previous))
                        self._decodes.put_nowait(previous)
                    elif self._on_progress:
                        self._on_progress(event)
        finally:
            self._decodes.put_nowait(None)

    async def _encode(self) -> DenoiseRequest:
        spec = self._spec
        guided = spec.guidance_scale > 1
        return DenoiseRequest(
            video_id=self._video_id,
            spec=spec,
            conditional=await self._text_encoder.encode(spec.prompt),
            unconditional=await self._text_encoder.encode(spec.negative_prompt) if guided else None,
            scenes=tuple([(start, await self._text_encoder.encode(prompt)) for start, prompt in spec.scene_prompts]),
        )

    async def _decode(self, chunk: LatentChunk, previous: asyncio.Task[Fragment] | None) -> Fragment:
        """Decode a chunk; when the session is lost, first decode the chunks before it again (exact, so dropped)."""
        try:
            return await self._decoder.decode(self._video_id, self._spec, chunk)
        except LostSession:
            # The chunk before may be in flight, or replaying itself: two replays at once would undo each other.
            if previous is not None:
                await asyncio.wait([previous])
        for replay in range(MAX_REPLAYS):
            try:
                for earlier in self._chunks[: chunk.index] if replay or previous is None else ():
                    await self._decoder.decode(self._video_id, self._spec, earlier)
                return await self._decoder.decode(self._video_id, self._spec, chunk)
            except LostSession:
                continue
        raise LostSession(f"{self._video_id}: chunk {chunk.index} lost its decoder session {MAX_REPLAYS + 1} times")

    def _start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: whoever waits for the task raises it, and after a failure nobody may
