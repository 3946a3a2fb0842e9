"""Prompts to embeddings: cleaning, tokens, the text encoder's engine, and a cache by content."""

from __future__ import annotations

import asyncio
import hashlib
import html
import re
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from models.bundle import Bundle, TextInfo
from serving.engines.engine import Engine, EngineError
from serving.engines.onnx_runtime import CPU
from serving.engines.opening import Opener
from serving.metrics import EMBEDDINGS
from serving.pipeline.pace import Pace, StageState
from serving.pipeline.stages import TextEmbedding

PAD_ID = 0


def clean_prompt(prompt: str) -> str:
    """As `WanPipeline.prompt_clean`, but for ftfy's mending of broken encodings: the base install doesn't have ftfy."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt)).strip()).strip()


class EngineTextEncoder:
    """A `TextEncoder` over an engine. Embeddings are cached by the prompt's content, least recently used out first.

    `cache_bytes` bounds what the cached embeddings hold; 0 turns the cache off.
    """

    def __init__(self, engine: Engine, tokenizer_file: Path, info: TextInfo, *, cache_bytes: int = 64 << 20) -> None:
        self._engine = engine
        self._info = info
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # the library raises nothing more particular
            raise EngineError(f"{tokenizer_file.name}: could not be loaded: {error}") from error
        # Truncating counts the special tokens in, so that a long prompt still ends with </s>.
        self._tokenizer.enable_truncation(info.max_tokens)
        self._tokenizer.no_padding()
        self._cache: OrderedDict[bytes, TextEmbedding] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._pace = Pace()
        self._calls = 0
        self._one_call = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="text-encoder")

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        threads: int = 1,
        provider: str = CPU,
        plans: Path | None = None,
        cache_bytes: int = 64 << 20,
    ) -> EngineTextEncoder:
        (engine,) = Opener(bundle, threads, provider, plans).start("text_encoder")
        return cls(engine, bundle.tokenizer, bundle.manifest.text, cache_bytes=cache_bytes)

    @property
    def cached_bytes(self) -> int:
        return self._cached_bytes

    @property
    def state(self) -> StageState:
        """How it stands, in prompts."""
        running = min(self._calls, 1)
        seconds = self._pace.seconds(self._calls)
        return StageState(self._calls - running, running, seconds, self._pace.busy_seconds)

    async def encode(self, prompt: str) -> TextEmbedding:
        self._calls += 1
        try:
            return await self._encode(prompt)
        finally:
            self._calls -= 1

    async def _encode(self, prompt: str) -> TextEmbedding:
        cleaned = clean_prompt(prompt)
        key = hashlib.sha256(cleaned.encode()).digest()
        # Looked up under the lock: a prompt that is being encoded already is not encoded twice.
        async with self._one_call:
            if key in self._cache:
                self._cache.move_to_end(key)
                EMBEDDINGS.add(cache="hit", **self._pace.labels)
                return self._cache[key]
            EMBEDDINGS.add(cache="miss", **self._pace.labels)
            loop = asyncio.get_running_loop()
            started = loop.time()
            embedding = await loop.run_in_executor(self._thread, self._run, cleaned)
            self._pace.took(1, loop.time() - started)
            self._keep(key, embedding)
            return embedding

    async def stop(self) -> None:
        """Wait for the call that is running."""
        await asyncio.to_thread(self._thread.shutdown)

    def _run(self, prompt: str) -> TextEmbedding:
        ids = self._tokenizer.encode(prompt).ids
        input_ids = np.full((1, self._info.max_tokens), PAD_ID, np.int64)
        attention_mask = np.zeros((1, self._info.max_tokens), np.int64)
        input_ids[0, : len(ids)] = ids
        attention_mask[0, : len(ids)] = 1
        hidden_states = self._engine.run({"input_ids": input_ids, "attention_mask": attention_mask})["hidden_states"][0]
        hidden_states.flags.writeable = False  # shared through the cache
        return TextEmbedding(hidden_states)

    def _keep(self, key: bytes, embedding: TextEmbedding) -> None:
        self._cache[key] = embedding
        self._cached_bytes += embedding.hidden_states.nbytes
        while self._cached_bytes > self._cache_bytes:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= dropped.hidden_states.nbytes
