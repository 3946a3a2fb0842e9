"""An endless video that is steered while it is made: from prompts to fragments, paced by whoever plays it.

No log and no checkpoint: a fragment is handed out once. What is kept is what the stages need to go on when one of their
replicas dies: the latents of the last chunks, and of the context's sinks. So memory doesn't grow with the video.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from models.bundle import Manifest
from serving.jobs.checkpoint import Checkpoint
from serving.pipeline.cleanup import seen_through
from serving.pipeline.endless import ENDLESS
from serving.pipeline.generation import MAX_REOPENS, MAX_REPLAYS, pause
from serving.pipeline.geometry import first_frame
from serving.pipeline.rewriting import Rewriter, revise
from serving.pipeline.stages import (
    Decoder,
    DenoiseRequest,
    Fragment,
    LatentChunk,
    LostSession,
    Steerable,
    Steering,
    StepDone,
    TextEmbedding,
    TextEncoder,
    VideoSpec,
)
from serving.tracing import carrier

# What a decoder that has lost its session is shown again: more latent frames than its convolutions look back on.
_KEPT_CHUNKS = 8
# Prompts that wait for a chunk to be denoised under them, or a newer one.
_MOST_PROMPTS = 32
_ASK_AGAIN_SECONDS = 0.1
_SHORTEST_WAIT_SECONDS = 0.02


class LiveStages(Protocol):
    """What makes the endless videos of one model."""

    @property
    def text_encoder(self) -> TextEncoder: ...
    @property
    def denoiser(self) -> Steerable: ...
    @property
    def decoder(self) -> Decoder: ...
    @property
    def rewriter(self) -> Rewriter | None: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """What was asked for, and what is rendered of it; `number` counts them from 0."""

    number: int
    text: str
    rendered: str


@dataclass(frozen=True, slots=True)
class LiveFragment:
    """One fragment, the prompt that it was denoised under, and whether it is the first under that one."""

    fragment: Fragment
    prompt: Prompt
    prompt_changed: bool


class Interaction:
    """One session. `fragments` makes it; everything else steers what that makes.

    It is never more than `buffer_seconds` ahead of playback: of a clock that starts with the first fragment and stands
    still while nothing is there to play or the session is paused, and of the last fragment that was acknowledged.
    """

    def __init__(
        self,
        id: str,
        manifest: Manifest,
        spec: VideoSpec,
        stages: LiveStages,
        *,
        buffer_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`id` is the stages' name for it. Raises `ValueError` for a model that isn't causal."""
        if manifest.rollout != "causal":
            raise ValueError(f"{manifest.name} is {manifest.rollout}: only a causal model can go on and on")
        self.id = id
        self._manifest, self._spec, self._stages = manifest, spec, stages
        self._playback = _Playback(manifest, buffer_seconds, clock)
        self._prompts: list[Prompt] = []
        self._embedding: TextEmbedding | None = None
        self._told = Steering(0)
        self._opened, self._news = asyncio.Event(), asyncio.Event()
        self._chunks: asyncio.Queue[LatentChunk] = asyncio.Queue()
        self._out: asyncio.Queue[LiveFragment | BaseException | None] = asyncio.Queue()
        self._last_chunks: int | None = None
        self._sinks: list[LatentChunk] = []
        self._last: deque[LatentChunk] = deque(maxlen=max(_KEPT_CHUNKS, manifest.window.window_chunks))
        self._decoded: deque[LatentChunk] = deque(maxlen=_KEPT_CHUNKS)
        self._made = 0

    @property
    def prompt(self) -> Prompt:
        """The newest one; chunks that are already made, or being made, are of an older."""
        return self._prompts[-1]

    @property
    def paused(self) -> bool:
        return self._playback.paused

    async def begin(self) -> Prompt:
        """The first prompt, encoded. Before anything else."""
        return await self.change_prompt(self._spec.prompt)

    async def change_prompt(self, text: str) -> Prompt:
        """From the next chunk that is begun on. Returns when the denoiser is about to be told.

        Raises `ValueError` when too many changes have not been shown yet.
        """
        if len(self._prompts) >= _MOST_PROMPTS:
            raise ValueError(f"the prompt was changed {len(self._prompts) - 1} times since a chunk was last made")
        spec = await revise(replace(self._spec, prompt=text, revised_prompt=None), self._stages.rewriter)
        embedding = await self._stages.text_encoder.encode(spec.rendered_prompt)
        number = self._prompts[-1].number + 1 if self._prompts else 0
        self._prompts.append(Prompt(number, text, spec.rendered_prompt))
        self._embedding = embedding
        self._news.set()
        return self.prompt

    def pause(self) -> None:
        """No further chunk is begun."""
        self._playback.pause()
        self._news.set()

    def resume(self) -> None:
        self._playback.resume()
        self._news.set()

    def acknowledge(self, index: int) -> None:
        """Whoever plays it has fragment `index`, and all before it. Raises `ValueError` for one that isn't out."""
        self._playback.acknowledge(index)
        self._news.set()

    def finish(self) -> None:
        """`fragments` ends after the chunk that is being made, if one is, and what is made before it."""
        if self._last_chunks is None:
            self._last_chunks = self._made + (self._told.chunks > self._made)
            self._news.set()
            self._out.put_nowait(None)  # it may be waiting for what won't come

    async def fragments(self) -> AsyncGenerator[LiveFragment, None]:
        """Without end, but for `finish`. Closing it frees every stage.

        Raises what a stage raises, and `LostSession` when they keep losing the session.
        """
        unconditional = None
        if self._spec.guidance_scale > 1:
            unconditional = await self._stages.text_encoder.encode(self._spec.negative_prompt)
        tasks = [self._start(work) for work in (self._denoise(unconditional), self._decode(), self._pace())]
        shown, given = -1, 0
        try:
            while self._last_chunks is None or given < self._last_chunks:
                made = await self._out.get()
                if made is None:
                    continue
                if isinstance(made, BaseException):
                    raise made
                changed, shown = made.prompt.number != shown, made.prompt.number
                given = made.fragment.index + 1
                self._playback.out(made.fragment)
                self._news.set()
                yield replace(made, prompt_changed=changed)
        finally:
            await seen_through(self._abandon(tasks))

    async def _abandon(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stages.decoder.close(self.id)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._out.put_nowait(error)

    async def _denoise(self, unconditional: TextEmbedding | None) -> None:
        losses = 0
        while True:
            assert self._embedding is not None
            steering = self._told = self._wanted()
            request = DenoiseRequest(
                self.id,
                self._spec,
                conditional=self._embedding,
                unconditional=unconditional,
                begun=Checkpoint(chunks=tuple(chunk.latents for chunk in self._remembered())),
                steering=steering,
                chunks_before=self._made,
                trace=carrier(),
            )
            try:
                async with aclosing(self._stages.denoiser.denoise(request)) as events:
                    async for event in events:
                        # Only what is open can be steered, and there is a first event only if a chunk may be begun.
                        self._opened.set()
                        if isinstance(event, StepDone):
                            losses = 0
                        elif isinstance(event, LatentChunk):
                            self._keep(event)
                            self._chunks.put_nowait(event)
            except LostSession:
                losses += 1
                if losses > MAX_REOPENS:
                    raise
                self._opened.clear()
                await pause(losses)

    def _keep(self, chunk: LatentChunk) -> None:
        if chunk.index != self._made:
            raise LostSession(f"{self.id}: chunk {chunk.index} came instead of {self._made}")
        if chunk.index < self._manifest.window.sink_chunks:
            self._sinks.append(chunk)
        self._last.append(chunk)
        self._made += 1

    def _remembered(self) -> list[LatentChunk]:
        """What a denoiser must see of the chunks that are made to go on after them."""
        window = self._manifest.window
        return [*self._sinks, *[c for c in self._last if c.index >= window.sink_chunks][-window.window_chunks :]]

    async def _decode(self) -> None:
        while True:
            chunk = await self._chunks.get()
            fragment = await self._decoded_once(chunk)
            self._decoded.append(chunk)
            prompt = next(prompt for prompt in self._prompts if prompt.number == chunk.prompt)
            # Older ones are of no chunk that will come.
            self._prompts = [prompt for prompt in self._prompts if prompt.number >= chunk.prompt]
            self._out.put_nowait(LiveFragment(fragment, prompt, prompt_changed=False))

    async def _decoded_once(self, chunk: LatentChunk) -> Fragment:
        decoder, spec = self._stages.decoder, replace(self._spec, frames=ENDLESS)
        for tries in range(MAX_REPLAYS + 1):
            try:
                for place, earlier in enumerate(self._decoded if tries else ()):
                    await decoder.replay(self.id, spec, replace(earlier, opens=place == 0))
                return await decoder.decode(self.id, spec, chunk)
            except LostSession:
                await pause(tries)
        raise LostSession(f"{self.id}: chunk {chunk.index} lost its decoder session {MAX_REPLAYS + 1} times")

    async def _pace(self) -> None:
        while True:
            await self._opened.wait()
            self._news.clear()
            wanted, wait = self._wanted(), self._playback.seconds_to_next_chunk()
            if (wanted.chunks, wanted.number) != (self._told.chunks, self._told.number):
                known = wanted.number == self._told.number
                if await self._stages.denoiser.steer(self.id, replace(wanted, text=None) if known else wanted):
                    self._told = wanted
                else:
                    wait = _ASK_AGAIN_SECONDS  # it is about to be opened, or lost: that is heard of elsewhere
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._news.wait()

    def _wanted(self) -> Steering:
        chunks = max(1, self._playback.chunks(self._made)) if self._last_chunks is None else self._last_chunks
        return Steering(chunks, self.prompt.number, self._embedding)


class _Playback:
    """How far the video may be made: by the clock, and by what was acknowledged."""

    def __init__(self, manifest: Manifest, buffer_seconds: float, clock: Callable[[], float]) -> None:
        self._manifest, self._buffer, self._clock = manifest, buffer_seconds, clock
        self._played = self._out = self._acknowledged = 0.0
        self._out_index = -1
        self._looked_at = clock()
        self._next_begins = 0.0
        self.paused = False

    def out(self, fragment: Fragment) -> None:
        """It is on its way to the player."""
        self._look()
        self._out = (fragment.first_frame + fragment.frames) / self._manifest.fps
        self._out_index = fragment.index

    def acknowledge(self, index: int) -> None:
        if not 0 <= index <= self._out_index:
            raise ValueError(f"fragment {index} was not sent")
        self._acknowledged = max(self._acknowledged, self._begins(index + 1))

    def pause(self) -> None:
        self._look()
        self.paused = True

    def resume(self) -> None:
        self._look()
        self.paused = False

    def chunks(self, made: int) -> int:
        """How many chunks may be begun in all, of which `made` are made."""
        self._look()
        if self.paused:
            return made
        until, chunks = self._until(), made
        while self._begins(chunks) < until:
            chunks += 1
        self._next_begins = self._begins(chunks)
        return chunks

    def seconds_to_next_chunk(self) -> float | None:
        """When `chunks` will say more than it just did, if time alone does that."""
        if self.paused or self._played >= self._out or self._acknowledged < self._played:
            return None
        return max(_SHORTEST_WAIT_SECONDS, self._next_begins - self._until())

    def _until(self) -> float:
        return min(self._played, self._acknowledged) + self._buffer

    def _begins(self, chunk: int) -> float:
        """When a chunk begins to play, in seconds of the video."""
        return first_frame(self._manifest, chunk) / self._manifest.fps

    def _look(self) -> None:
        """Move the clock on, but not beyond what there is to play."""
        now = self._clock()
        if not self.paused:
            self._played = min(self._out, self._played + now - self._looked_at)
        self._looked_at = now
