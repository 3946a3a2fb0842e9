"""The text encoder behind Ray Serve."""

from __future__ import annotations

from pathlib import Path

from models.bundle import Bundle
from serving.config import StageConfig
from serving.pipeline.stages import TextEmbedding
from serving.pipeline.text import EngineTextEncoder


class TextEncoderDeployment:
    """One replica: its engine, and the embeddings of the prompts it has seen."""

    def __init__(self, bundle: Path, config: StageConfig) -> None:
        self._stage = EngineTextEncoder.open(Bundle.load(bundle), threads=config.threads, provider=config.provider)

    async def encode(self, prompt: str) -> TextEmbedding:
        return await self._stage.encode(prompt)
