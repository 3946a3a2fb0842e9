"""One video from prompt to fragments, over any text encoder, denoiser and decoder that keep the three protocols."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from serving.jobs.checkpoint import Checkpoint, Piece
from serving.pipeline.captioning import Captioner
from serving.pipeline.cleanup import seen_through
from serving.pipeline.stages import (
    Decoder,
    Denoiser,
    DenoiseRequest,
    EncodedSource,
    Fragment,
    FrameEncoder,
    LatentChunk,
    LostSession,
    SamplerState,
    StepDone,
    TextEncoder,
    VideoSpec,
)
from serving.tracing import carrier

# Chunks handed to the decoder and not yet taken by the sink: one being decoded, one waiting behind it.
WINDOW = 2
# A video whose decoder session is lost this often for one chunk is given up.
MAX_REPLAYS = 3
# And one whose denoiser is lost this often before it has made a step.
MAX_REOPENS = 5
_FIRST_PAUSE_SECONDS = 0.2
_SEEDS = 2**63

Sink = Callable[[Fragment], Awaitable[None]]
OnProgress = Callable[[StepDone], None]
OnChunk = Callable[[LatentChunk], None]

_T = TypeVar("_T")


class Keeping(Protocol):
    """Where what is finished outlives whoever made it. A video with `best_of` has as many candidates, else there is
    one, 0; all but the seed is the same."""

    async def begun(self, candidate: int) -> Checkpoint:
        """What was kept of it; an empty checkpoint when nothing was that can be trusted."""

    def keep_chunk(self, candidate: int, chunk: Piece) -> None:
        """The next chunk is finished. Returns at once; so does `keep_state`."""

    def keep_state(self, candidate: int, state: Piece) -> None:
        """The sampler's newest state; older ones are of no use any more."""


