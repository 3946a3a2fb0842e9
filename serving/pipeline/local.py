"""The whole pipeline in one process: what `rushes generate` runs."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from serving.engines.onnx_runtime import CPU
from serving.pipeline.captioning import EngineCaptioner
from serving.pipeline.decoding import EngineDecoder
from serving.pipeline.denoising import EngineDenoiser
from serving.pipeline.encoding import EngineEncoder
from serving.pipeline.generation import OnProgress, Sink, generate
from serving.pipeline.rewriting import OnnxRewriter, revise
from serving.pipeline.scheduler import Limits
from serving.pipeline.stages import VideoSpec
from serving.pipeline.text import EngineTextEncoder


class LocalPipeline:
    """Three stages over one bundle; `async with` it, so that its threads end. Videos may be made at the same time."""

    def __init__(
        self,
        bundle: Bundle,
        text_encoder: EngineTextEncoder,
        denoiser: EngineDenoiser,
        decoder: EngineDecoder,
        rewriter: OnnxRewriter | None = None,
        captioner: EngineCaptioner | None = None,
        encoder: EngineEncoder | None = None,
    ) -> None:
        self.bundle = bundle
        self.text_encoder = text_encoder
        self.denoiser = denoiser
        self.decoder = decoder
        self.rewriter = rewriter
        self.captioner = captioner
        self.encoder = encoder

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        threads: int = 1,
        provider: str = CPU,
        plans: Path | None = None,
        limits: Limits | None = None,
    ) -> LocalPipeline:
        """Load the engines. `threads` is for each engine's calls; raises `EngineError` for one that can't be loaded."""
        return cls(
            bundle,
            EngineTextEncoder.open(bundle, threads=threads, provider=provider, plans=plans),
            EngineDenoiser.open(bundle, threads=threads, provider=provider, plans=plans, limits=limits),
            EngineDecoder.open(bundle, threads=threads, provider=provider, plans=plans),
            OnnxRewriter.open(bundle),
            EngineCaptioner.open(bundle),
            EngineEncoder.open(bundle, threads=threads, provider=provider),
        )

    async def revise(self, spec: VideoSpec) -> VideoSpec:
        """`spec` with its `revised_prompt`, if it asks for one and has none yet."""
        return await revise(spec, self.rewriter)

    async def generate(
        self,
        spec: VideoSpec,
        sink: Sink,
        on_progress: OnProgress | None = None,
        *,
        video_id: str | None = None,
        source: NDArray[np.uint8] | None = None,
    ) -> None:
        """As `generation.generate`, after `revise`; without a `video_id` the video gets one that no other has."""
        await generate(
            video_id or uuid4().hex,
            await self.revise(spec),
            text_encoder=self.text_encoder,
            denoiser=self.denoiser,
            decoder=self.decoder,
            sink=sink,
            on_progress=on_progress,
            captioner=self.captioner,
            encoder=self.encoder,
            source=source,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.denoiser.stop()
        await self.decoder.stop()
        await self.text_encoder.stop()
        if self.rewriter:
            await self.rewriter.stop()
        if self.captioner:
            await self.captioner.stop()
        if self.encoder:
            await self.encoder.stop()
