"""What a video shows, in the words of the training captions; and how well that agrees with a prompt."""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle, CaptionerInfo
from serving.engines.engine import Engine
from serving.engines.onnx_runtime import CPU, OnnxRuntimeEngine
from serving.pipeline.words import EngineSpeaker


class Captioner(Protocol):
    async def agreement(self, latents: NDArray[np.float32], prompt: str) -> float:
        """How well a video's normalised latents `[channels, frames, height, width]` show `prompt`; more is better."""


class EngineCaptioner:
    """A `Captioner` over the bundle's graphs; it looks at the first `max_frames` latent frames."""

    def __init__(self, encoder: Engine, decoder: Engine, info: CaptionerInfo) -> None:
        self._encoder, self._info = encoder, info
        self._speaker = EngineSpeaker(decoder, info)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="captioner")

    @classmethod
    def open(cls, bundle: Bundle, *, threads: int = 1, provider: str = CPU) -> EngineCaptioner | None:
        """None when the bundle has no captioner."""
        info = bundle.manifest.captioner
        if info is None:
            return None
        encoder = OnnxRuntimeEngine(bundle.path_of("captioner_encoder"), threads=threads, provider=provider)
        decoder = OnnxRuntimeEngine(bundle.path_of("captioner_decoder"), threads=threads, provider=provider)
        return cls(encoder, decoder, info)

    async def caption(self, latents: NDArray[np.float32]) -> str:
        """Empty when the captioner finds no end."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._caption, latents)

    async def agreement(self, latents: NDArray[np.float32], prompt: str) -> float:
        """The prompt's mean log-likelihood per word as a caption; what caption and prompt have in common, when the
        prompt has words that no caption has. So only figures for one prompt can be compared."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._agreement, latents, prompt)

    async def stop(self) -> None:
        """Wait for the call that is running."""
        await asyncio.to_thread(self._thread.shutdown)

    def _memory(self, latents: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        seen = self._encoder.run({"latents": latents[None, :, : self._info.max_frames]})
        return seen["memory"], seen["memory_mask"]

    def _caption(self, latents: NDArray[np.float32]) -> str:
        return self._speaker.speak(*self._memory(latents)) or ""

    def _agreement(self, latents: NDArray[np.float32], prompt: str) -> float:
        memory = self._memory(latents)
        likelihood = self._speaker.likelihood(*memory, prompt)
        if likelihood is not None:
            return likelihood
        return in_common(self._speaker.speak(*memory) or "", prompt)


def in_common(one: str, other: str) -> float:
    """The share of words and of pairs of neighbouring words that two texts have in common (their F1)."""
    first, second = (_pieces(text) for text in (one, other))
    return 2 * (first & second).total() / max(1, first.total() + second.total())


def _pieces(text: str) -> Counter[tuple[str, ...]]:
    words = text.lower().replace(",", " ").split()
    return Counter([*((word,) for word in words), *pairwise(words)])
