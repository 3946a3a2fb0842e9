"""The three stages as the pipeline knows them, each through a Ray Serve handle.

A replica that dies loses nothing that can't be asked for again: of a call without a session another replica, of a
session by whoever knows what went into it (`LostSession`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import RayServeException
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from models.bundle import Bundle
from serving.deployments.attempt import Stages
from serving.pipeline.stages import (
    DenoiseEvent,
    DenoiseRequest,
    EncodedSource,
    Fragment,
    LatentChunk,
    LostSession,
    Steering,
    TextEmbedding,
    VideoSpec,
)
from serving.tracing import carrier

# The replica, or the machine that had what it answered.
_GONE = (RayActorError, ObjectLostError)
# For calls that any replica can answer. Ray sends the next one to a replica that lives.
_ask_another = retry(
    retry=retry_if_exception_type(_GONE),
    stop=stop_after_attempt(5),
    wait=wait_random_exponential(multiplier=0.3, max=5),
    reraise=True,
)


StageName = Literal["text-encoder", "denoiser", "decoder"]


def stage_name(model: str, stage: StageName) -> str:
    """A stage's deployment."""
    return f"{model}-{stage}"


@dataclass(frozen=True, slots=True)
class StageHandles:
    """One model's stages as Ray Serve gives them: bound applications when building, handles in a replica."""

    text_encoder: Any
    denoiser: Any
    decoder: Any


class RemoteTextEncoder:
    """`TextEncoder`, `Rewriter` and `Captioner` on whichever replica is least busy."""

    def __init__(self, handle: Any, bundle: str) -> None:
        """`bundle` is its digest, here and below: a replica that serves another one refuses (`OtherBundle`)."""
        self._handle, self._bundle = handle, bundle

    @_ask_another
    async def encode(self, prompt: str) -> TextEmbedding:
        embedding: TextEmbedding = await self._handle.encode.remote(prompt, self._bundle, carrier())
        return embedding

    @_ask_another
    async def rewrite(self, prompt: str, seed: int) -> str:
        rewritten: str = await self._handle.rewrite.remote(prompt, seed, self._bundle)
        return rewritten

    @_ask_another
    async def agreement(self, latents: NDArray[np.float32], prompt: str) -> float:
        figure: float = await self._handle.agreement.remote(latents, prompt, self._bundle)
        return figure


class RemoteDenoiser:
    """`Denoiser` as one streaming call a video. Latents come through the object store, mapped and not copied."""

    def __init__(self, handle: Any, bundle: str) -> None:
        self._handle, self._bundle = handle.options(stream=True), bundle

    async def denoise(self, request: DenoiseRequest) -> AsyncGenerator[DenoiseEvent, None]:
        events = self._handle.denoise.remote(request, self._bundle, ray.get_runtime_context().current_actor)
        try:
            async for event in events:
                yield event
        except _GONE as error:
            raise LostSession(f"{request.video_id}: the denoiser's replica is gone") from error
        finally:
            # Without effect after the end; before it, the replica's generator is cancelled where it waits.
            events.cancel()

    async def steer(self, video_id: str, steering: Steering) -> bool:
        """Every replica is told: nobody but the one that has it knows which that is."""
        try:
            return any(await self._handle.broadcast("steer", video_id, steering).results_async())
        except (*_GONE, RayServeException):
            return False  # that replica has died, or all have: if it was this video's, its stream says so


class RemoteDecoder:
    """`Decoder` with sticky sessions: the deployment's router sends equal session ids to one replica.

    Also `FrameEncoder`, on any of them.
    """

    def __init__(self, handle: Any, bundle: str) -> None:
        self._handle, self._bundle = handle, bundle

    async def decode(self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True) -> Fragment:
        fragment: Fragment = await self._asked("decode", video_id, spec, chunk, interactive)
        return fragment

    async def replay(self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True) -> None:
        await self._asked("replay", video_id, spec, chunk, interactive)

    async def close(self, video_id: str) -> None:
        try:
            # A cancelled video is closed from a cancelled task: the call must get through all the same.
            await asyncio.shield(self._close(video_id))
        except _GONE:
            return

    @_ask_another
    async def encode_source(self, frames: NDArray[np.uint8], video_frames: int) -> EncodedSource:
        source: EncodedSource = await self._handle.encode_source.remote(frames, video_frames, self._bundle)
        return source

    async def _asked(
        self, method: Literal["decode", "replay"], video_id: str, spec: VideoSpec, chunk: LatentChunk, interactive: bool
    ) -> Any:
        asked = getattr(self._session(video_id), method)
        try:
            return await asked.remote(video_id, spec, chunk, self._bundle, carrier(), interactive)
        except _GONE as error:
            # The replica died, and the session with it: the next call goes to another one.
            raise LostSession(f"{video_id}: the decoder's replica is gone") from error

    async def _close(self, video_id: str) -> None:
        await self._session(video_id).close.remote(video_id)

    def _session(self, video_id: str) -> Any:
        return self._handle.options(session_id=video_id)


def remote_stages(handles: StageHandles, bundle: Bundle) -> Stages:
    text_encoder = RemoteTextEncoder(handles.text_encoder, bundle.digest)
    decoder = RemoteDecoder(handles.decoder, bundle.digest)
    return Stages(
        text_encoder,
        RemoteDenoiser(handles.denoiser, bundle.digest),
        decoder,
        rewriter=text_encoder,
        captioner=text_encoder,
        encoder=decoder,
        bundle_digest=bundle.digest,
        preview=bundle.manifest.preview,
    )
