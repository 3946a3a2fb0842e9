"""One video from prompt to fragments, over any text encoder, denoiser and decoder that keep the three protocols."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from serving.pipeline.captioning import Captioner
from serving.pipeline.stages import (
    Decoder,
    Denoiser,
    DenoiseRequest,
    Fragment,
    FrameEncoder,
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
_SEEDS = 2**63

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
    captioner: Captioner | None = None,
    encoder: FrameEncoder | None = None,
    source: NDArray[np.uint8] | None = None,
) -> None:
    """Await `sink` with every fragment once, in order, while later chunks are still being made.

    Returns after the sink took the last fragment. When cancelled, or when a stage or the sink raises, every stage is
    told to stop and has let go of the video before this returns. Raises `LostSession` when decoders keep losing the
    session.

    With `spec.best_of` above one, so many videos are denoised, of this seed and the following ones; only the one that
    `captioner` finds nearest to the prompt is decoded. Raises `ValueError` when there is no captioner then.

    `source` are the frames `[spec.source_frames, height, width, 3]` that a video with `spec.source` begins from, for
    `encoder` to make latents of. Raises `ValueError` when one of the two is missing.
    """
    run = _Generation(video_id, spec, text_encoder, denoiser, decoder, on_progress, captioner, encoder, source)
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
        captioner: Captioner | None,
        encoder: FrameEncoder | None,
        source: NDArray[np.uint8] | None,
    ) -> None:
        self._video_id, self._spec = video_id, spec
        self._text_encoder, self._denoiser, self._decoder = text_encoder, denoiser, decoder
        self._on_progress = on_progress
        self._captioner = captioner
        self._encoder, self._source = encoder, source
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
            request = await self._encode()
            events = self._denoiser.denoise(request) if self._spec.best_of == 1 else self._best(request)
            async with aclosing(events):
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

    async def _best(self, request: DenoiseRequest) -> AsyncGenerator[StepDone | LatentChunk, None]:
        """The steps of all candidates, then the chunks of the best; of equals the first."""
        if self._captioner is None:
            raise ValueError("the best of several was asked for, but there is no captioner")
        steps: asyncio.Queue[StepDone | None] = asyncio.Queue()
        candidates = [self._start(self._candidate(request, n, steps)) for n in range(self._spec.best_of)]
        for candidate in candidates:
            candidate.add_done_callback(lambda _: steps.put_nowait(None))
        count, running = 0, len(candidates)
        while running:
            step = await steps.get()
            if step is None:
                running -= 1
            else:
                count += 1
                yield StepDone(count, step.steps * len(candidates))
        agreements = []
        for candidate in candidates:
            latents = np.concatenate([chunk.latents for chunk in await candidate], axis=1)
            agreements.append(await self._captioner.agreement(latents, self._spec.rendered_prompt))
        for chunk in candidates[agreements.index(max(agreements))].result():
            yield chunk

    async def _candidate(
        self, request: DenoiseRequest, number: int, steps: asyncio.Queue[StepDone | None]
    ) -> list[LatentChunk]:
        spec = replace(self._spec, seed=(self._spec.seed + number) % _SEEDS)
        request = replace(request, video_id=f"{self._video_id}-{number}", spec=spec)
        chunks = []
        async with aclosing(self._denoiser.denoise(request)) as events:
            async for event in events:
                if isinstance(event, LatentChunk):
                    chunks.append(event)
                else:
                    steps.put_nowait(event)
        return chunks

    async def _encode(self) -> DenoiseRequest:
        spec = self._spec
        guided = spec.guidance_scale > 1
        return DenoiseRequest(
            video_id=self._video_id,
            spec=spec,
            conditional=await self._text_encoder.encode(spec.rendered_prompt),
            unconditional=await self._text_encoder.encode(spec.negative_prompt) if guided else None,
            scenes=tuple([(start, await self._text_encoder.encode(prompt)) for start, prompt in spec.scene_prompts]),
            source=await self._encode_source() if spec.source is not None else None,
        )

    async def _encode_source(self) -> NDArray[np.float32]:
        if self._encoder is None or self._source is None:
            missing = "encoder for its frames" if self._encoder is None else "frames of it"
            raise ValueError(f"{self._video_id} begins from another video or a picture, but there is no {missing}")
        return await self._encoder.encode_frames(self._source)

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
