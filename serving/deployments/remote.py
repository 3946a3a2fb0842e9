"""The three stages as the pipeline knows them, each through a Ray Serve handle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import RayActorError

from serving.deployments.attempt import Stages
from serving.pipeline.stages import (
    DenoiseRequest,
    Fragment,
    LatentChunk,
    LostSession,
    StepDone,
    TextEmbedding,
    VideoSpec,
)


@dataclass(frozen=True, slots=True)
class StageHandles:
    """One model's stages as Ray Serve gives them: bound applications when building, handles in a replica."""

    text_encoder: Any
    denoiser: Any
    decoder: Any


class RemoteTextEncoder:
    """`TextEncoder`, `Rewriter` and `Captioner` on whichever replica is least busy."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def encode(self, prompt: str) -> TextEmbedding:
        embedding: TextEmbedding = await self._handle.encode.remote(prompt)
        return embedding

    async def rewrite(self, prompt: str, seed: int) -> str:
        rewritten: str = await self._handle.rewrite.remote(prompt, seed)
        return rewritten

    async def agreement(self, latents: NDArray[np.float32], prompt: str) -> float:
        figure: float = await self._handle.agreement.remote(latents, prompt)
        return figure


class RemoteDenoiser:
    """`Denoiser` as one streaming call a video. Latents come through the object store, mapped and not copied."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle.options(stream=True)

    async def denoise(self, request: DenoiseRequest) -> AsyncGenerator[StepDone | LatentChunk, None]:
        events = self._handle.denoise.remote(request)
        try:
            async for event in events:
                yield event
        finally:
            # Without effect after the end; before it, the replica's generator is cancelled where it waits.
            events.cancel()


class RemoteDecoder:
    """`Decoder` with sticky sessions: the deployment's router sends equal session ids to one replica.

    Also `FrameEncoder`, on any of them.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def decode(self, video_id: str, spec: VideoSpec, chunk: LatentChunk) -> Fragment:
        try:
            fragment: Fragment = await self._session(video_id).decode.remote(video_id, spec, chunk)
        except RayActorError as error:
            # The replica died, and the session with it: the next call goes to another one.
            raise LostSession(f"{video_id}: the decoder's replica is gone") from error
        return fragment

    async def close(self, video_id: str) -> None:
        try:
            # A cancelled video is closed from a cancelled task: the call must get through all the same.
            await asyncio.shield(self._close(video_id))
        except RayActorError:
            return

    async def encode_frames(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        latents: NDArray[np.float32] = await self._handle.encode_frames.remote(frames)
        return latents

    async def _close(self, video_id: str) -> None:
        await self._session(video_id).close.remote(video_id)

    def _session(self, video_id: str) -> Any:
        return self._handle.options(session_id=video_id)


def remote_stages(handles: StageHandles) -> Stages:
    text_encoder, decoder = RemoteTextEncoder(handles.text_encoder), RemoteDecoder(handles.decoder)
    return Stages(
        text_encoder,
        RemoteDenoiser(handles.denoiser),
        decoder,
        rewriter=text_encoder,
        captioner=text_encoder,
        encoder=decoder,
    )
