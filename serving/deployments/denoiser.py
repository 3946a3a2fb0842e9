"""The denoiser behind Ray Serve."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from models.bundle import Bundle
from serving.config import DenoiserConfig
from serving.pipeline.denoising import EngineDenoiser
from serving.pipeline.scheduler import Limits
from serving.pipeline.stages import DenoiseRequest, LatentChunk, StepDone


class DenoiserDeployment:
    """One replica: its engine, and the sessions of the videos that it denoises together."""

    def __init__(self, bundle: Path, digest: str, config: DenoiserConfig) -> None:
        self._stage = EngineDenoiser.open(
            Bundle.load(bundle, digest),
            threads=config.threads,
            provider=config.provider,
            plans=config.plans,
            limits=Limits(max_rows=config.max_rows, max_tokens=config.max_tokens),
            max_sessions=config.max_sessions,
        )

    async def denoise(self, request: DenoiseRequest) -> AsyncGenerator[StepDone | LatentChunk, None]:
        """One streaming call a video. Cancelling the call takes its rows out of the batch before the next step."""
        async with aclosing(self._stage.denoise(request)) as events:
            async for event in events:
                yield event

    async def sessions(self) -> int:
        """How many videos hold memory in this replica."""
        return self._stage.sessions
