"""The decoder behind Ray Serve."""

from __future__ import annotations

from pathlib import Path

from models.bundle import Bundle
from serving.config import DecoderConfig
from serving.pipeline.decoding import EngineDecoder
from serving.pipeline.stages import Fragment, LatentChunk, VideoSpec


class DecoderDeployment:
    """One replica: its engines, and the causal caches of the videos whose chunks come here."""

    def __init__(self, bundle: Path, digest: str, config: DecoderConfig) -> None:
        self._stage = EngineDecoder.open(
            Bundle.load(bundle, digest),
            threads=config.threads,
            provider=config.provider,
            plans=config.plans,
            max_sessions=config.max_sessions,
        )

    async def decode(self, video_id: str, spec: VideoSpec, chunk: LatentChunk) -> Fragment:
        return await self._stage.decode(video_id, spec, chunk)

    async def close(self, video_id: str) -> None:
        await self._stage.close(video_id)