class KeepNothing:
    """For a video that is made in one go or not at all."""

    async def begun(self, candidate: int) -> Checkpoint:
        return Checkpoint()

    def keep_chunk(self, candidate: int, chunk: Piece) -> None:
        pass

    def keep_state(self, candidate: int, state: Piece) -> None:
        pass


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
    keeping: Keeping | None = None,
    state_every: int = 0,
    shown: int = 0,
    interactive: bool = True,
    on_chunk: OnChunk | None = None,
) -> None:
    """Await `sink` with every fragment once, in order, while later chunks are still being made.

    Returns after the sink took the last fragment. When cancelled, or when a stage or the sink raises, every stage is
    told to stop and has let go of the video before this returns. Raises `LostSession` when decoders or denoisers keep
    losing the session.

    With `spec.best_of` above one, so many videos are denoised, of this seed and the following ones; only the one that
    `captioner` finds nearest to the prompt is decoded. Raises `ValueError` when there is no captioner then.

    `source` are the frames `[spec.source_frames, height, width, 3]` that a video with `spec.source` begins from, for
    `encoder` to make latents of. Raises `ValueError` when one of the two is missing.

    What `keeping` has is not denoised again, and it is given what is; a sampler's state every `state_every` steps. The
    first `shown` fragments are where they belong already: the sink isn't given them, and nothing is encoded for them.
    An `interactive` video is one that somebody may be watching. `on_chunk` gets each other chunk before it is decoded.
    """
    run = _Generation(
        video_id,
        spec,
        text_encoder,
        denoiser,
        decoder,
        on_progress,
        captioner,
        encoder,
        source,
        keeping or KeepNothing(),
        state_every,
        shown,
        interactive,
        on_chunk,
    )
    try:
        await run.to(sink)
    except BaseException:
        await seen_through(run.abandon())
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
        keeping: Keeping,
        state_every: int,
        shown: int,
        interactive: bool,
        on_chunk: OnChunk | None,
    ) -> None:
        self._video_id, self._spec = video_id, spec
        self._text_encoder, self._denoiser, self._decoder = text_encoder, denoiser, decoder
        self._on_progress, self._on_chunk = on_progress, on_chunk
        self._captioner = captioner
        self._encoder, self._source = encoder, source
        self._keeping, self._state_every, self._shown = keeping, state_every, shown
        self._interactive = interactive
        self._request: asyncio.Task[DenoiseRequest] | None = None
        self._chunks: list[LatentChunk] = []
        self._decodes: asyncio.Queue[asyncio.Task[Fragment | None] | None] = asyncio.Queue()
        self._places = asyncio.Semaphore(WINDOW)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._first_out = asyncio.Event()

    async def to(self, sink: Sink) -> None:
        denoising = self._start(self._denoise())
        while (decode := await self._decodes.get()) is not None:
            if (fragment := await decode) is not None:
                await sink(fragment)
                self._first_out.set()
            self._places.release()
        await denoising

    async def abandon(self) -> None:
        """Stop what runs, and wait until it has stopped: the denoiser's rows and the decoder's cache are free then."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._decoder.close(self._video_id)

    async def _denoise(self) -> None:
        previous: asyncio.Task[Fragment | None] | None = None
        more = False  # steps to be made
        try:
            events = self._denoised(0) if self._spec.best_of == 1 else self._best()
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, LatentChunk):
                        if self._on_chunk and event.index >= self._shown:
                            self._on_chunk(event)
                        await self._places.acquire()
                        self._chunks.append(event)
                        previous = self._start(self._decode(event, previous))
                        self._decodes.put_nowait(previous)
                        if event.index == 0 and more and self._interactive and not self._shown:
                            # The denoiser sees that nobody asks for more, and leaves the cores to the first picture.
                            await self._first_out.wait()
                    else:
                        more = event.step < event.steps
                        if self._on_progress:
                            self._on_progress(event)
        finally:
            self._decodes.put_nowait(None)

    async def _denoised(self, candidate: int) -> AsyncGenerator[StepDone | LatentChunk, None]:
        """What is there already, and then what the denoiser makes of the rest. One that is lost is opened again."""
        begun = await self._keeping.begun(candidate)
        for index, latents in enumerate(begun.chunks):
            yield LatentChunk(index, latents, last=begun.whole and index == len(begun.chunks) - 1)
        losses = 0
        while not begun.whole:
            request = await self._candidate(candidate, begun)
            try:
                async with aclosing(self._denoiser.denoise(request)) as events:
                    async for event in events:
                        if isinstance(event, SamplerState):
                            begun = begun.with_state(event.step, event.state)
                            self._keeping.keep_state(candidate, Piece(event.state, event.step))
                        elif isinstance(event, StepDone):
                            losses = 0
                            yield event
                        elif event.index == len(begun.chunks):  # a bidirectional video says all of them again
                            begun = begun.with_chunk(event.latents, last=event.last)
                            self._keeping.keep_chunk(candidate, Piece(event.latents, event.index, event.last))
                            yield event
                return
            except LostSession:
                losses += 1
                if losses > MAX_REOPENS:
                    raise
                # Not all at once: a video that takes its denoiser down should not find the others there again.
                await pause(losses)

    async def _best(self) -> AsyncGenerator[StepDone | LatentChunk, None]:
        """The steps of all candidates, then the chunks of the best; of equals the first."""
        if self._captioner is None:
            raise ValueError("the best of several was asked for, but there is no captioner")
        steps: asyncio.Queue[tuple[int, StepDone] | None] = asyncio.Queue()
        candidates = [self._start(self._all_of(n, steps)) for n in range(self._spec.best_of)]
        for candidate in candidates:
            candidate.add_done_callback(lambda _: steps.put_nowait(None))
        running, done = len(candidates), [0] * len(candidates)
        while running:
            said = await steps.get()
            if said is None:
                running -= 1
            else:
                number, step = said
                done[number] = step.step
                yield StepDone(sum(done), step.steps * len(candidates))
        agreements = []
        for candidate in candidates:
            latents = np.concatenate([chunk.latents for chunk in await candidate], axis=1)
            agreements.append(await self._captioner.agreement(latents, self._spec.rendered_prompt))
        for chunk in candidates[agreements.index(max(agreements))].result():
            yield chunk

    async def _all_of(self, number: int, steps: asyncio.Queue[tuple[int, StepDone] | None]) -> list[LatentChunk]:
        chunks = []
        async with aclosing(self._denoised(number)) as events:
            async for event in events:
                if isinstance(event, LatentChunk):
                    chunks.append(event)
                else:
                    steps.put_nowait((number, event))
        return chunks

    async def _candidate(self, number: int, begun: Checkpoint) -> DenoiseRequest:
        """What to ask the denoiser. The prompt and the source are encoded once, and only if something is to be made."""
        if self._request is None:
            self._request = self._start(self._encode())
        encoded = await self._request
        request = replace(
            encoded,
            begun=begun,
            state_every=self._state_every,
            interactive=self._interactive,
            trace=carrier(),
        )
        if self._spec.best_of == 1:
            return request
        spec = replace(self._spec, seed=(self._spec.seed + number) % _SEEDS)
        return replace(request, video_id=f"{self._video_id}-{number}", spec=spec)

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

    async def _encode_source(self) -> EncodedSource:
        if self._encoder is None or self._source is None:
            missing = "encoder for its frames" if self._encoder is None else "frames of it"
            raise ValueError(f"{self._video_id} begins from another video or a picture, but there is no {missing}")
        return await self._encoder.encode_source(self._source, self._spec.frames)

    async def _decode(self, chunk: LatentChunk, previous: asyncio.Task[Fragment | None] | None) -> Fragment | None:
        """Decode a chunk; when the session is lost, first decode the chunks before it again (exact, so dropped).

        None for a chunk that is shown already.
        """
        try:
            return await self._once(chunk)
        except LostSession:
            # The chunk before may be in flight, or replaying itself: two replays at once would undo each other.
            if previous is not None:
                await asyncio.wait([previous])
        for replay in range(MAX_REPLAYS):
            try:
                for earlier in self._chunks[: chunk.index] if replay or previous is None else ():
                    await self._replay(earlier)
                return await self._once(chunk)
            except LostSession:
                await pause(replay)
        raise LostSession(f"{self._video_id}: chunk {chunk.index} lost its decoder session {MAX_REPLAYS + 1} times")

    async def _once(self, chunk: LatentChunk) -> Fragment | None:
        if chunk.index >= self._shown:
            return await self._decoder.decode(self._video_id, self._spec, chunk, interactive=self._interactive)
        await self._replay(chunk)
        return None

    async def _replay(self, chunk: LatentChunk) -> None:
        await self._decoder.replay(self._video_id, self._spec, chunk, interactive=self._interactive)

    def _start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: whoever waits for the task raises it, and after a failure nobody may


async def pause(tries: int) -> None:
    """Before the next try, the longer the more there were; not as long for everybody."""
    await asyncio.sleep(_FIRST_PAUSE_SECONDS * 2**tries * random.uniform(0.5, 1.5))
