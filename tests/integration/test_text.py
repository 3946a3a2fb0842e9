"""Prompts to embeddings: the same tokens as WanPipeline's, and a cache that holds no more than it may."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from models.bundle import Bundle
from serving.engines.engine import Array
from serving.engines.onnx_runtime import OnnxRuntimeEngine
from serving.pipeline.text import EngineTextEncoder, clean_prompt


class Counting:
    """The real engine, with its calls kept."""

    def __init__(self, engine: OnnxRuntimeEngine) -> None:
        self._engine = engine
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self.calls: list[Mapping[str, Array]] = []

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.calls.append(feeds)
        return self._engine.run(feeds)


@pytest.fixture
def engine(tiny_bundle: Bundle) -> Counting:
    return Counting(OnnxRuntimeEngine(tiny_bundle.path_of("text_encoder")))


def encoder(bundle: Bundle, engine: Counting, cache_bytes: int = 1 << 20) -> EngineTextEncoder:
    return EngineTextEncoder(engine, bundle.tokenizer, bundle.manifest.text, cache_bytes=cache_bytes)


PROMPTS = [
    "a red ball",
    "  a\n\tred   ball ",
    "Salt &amp;amp; pepper &lt;b&gt;",
    "",
    "Ein grüner Würfel 緑の立方体 🎬",
    "a ball that bounces and bounces " * 40,
]


@pytest.mark.parametrize("prompt", PROMPTS)
async def test_tokens_are_those_of_wan_pipeline(tiny_bundle: Bundle, engine: Counting, prompt: str) -> None:
    transformers = pytest.importorskip("transformers")
    wan = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_bundle.tokenizer), pad_token="<pad>", eos_token="</s>"
    )
    length = tiny_bundle.manifest.text.max_tokens
    expected = tokenizer(
        wan.prompt_clean(prompt), padding="max_length", max_length=length, truncation=True, return_tensors="np"
    )
    embedding = await encoder(tiny_bundle, engine).encode(prompt)
    np.testing.assert_array_equal(engine.calls[0]["input_ids"], expected.input_ids)
    np.testing.assert_array_equal(engine.calls[0]["attention_mask"], expected.attention_mask)
    tokens = int(expected.attention_mask.sum())
    assert expected.input_ids[0, tokens - 1] == tokenizer.eos_token_id
    assert embedding.hidden_states.shape == (length, tiny_bundle.manifest.text.dim)
    assert embedding.hidden_states[:tokens].any(axis=1).all()
    assert not embedding.hidden_states[tokens:].any()


def test_cleaning_collapses_whitespace_and_entities() -> None:
    assert clean_prompt(" a &amp;amp;\n red\u00a0ball ") == "a & red ball"


async def test_equal_prompts_are_encoded_once(tiny_bundle: Bundle, engine: Counting) -> None:
    text = encoder(tiny_bundle, engine)
    assert await text.encode("a red ball") is await text.encode("  a red   ball")
    assert len(engine.calls) == 1
    assert len({id(await text.encode(p)) for p in ("a red ball", "a blue ball")}) == 2


async def test_the_cache_keeps_to_its_bytes_and_drops_the_longest_unused(tiny_bundle: Bundle, engine: Counting) -> None:
    info = tiny_bundle.manifest.text
    one = info.max_tokens * info.dim * 4
    text = encoder(tiny_bundle, engine, cache_bytes=2 * one)
    for prompt in ("a", "b", "a", "c"):
        await text.encode(prompt)
    assert text.cached_bytes == 2 * one
    assert len(engine.calls) == 3
    await text.encode("a")
    assert len(engine.calls) == 3
    await text.encode("b")
    assert len(engine.calls) == 4


async def test_no_cache_at_all_is_allowed(tiny_bundle: Bundle, engine: Counting) -> None:
    text = encoder(tiny_bundle, engine, cache_bytes=0)
    first, second = await text.encode("a"), await text.encode("a")
    np.testing.assert_array_equal(first.hidden_states, second.hidden_states)
    assert text.cached_bytes == 0
