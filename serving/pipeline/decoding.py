"""The decoder stage: latent chunks to encoded fragments, with the causal cache kept from chunk to chunk."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle, GraphName, Manifest
from serving.engines.engine import Array, Engine
from serving.engines.onnx_runtime import CPU
from serving.engines.opening import Opener
from serving.media.encoders import SOFTWARE, Codec, Encoder, VideoEncoder, encoders
from serving.media.fmp4 import EncodedFragment, encode_fragment
from serving.pipeline.geometry import first_frame
from serving.pipeline.pace import Pace, StageState
from serving.pipeline.stages import DecoderName, Fragment, LatentChunk, LostSession, VideoSpec
from serving.pipeline.turns import Turns, most_of_others
from serving.pipeline.worker import Worker

_CACHE, _NEXT_CACHE = "cache_", "next_cache_"
# Noise for decoding, apart from what the same seed gives denoising.
_NOISE = (0, 0, 0)
# For the first latents, and for those after them.
EnginePair = tuple[Engine, Engine]


@dataclass(slots=True, eq=False)
class _Session:
    """One video's causal cache, by the names of `decoder_next`'s inputs; `users` counts the calls that want it."""

    engines: EnginePair
    interactive: bool = True
    cache: dict[str, Array] = field(default_factory=dict)
    next_chunk: int = 0
    placed: bool = False
    users: int = 0
    idle_since: float = 0.0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class EngineDecoder:
    """A `Decoder` over the two decoder engines; decoding and encoding each have a thread, so that they overlap.

    In each the chunks of interactive videos go before those of others, in the order in which they come: the denoiser
    makes first what is due first.

    A bundle may have a tiny pair beside them, which then decodes the videos that ask for it.

    At most `max_sessions` videos hold a cache; a new video waits for a place. It gets the place of a video that ends,
    or of the one that has been idle longest, if that is `idle_seconds` or more: that video's next chunk raises
    `LostSession`. Without such a time of grace videos would push each other out between any two chunks. Interactive
    ones get a place first, and the others never have all of them.
    """

    def __init__(
        self,
        engines: EnginePair,
        manifest: Manifest,
        *,
        tiny: EnginePair | None = None,
        encoders: Mapping[Codec, Encoder] = SOFTWARE,
        max_sessions: int = 8,
        idle_seconds: float = 10.0,
    ) -> None:
        self._engines: dict[DecoderName, EnginePair] = {"full": engines}
        if tiny is not None:
            self._engines["tiny"] = tiny
        self._manifest, self._encoders = manifest, encoders
        self._max_sessions, self._idle_seconds = max_sessions, idle_seconds
        self._sessions: dict[str, _Session] = {}
        self._waiting: Turns[_Session] = Turns()
        self._changed = asyncio.Event()
        self._pace = Pace()
        self._calls = self._running = self._latents = 0
        self._decoding, self._encoding = Worker("decoder"), Worker("encoder")

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        threads: int = 1,
        provider: str = CPU,
        plans: Path | None = None,
        video_encoder: VideoEncoder = "software",
        max_sessions: int = 8,
        idle_seconds: float = 10.0,
    ) -> EngineDecoder:
        """Raises `EngineError`, and `EncoderError` when the `video_encoder` can't be had here."""
        opener = Opener(bundle, threads, provider, plans)
        names: list[GraphName] = ["decoder_first", "decoder_next"]
        if bundle.manifest.tiny_decoder is not None:
            names += ["tiny_decoder_first", "tiny_decoder_next"]
        first, following, *tiny = opener.start(*names)
        return cls(
            (first, following),
            bundle.manifest,
            tiny=(tiny[0], tiny[1]) if tiny else None,
            encoders=encoders(video_encoder),
            max_sessions=max_sessions,
            idle_seconds=idle_seconds,
        )

    @property
    def sessions(self) -> int:
        """How many videos hold a cache here."""
        return sum(session.placed for session in self._sessions.values())

    @property
    def state(self) -> StageState:
        """How it stands, in chunks."""
        seconds = self._pace.seconds(self._latents)
        return StageState(self._calls - self._running, self._running, seconds, self._pace.busy_seconds)

    async def decode(self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True) -> Fragment:
        frames = await self._frames(video_id, spec, chunk, interactive)
        start = first_frame(self._manifest, chunk.index)
        # A view, in both cases: the latents were rounded up to whole patches, and to whole groups of frames.
        frames = frames[: spec.frames - start, : spec.height, : spec.width]
        encode = partial(
            encode_fragment,
            frames,
            fps=self._manifest.fps,
            index=chunk.index,
            first_frame=start,
            codec=spec.codec,
            encoders=self._encoders,
        )
        encoded: EncodedFragment = await self._encoding.run(encode, interactive=interactive)
        return Fragment(index=chunk.index, frames=len(frames), first_frame=start, init=encoded.init, data=encoded.data)

    async def replay(self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True) -> None:
        await self._frames(video_id, spec, chunk, interactive)

    async def close(self, video_id: str) -> None:
        self._sessions.pop(video_id, None)
        self._changed.set()

    async def stop(self) -> None:
        """Wait for the calls that are running."""
        await self._decoding.stop()
        await self._encoding.stop()

    async def _frames(self, video_id: str, spec: VideoSpec, chunk: LatentChunk, interactive: bool) -> NDArray[np.uint8]:
        """The chunk's frames uint8 `[n, height, width, 3]`, uncropped."""
        if chunk.index == 0 or chunk.opens:
            if spec.decoder not in self._engines:  # the bundle was changed since it was asked
                raise ValueError(f"this model has no {spec.decoder} decoder any more")
            # A replay starts afresh.
            self._sessions[video_id] = _Session(self._engines[spec.decoder], interactive, next_chunk=chunk.index)
        session = self._sessions.get(video_id)
        if session is None:
            raise LostSession(f"{video_id}: no decoder session here for chunk {chunk.index}")
        session.users += 1
        self._calls += 1
        self._latents += chunk.latents.size
        try:
            async with session.turn:
                return await self._decode(video_id, spec.seed, session, chunk)
        finally:
            session.users -= 1
            self._calls -= 1
            self._latents -= chunk.latents.size
            session.idle_since = asyncio.get_running_loop().time()
            if not session.placed and not session.users and self._sessions.get(video_id) is session:
                del self._sessions[video_id]  # cancelled while it waited for a place
            self._changed.set()

    async def _decode(self, video_id: str, seed: int, session: _Session, chunk: LatentChunk) -> NDArray[np.uint8]:
        """In the session's turn: decode the chunk and move the cache on."""
        if not session.placed:
            await self._place(session)
        if self._sessions.get(video_id) is not session or session.next_chunk != chunk.index:
            raise LostSession(f"{video_id}: the decoder session is at {session.next_chunk}, not at {chunk.index}")
        # Until this call is through the cache belongs to no chunk; if it is cut short, the session is lost.
        session.next_chunk = -1
        self._running += 1
        try:
            run = partial(self._run, session.engines, session.cache, self._feeds(seed, chunk))
            frames, session.cache = await self._decoding.run(run, interactive=session.interactive)
        finally:
            self._running -= 1
        session.next_chunk = chunk.index + 1
        if chunk.last and self._sessions.get(video_id) is session:
            del self._sessions[video_id]
        return frames

    async def _place(self, session: _Session) -> None:
        """Wait for one of the `max_sessions` places, dropping what has been idle in one for too long."""
        clock = asyncio.get_running_loop().time
        self._waiting.wait(session, interactive=session.interactive)
        try:
            while (first := self._next_placed()) is not session:
                since, oldest = (math.inf, None) if first else self._longest_idle()
                if oldest and since + self._idle_seconds <= clock():
                    del self._sessions[oldest]
                    self._changed.set()  # it may be another's turn
                    continue
                self._changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(since + self._idle_seconds if oldest else None):
                        await self._changed.wait()
            self._waiting.take(interactive_only=self._others_have_enough)
            session.placed = True
        finally:
            self._waiting.leave(session)
            self._changed.set()  # there may be a place for the next as well

    def _next_placed(self) -> _Session | None:
        """Who gets a place now, if there is one."""
        if self.sessions >= self._max_sessions:
            return None
        return self._waiting.first(interactive_only=self._others_have_enough)

    @property
    def _others_have_enough(self) -> bool:
        """Whether videos that nobody watches have as many places as they may."""
        others = sum(session.placed and not session.interactive for session in self._sessions.values())
        return others >= most_of_others(self._max_sessions)

    def _longest_idle(self) -> tuple[float, str | None]:
        """Since when which video does nothing with a place that one of those who wait could have."""
        full = self.sessions >= self._max_sessions
        placed = [(id, session) for id, session in self._sessions.items() if session.placed and not session.users]
        idle = [(session.idle_since, id) for id, session in placed if full or not session.interactive]
        return min(idle, default=(math.inf, None))

    def _feeds(self, seed: int, chunk: LatentChunk) -> dict[str, Array]:
        """What is decoded; noise belongs to a video's chunk, so that a replay decodes the same."""
        feeds: dict[str, Array] = {"latents": chunk.latents[None]}
        if self._manifest.decodes_with_noise:
            sequence = np.random.SeedSequence(seed, spawn_key=(*_NOISE, chunk.index))
            random = np.random.Generator(np.random.Philox(sequence))
            feeds["noise"] = random.standard_normal(feeds["latents"].shape, dtype=np.float32)
        return feeds

    def _run(
        self, engines: EnginePair, cache: dict[str, Array], feeds: dict[str, Array]
    ) -> tuple[NDArray[np.uint8], dict[str, Array]]:
        """Frames uint8 `[n, height, width, 3]` and the cache for the next chunk, in the engines' thread."""
        first_engine, next_engine = engines
        frames = []
        started = time.monotonic()
        start, count = 0, feeds["latents"].shape[2]
        if not cache:
            # A causal VAE's first latent frame is unlike all others; any other VAE decodes best what it sees whole.
            latent = self._manifest.latent
            first = latent.first if latent.streaming == "exact" else count
            cache = first_engine.run({name: array[:, :, :first] for name, array in feeds.items()})
            frames.append(cache.pop("frames")[0])
            start = first
        if start < count:
            outputs = next_engine.run({name: array[:, :, start:] for name, array in feeds.items()} | cache)
            frames.append(outputs.pop("frames")[0])
            cache = {_CACHE + name.removeprefix(_NEXT_CACHE): value for name, value in outputs.items()}
        self._pace.took(feeds["latents"].size, time.monotonic() - started)
        return np.concatenate(frames), cache
