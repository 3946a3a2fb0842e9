"""API, runner and the stages of all models in one replica, for small installations.

Nothing goes from process to process. The same pipeline over the same engines makes the same frames; what is given up is
that stages scale apart, and that a model can be changed while the service runs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from fastapi import FastAPI

from models.bundle import Bundle
from serving.api.load import StageLoad
from serving.chat import open_rewriter
from serving.config import ServiceConfig
from serving.deployments.api import front
from serving.deployments.attempt import Stages
from serving.deployments.crew import Crew, CrewReplica
from serving.deployments.door import Door
from serving.deployments.loads import StageWatch
from serving.deployments.metering import report_stage
from serving.deployments.observing import start_observing
from serving.deployments.opening import open_decoder, open_denoiser, open_text_encoder
from serving.deployments.storage import REPLICA_PATIENCE_SECONDS, open_storage
from serving.metrics import labelled
from serving.pipeline.captioning import EngineCaptioner
from serving.pipeline.decoding import EngineDecoder
from serving.pipeline.denoising import EngineDenoiser
from serving.pipeline.encoding import EngineEncoder
from serving.pipeline.pace import StageState
from serving.pipeline.stages import (
    DenoiseEvent,
    DenoiseRequest,
    Fragment,
    LatentChunk,
    Steering,
    TextEmbedding,
    VideoSpec,
)
from serving.pipeline.text import EngineTextEncoder
from serving.threads import background_pool, give_way
from serving.tracing import Open, carrier, span

# As many as asyncio has by itself on a dozen cores: each may wait for the database.
_IO_THREADS = 16


class FusedDeployment(CrewReplica):
    """A crew and the API over stages that are all here."""

    def __init__(self, config: ServiceConfig, *, door: bool = False) -> None:
        """With a `door` it listens itself, where `config` says."""
        start_observing(config.observability)
        if len(os.sched_getaffinity(0)) > config.denoiser.threads:
            give_way()
            asyncio.get_running_loop().set_default_executor(background_pool(_IO_THREADS, "io"))
        self._config, self._has_door = config, door
        self._storage = open_storage(config, patience_seconds=REPLICA_PATIENCE_SECONDS)
        self._bundles = {name: Bundle.load(path) for name, path in config.models.items()}
        self._watches: list[StageWatch] = []
        self._reporting: list[asyncio.Task[None]] = []
        self._stages = {name: self._opened(name, bundle) for name, bundle in self._bundles.items()}
        self._crew = Crew(config, self._storage, self._bundles, self._stages)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        config, lifespan = self._config, None
        if self._has_door:
            # Ray begins and ends the application's lifespan with the replica's, once.
            lifespan = (await Door.at(config.host, config.port, config.api.max_ongoing_requests)).serving
        return front(config, self._storage, self._bundles, self._stages, self._wake, self._loads, lifespan=lifespan)

    def _opened(self, model: str, bundle: Bundle) -> Stages:
        config = self._config
        with labelled(model=model, stage="text-encoder"):
            text_encoder = open_text_encoder(bundle, config.text_encoder)
        with labelled(model=model, stage="denoiser"):
            denoiser = open_denoiser(bundle, config.denoiser)
        with labelled(model=model, stage="decoder"):
            decoder = open_decoder(bundle, config.decoder)
        for stage, engines in (("text-encoder", text_encoder), ("denoiser", denoiser), ("decoder", decoder)):
            self._watch(model, stage, engines)
        return Stages(
            _TracedTextEncoder(text_encoder),
            _TracedDenoiser(denoiser),
            _TracedDecoder(decoder),
            rewriter=open_rewriter(bundle, config.text_encoder.rewriter),
            captioner=EngineCaptioner.open(bundle),
            encoder=EngineEncoder.open(bundle, threads=config.decoder.threads, provider=config.decoder.provider),
            bundle_digest=bundle.digest,
            preview=bundle.manifest.preview,
        )

    def _watch(self, model: str, stage: str, engines: EngineTextEncoder | EngineDenoiser | EngineDecoder) -> None:
        async def ask() -> list[StageState]:
            return [engines.state]

        self._watches.append(StageWatch(model, stage, ask))
        reporting = report_stage(lambda: engines.state, model=model, stage=stage)
        self._reporting.append(asyncio.create_task(reporting))

    async def _wake(self, video_id: str | None = None) -> None:
        if video_id is None:
            self._crew.wake()
        else:
            self._crew.tell(video_id)

    async def _loads(self) -> list[StageLoad]:
        return [await watch.load(1, 1) for watch in self._watches]


class _TracedTextEncoder:
    """Each of these is the stage itself, with the spans that a replica of its own would have."""

    def __init__(self, stage: EngineTextEncoder) -> None:
        self._stage = stage

    async def encode(self, prompt: str) -> TextEmbedding:
        with span("encode", carrier()):
            return await self._stage.encode(prompt)


class _TracedDenoiser:
    def __init__(self, stage: EngineDenoiser) -> None:
        self._stage = stage

    async def denoise(self, request: DenoiseRequest) -> AsyncGenerator[DenoiseEvent, None]:
        tracing = Open("denoise", request.trace)
        try:
            async with aclosing(self._stage.denoise(replace(request, trace=tracing.carrier))) as events:
                async for event in events:
                    yield event
        finally:
            tracing.end()

    async def steer(self, video_id: str, steering: Steering) -> bool:
        return await self._stage.steer(video_id, steering)


class _TracedDecoder:
    def __init__(self, stage: EngineDecoder) -> None:
        self._stage = stage

    async def decode(self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True) -> Fragment:
        with span("decode", carrier(), chunk=chunk.index):
            return await self._stage.decode(video_id, spec, chunk, interactive=interactive)

    async def replay(self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True) -> None:
        with span("replay", carrier(), chunk=chunk.index):
            await self._stage.replay(video_id, spec, chunk, interactive=interactive)

    async def close(self, video_id: str) -> None:
        await self._stage.close(video_id)
