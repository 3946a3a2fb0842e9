"""In front of the text encoder: a loose or short prompt becomes a detailed one, like the model's training captions."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

from models.bundle import Bundle, RewriterInfo
from models.spelling import spell
from serving.engines.engine import Engine
from serving.engines.onnx_runtime import CPU, OnnxRuntimeEngine
from serving.pipeline.stages import VideoSpec
from serving.pipeline.text import clean_prompt
from serving.pipeline.words import EngineSpeaker

_log = logging.getLogger(__name__)


class Rewriter(Protocol):
    async def rewrite(self, prompt: str, seed: int) -> str:
        """The prompt to render instead; `seed` settles what `prompt` leaves open. Gives `prompt` back if need be."""


async def revise(spec: VideoSpec, rewriter: Rewriter | None) -> VideoSpec:
    """`spec` with its `revised_prompt`, if it asks for one and has none yet."""
    if not spec.rewrite_prompt or spec.revised_prompt is not None:
        return spec
    if rewriter is None:
        # The configuration was changed since the video was asked for: no reason to fail it.
        _log.warning("a prompt was to be rewritten, but there is no rewriter any more")
        return spec
    return replace(spec, revised_prompt=await rewriter.rewrite(spec.prompt, spec.seed))


class OnnxRewriter:
    """The bundle's own rewriter."""

    def __init__(self, encoder: Engine, decoder: Engine, info: RewriterInfo, max_characters: int) -> None:
        self._encoder, self._info = encoder, info
        self._speaker = EngineSpeaker(decoder, info)
        self._max_characters = max_characters
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewriter")

    @classmethod
    def open(cls, bundle: Bundle, *, threads: int = 1, provider: str = CPU) -> OnnxRewriter | None:
        """None when the bundle has no rewriter."""
        info = bundle.manifest.rewriter
        if info is None:
            return None
        encoder = OnnxRuntimeEngine(bundle.path_of("rewriter_encoder"), threads=threads, provider=provider)
        decoder = OnnxRuntimeEngine(bundle.path_of("rewriter_decoder"), threads=threads, provider=provider)
        return cls(encoder, decoder, info, bundle.manifest.limits.max_prompt_characters)

    async def rewrite(self, prompt: str, seed: int) -> str:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, prompt, seed)

    async def stop(self) -> None:
        """Wait for the call that is running."""
        await asyncio.to_thread(self._thread.shutdown)

    def _run(self, prompt: str, seed: int) -> str:
        ngrams = spell(clean_prompt(prompt), self._info.max_prompt_words, self._info.buckets)
        memory = self._encoder.run({"ngrams": ngrams[None]})
        text = self._speaker.speak(memory["memory"], memory["memory_mask"], seed)
        if not text or len(text) > self._max_characters:
            _log.warning("the rewriter made nothing of a prompt of %d characters", len(prompt))
            return prompt
        return text
