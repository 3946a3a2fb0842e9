"""The decoder behind Ray Serve, and the VAE's other half, which is seldom wanted and so has no replicas of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from serving.config import ObservabilityConfig
from serving.deployments.metering import report_stage
from serving.deployments.observing import start_observing
from serving.deployments.opening import open_decoder
from serving.deployments.scaling import stats_of
from serving.logs import about
from serving.pipeline.encoding import EngineEncoder
from serving.pipeline.pace import StageState
from serving.pipeline.stages import EncodedSource, Fragment, LatentChunk, VideoSpec, same_bundle
from serving.stage_config import DecoderConfig
from serving.tracing import NOWHERE, Carrier, span


class DecoderDeployment:
    """One replica: its engines, and the causal caches of the videos whose chunks come here."""

    def __init__(self, bundle: Path, digest: str, config: DecoderConfig, observing: ObservabilityConfig) -> None:
        start_observing(observing)
        self._digest = digest
        loaded = Bundle.load(bundle, digest)
        self._stage = open_decoder(loaded, config)
        self._encoder = EngineEncoder.open(loaded, threads=config.threads, provider=config.provider)
        self._reporting = asyncio.create_task(report_stage(lambda: self._stage.state))

    async def state(self) -> StageState:
        """How this replica stands."""
        return self._stage.state

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `VideoPolicy`."""
        return stats_of(self._stage.state)

    async def decode(
        self,
        video_id: str,
        spec: VideoSpec,
        chunk: LatentChunk,
        bundle: str,
        trace: Carrier = NOWHERE,
        interactive: bool = True,
    ) -> Fragment:
        """`bundle`, here and below, is the digest of the one that is meant. Raises `OtherBundle`."""
        same_bundle(self._digest, bundle)
        with about(video_id=video_id), span("decode", trace, chunk=chunk.index):
            return await self._stage.decode(video_id, spec, chunk, interactive=interactive)

    async def replay(
        self,
        video_id: str,
        spec: VideoSpec,
        chunk: LatentChunk,
        bundle: str,
        trace: Carrier = NOWHERE,
        interactive: bool = True,
    ) -> None:
        same_bundle(self._digest, bundle)
        with about(video_id=video_id), span("replay", trace, chunk=chunk.index):
            await self._stage.replay(video_id, spec, chunk, interactive=interactive)

    async def close(self, video_id: str) -> None:
        await self._stage.close(video_id)

    async def encode_source(self, frames: NDArray[np.uint8], video_frames: int, bundle: str) -> EncodedSource:
        """Raises `ValueError` when the bundle can't encode."""
        same_bundle(self._digest, bundle)
        if self._encoder is None:
            raise ValueError("this model can't encode frames")
        return await self._encoder.encode_source(frames, video_frames)
