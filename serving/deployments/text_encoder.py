"""The text encoder behind Ray Serve, and the two small models that also have to do with words."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from serving.chat import open_rewriter
from serving.config import ObservabilityConfig
from serving.deployments.metering import report_stage
from serving.deployments.observing import start_observing
from serving.deployments.opening import open_text_encoder
from serving.deployments.scaling import stats_of
from serving.pipeline.captioning import EngineCaptioner
from serving.pipeline.pace import StageState
from serving.pipeline.stages import TextEmbedding, same_bundle
from serving.stage_config import TextEncoderConfig
from serving.tracing import NOWHERE, Carrier, span


class TextEncoderDeployment:
    """One replica: its engine, the embeddings of the prompts it has seen, a rewriter and a captioner (or none)."""

    def __init__(
        self, bundle: Path, digest: str, config: TextEncoderConfig, observing: ObservabilityConfig, *beside: Any
    ) -> None:
        """`beside` are the model's other stages: an application is whatever its first deployment is bound to."""
        start_observing(observing)
        self._digest = digest
        loaded = Bundle.load(bundle, digest)
        self._stage = open_text_encoder(loaded, config)
        self._rewriter = open_rewriter(loaded, config.rewriter)
        self._captioner = EngineCaptioner.open(loaded)
        self._reporting = asyncio.create_task(report_stage(lambda: self._stage.state))

    async def state(self) -> StageState:
        """How this replica stands."""
        return self._stage.state

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `VideoPolicy`."""
        return stats_of(self._stage.state)

    async def encode(self, prompt: str, bundle: str, trace: Carrier = NOWHERE) -> TextEmbedding:
        """`bundle`, here and below, is the digest of the one that is meant. Raises `OtherBundle`."""
        same_bundle(self._digest, bundle)
        with span("encode", trace):
            return await self._stage.encode(prompt)

    async def rewrite(self, prompt: str, seed: int, bundle: str) -> str:
        """Without a rewriter the prompt stays as it is: the service's configuration was changed since it was asked."""
        same_bundle(self._digest, bundle)
        return await self._rewriter.rewrite(prompt, seed) if self._rewriter else prompt

    async def agreement(self, latents: NDArray[np.float32], prompt: str, bundle: str) -> float:
        """Raises `ValueError` when the bundle has no captioner."""
        same_bundle(self._digest, bundle)
        if self._captioner is None:
            raise ValueError("this model has no captioner")
        return await self._captioner.agreement(latents, prompt)
