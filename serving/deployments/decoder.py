"""The decoder behind Ray Serve, and the VAE's other half, which is seldom wanted and so has no replicas of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from serving.config import DecoderConfig
from serving.pipeline.decoding import EngineDecoder
from serving.pipeline.encoding import EngineEncoder
from serving.pipeline.stages import EncodedSource, Fragment, LatentChunk, VideoSpec


class DecoderDeployment:
    """One replica: its engines, and the causal caches of the videos whose chunks come here."""

    def __init__(self, bundle: Path, digest: str, config: DecoderConfig) -> None:
        loaded = Bundle.load(bundle, digest)
        self._stage = EngineDecoder.open(
            loaded,
            threads=config.threads,
            provider=config.provider,
            plans=config.plans,
            max_sessions=config.max_sessions,
        )
        self._encoder = EngineEncoder.open(loaded, threads=config.threads, provider=config.provider)

    async def decode(self, video_id: str, spec: VideoSpec, chunk: LatentChunk) -> Fragment:
        return await self._stage.decode(video_id, spec, chunk)

    async def replay(self, video_id: str, spec: VideoSpec, chunk: LatentChunk) -> None:
        await self._stage.replay(video_id, spec, chunk)

    async def close(self, video_id: str) -> None:
        await self._stage.close(video_id)

    async def encode_source(self, frames: NDArray[np.uint8], video_frames: int) -> EncodedSource:
        """Raises `ValueError` when the bundle, changed since it was asked, can't encode."""
        if self._encoder is None:
            raise ValueError("this model can't encode frames any more")
        return await self._encoder.encode_source(frames, video_frames)
