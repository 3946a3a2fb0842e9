"""The text encoder behind Ray Serve, and the rewriter in front of it."""

from __future__ import annotations

from pathlib import Path

from models.bundle import Bundle
from serving.chat import open_rewriter
from serving.config import TextEncoderConfig
from serving.pipeline.stages import TextEmbedding
from serving.pipeline.text import EngineTextEncoder


class TextEncoderDeployment:
    """One replica: its engine, the embeddings of the prompts it has seen, and a rewriter or none."""

    def __init__(self, bundle: Path, config: TextEncoderConfig) -> None:
        loaded = Bundle.load(bundle)
        self._stage = EngineTextEncoder.open(loaded, threads=config.threads, provider=config.provider)
        self._rewriter = open_rewriter(loaded, config.rewriter)

    async def encode(self, prompt: str) -> TextEmbedding:
        return await self._stage.encode(prompt)

    async def rewrite(self, prompt: str, seed: int) -> str:
        """Without a rewriter the prompt stays as it is: the service's configuration was changed since it was asked."""
        return await self._rewriter.rewrite(prompt, seed) if self._rewriter else prompt
