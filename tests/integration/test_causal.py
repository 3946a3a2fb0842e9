"""The causal rollout on a real (tiny, untrained) bundle: torch, the exported graph and the pipeline are one thing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import PROMPT, fragments_of, opened_pipeline, request_of
from tiny import CHANNELS, MAX_TOKENS, TEXT_DIM
from watched import Watched

from models.bundle import Bundle
from models.samplers import build_table
from models.wan import WanCheckpoint
from models.wan_causal import CausalDenoiser, CausalSequence
from serving.engines.engine import Array, Engine, EngineError
from serving.engines.onnx_runtime import OnnxRuntimeEngine
from serving.pipeline.denoising import EngineDenoiser
from serving.pipeline.local import LocalPipeline
from serving.pipeline.request import make_spec
from serving.pipeline.stages import DenoiseRequest, Fragment, LatentChunk, StepDone, VideoSpec

# Exporting takes most of a minute of a free core, and this machine may be busy.
pytestmark = pytest.mark.timeout(900)

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def transformer(tiny_causal_checkpoint: Path) -> Any:
    return WanCheckpoint.load(tiny_causal_checkpoint).transformer


@pytest.fixture
def engine(tiny_causal_bundle: Bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(tiny_causal_bundle.path_of("denoiser"))


@pytest.fixture
async def pipeline(tiny_causal_bundle: Bundle) -> AsyncGenerator[LocalPipeline, None]:
    async with opened_pipeline(tiny_causal_bundle) as opened:
        yield opened


@pytest.fixture
def spec(tiny_causal_bundle: Bundle) -> Callable[..., VideoSpec]:
    def make(prompt: str = PROMPT, **asked: Any) -> VideoSpec:
        return make_spec(tiny_causal_bundle.manifest, prompt, **{"seed": 7, **asked})

    return make


async def chunks_of(denoiser: EngineDenoiser, request: DenoiseRequest) -> list[LatentChunk]:
    async with aclosing(denoiser.denoise(request)) as events:
        return [event async for event in events if isinstance(event, LatentChunk)]


def test_the_bundle_says_what_its_graph_remembers(tiny_causal_bundle: Bundle) -> None:
    tiny_causal_bundle.verify()
    manifest = tiny_causal_bundle.manifest
    assert (manifest.rollout, manifest.sampler.name) == ("causal", "renoise")
    assert manifest.causal is not None
    assert manifest.causal.model_dump() == {
        "sink_chunks": 1,
        "window_chunks": 2,
        "positions": "window",
        "layers": 2,
        "dim": 24,
    }
    denoiser = manifest.graphs["denoiser"]
    assert {tensor.name: tensor.shape for tensor in denoiser.inputs} == {
        "latents": ("batch", CHANNELS, "frames", "2*rows", "2*columns"),
        "timestep": ("batch",),
        "encoder_hidden_states": ("batch", "tokens", TEXT_DIM),
        "cache": ("batch", 2, 2, 9, "rows", "columns", 24),
        "write_index": ("batch",),
    }
    assert {tensor.name: tensor.shape for tensor in denoiser.outputs} == {
        "velocity": ("batch", CHANNELS, "frames", "2*rows", "2*columns"),
        "chunk_cache": ("batch", 2, 2, "frames", "rows", "columns", 24),
    }
    assert all(error <= TOLERANCE for error in denoiser.parity.values())


def test_nothing_is_scattered(tiny_causal_bundle: Bundle) -> None:
    import onnx

    model = onnx.load(tiny_causal_bundle.path_of("denoiser"), load_external_data=False)
    assert not [node for node in model.graph.node if node.op_type.startswith("Scatter")]


def rollout(
    engine: Engine, bundle: Bundle, latents: Array, timestep: Array, text: Array
) -> tuple[Array, list[dict[str, Array]]]:
    """Chunk by chunk, each cached as it is; returns the velocity, and the feeds of every call."""
    window, causal = bundle.manifest.window, bundle.manifest.causal
    assert causal is not None
    batch, _, frames, height, width = latents.shape
    cache = np.zeros((batch, causal.layers, 2, window.cached_frames, height // 2, width // 2, causal.dim), np.float32)
    velocities, fed = [], []
    for n in range(timestep.shape[1]):
        fed.append(
            {
                "latents": latents[:, :, 3 * n : 3 * n + 3],
                "timestep": timestep[:, n],
                "encoder_hidden_states": text,
                "cache": cache.copy(),
                "write_index": np.full(batch, n, np.int64),
            }
        )
        outputs = engine.run(fed[-1])
        velocities.append(outputs["velocity"])
        if outputs["chunk_cache"].shape[3] == 3:
            cache[:, :, :, window.frames_of(n)] = outputs["chunk_cache"]
    assert sum(v.shape[2] for v in velocities) == frames
    return np.concatenate(velocities, axis=2), fed


def sequence(frames: int, batch: int = 2) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(frames)
    return (
        rng.standard_normal((batch, CHANNELS, frames, 4, 6), dtype=np.float32),
        rng.uniform(0, 1000, (batch, -(-frames // 3))).astype(np.float32),
        rng.standard_normal((batch, MAX_TOKENS, TEXT_DIM), dtype=np.float32),
    )


@pytest.mark.parametrize("frames", [20, 21])
@torch.no_grad()
def test_the_engines_rollout_is_the_training_forward(
    frames: int, engine: OnnxRuntimeEngine, tiny_causal_bundle: Bundle, transformer: Any
) -> None:
    """Seven chunks over a cache of three: the ring goes round twice."""
    latents, timestep, text = sequence(frames)
    whole = CausalSequence(transformer, tiny_causal_bundle.manifest.window)(
        *(torch.from_numpy(array) for array in (latents, timestep, text))
    ).numpy()
    cached, _ = rollout(engine, tiny_causal_bundle, latents, timestep, text)
    assert np.abs(whole - cached).max() <= TOLERANCE
    assert whole.std() > 0.1


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_bits_in_any_batch_and_beside_any_chunk(threads: int, tiny_causal_bundle: Bundle) -> None:
    reference = OnnxRuntimeEngine(tiny_causal_bundle.path_of("denoiser"))
    engine = OnnxRuntimeEngine(tiny_causal_bundle.path_of("denoiser"), threads=threads)
    _, fed = rollout(reference, tiny_causal_bundle, *sequence(21, batch=1))
    alone = [reference.run(feeds) for feeds in fed]
    for mixed in [(6, 0), (3, 4, 1), (5, 5, 2, 0, 6), (0, 1, 2, 3, 4, 5, 6)]:
        together = engine.run({name: np.concatenate([fed[n][name] for n in mixed]) for name in fed[0]})
        for name, array in together.items():
            np.testing.assert_array_equal(array, np.concatenate([alone[n][name] for n in mixed]))


@pytest.mark.parametrize(("sampler", "guidance_scale"), [("euler", 2.5), ("renoise", 1.0), ("renoise", 2.5)])
async def test_the_pipelines_latents_are_those_of_a_plain_loop(
    sampler: Any,
    guidance_scale: float,
    pipeline: LocalPipeline,
    spec: Callable[..., VideoSpec],
    tiny_causal_bundle: Bundle,
    transformer: Any,
) -> None:
    asked = replace(spec(seconds=3, num_inference_steps=3, guidance_scale=guidance_scale), sampler=sampler)
    request = await request_of(pipeline, asked)
    made = await chunks_of(pipeline.denoiser, request)
    assert request.unconditional is not None

    denoiser = CausalDenoiser(transformer, tiny_causal_bundle.manifest.window).requires_grad_(False)
    sigmas = build_table(sampler, 3, shift=3.0).sigmas

    def noise(shape: tuple[int, ...], *name: int) -> torch.Tensor:
        philox = np.random.Philox(np.random.SeedSequence(asked.seed, spawn_key=name))
        return torch.from_numpy(np.random.Generator(philox).standard_normal(shape, dtype=np.float32))

    caches: list[torch.Tensor] = []
    texts = [torch.from_numpy(e.hidden_states.copy())[None] for e in (request.conditional, request.unconditional)]
    for n, chunk in enumerate(made):
        x = noise(chunk.latents.shape, n)[None]
        caches = caches or [denoiser.empty_cache(1, x) for _ in texts]
        index = torch.tensor([n])
        for step in range(3):
            sigma, following = float(sigmas[step]), float(sigmas[step + 1])
            timestep = torch.tensor([1000 * sigma])
            with_prompt, without = (
                denoiser(x, timestep, text, cache, index)[0] for text, cache in zip(texts, caches, strict=True)
            )
            velocity = without + guidance_scale * (with_prompt - without)
            if sampler == "euler":
                x = x + (following - sigma) * velocity
            else:
                x = (1 - following) * (x - sigma * velocity)
                x = x + following * noise(chunk.latents.shape, n, step + 1)
        assert (x[0] - torch.from_numpy(chunk.latents)).abs().max() <= 1e-3
        if not chunk.last:
            clean = [denoiser(x, torch.zeros(1), t, c, index)[1] for t, c in zip(texts, caches, strict=True)]
            caches = [denoiser.write(c, new, n) for c, new in zip(caches, clean, strict=True)]
    assert [chunk.latents.shape[1] for chunk in made] == [3, 3, 3, 3, 1]
    assert [chunk.last for chunk in made] == [False, False, False, False, True]


async def test_every_frame_comes_once_in_order(pipeline: LocalPipeline, spec: Callable[..., VideoSpec]) -> None:
    fragments = await fragments_of(pipeline, spec(seconds=3))
    assert [f.index for f in fragments] == [0, 1, 2, 3, 4]
    assert [f.first_frame for f in fragments] == [sum(f.frames for f in fragments[:i]) for i in range(5)]
    assert sum(f.frames for f in fragments) == spec(seconds=3).frames == 49


async def test_the_first_fragment_is_out_before_the_last_chunk_is_denoised(
    tiny_causal_bundle: Bundle, engine: OnnxRuntimeEngine, spec: Callable[..., VideoSpec]
) -> None:
    """The engine itself waits for it: were chunks held back, the video would fail."""
    first_is_out = threading.Event()
    chunks: list[int] = []

    def wait(feeds: Mapping[str, Array]) -> None:
        chunks.append(int(feeds["write_index"][0]))
        if chunks[-1] == 5 and not first_is_out.wait(60):
            raise EngineError("chunk 5 is denoised and nothing is out")

    async def sink(fragment: Fragment) -> None:
        first_is_out.set()

    denoiser = EngineDenoiser(Watched(engine, wait), tiny_causal_bundle.manifest)
    async with opened_pipeline(tiny_causal_bundle) as opened:
        watched = LocalPipeline(tiny_causal_bundle, opened.text_encoder, denoiser, opened.decoder)
        await watched.generate(spec(seconds=4), sink)
    await denoiser.stop()
    assert chunks == [n for n in range(5) for _ in range(3)] + [5, 5]


async def test_other_videos_in_flight_change_no_byte(pipeline: LocalPipeline, spec: Callable[..., VideoSpec]) -> None:
    alone = await fragments_of(pipeline, spec(seconds=3))
    others = [
        spec("a blue cube spinning", seed=1, num_inference_steps=3),
        spec("a green cone", seed=2, guidance_scale=3.0, seconds=2),
        spec("a small white ball at night", seed=3, seconds=1),
        spec("a red cube", seed=4, size="96x64"),
        spec("a red cone", seed=5, guidance_scale=3.0, seconds=2, num_inference_steps=3, guidance_cache="alternate"),
    ]
    videos = [others[0], spec(seconds=3), *others[1:]]
    together = await asyncio.gather(*(fragments_of(pipeline, video) for video in videos))
    assert together[1] == alone
    assert together[0] != alone
    assert together[-1] == await fragments_of(pipeline, others[-1])


async def test_a_longer_video_begins_as_a_shorter_one(pipeline: LocalPipeline, spec: Callable[..., VideoSpec]) -> None:
    short, long = [await fragments_of(pipeline, spec(seconds=seconds)) for seconds in (2, 4)]
    assert long[: len(short)] == short
    assert len(long) > len(short)


async def test_the_prompt_may_change_between_chunks(pipeline: LocalPipeline, spec: Callable[..., VideoSpec]) -> None:
    before = await fragments_of(pipeline, spec(seconds=3))
    scenes = [{"start_seconds": 1, "prompt": "a blue cube"}]
    changing = await fragments_of(pipeline, spec(seconds=3, scene_prompts=scenes))
    after = await fragments_of(pipeline, spec("a blue cube", seconds=3))
    assert changing[:2] == before[:2]
    assert all(changing[n].data not in (before[n].data, after[n].data) for n in (2, 3, 4))


async def test_progress_counts_the_clean_passes(pipeline: LocalPipeline, spec: Callable[..., VideoSpec]) -> None:
    seen: list[StepDone] = []

    async def sink(fragment: Fragment) -> None: ...

    await pipeline.generate(spec(seconds=2), sink, seen.append)
    assert seen == [StepDone(step, 8) for step in range(1, 9)]


async def test_cancelling_frees_the_cache_between_steps(
    pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    async with aclosing(pipeline.denoiser.denoise(await request_of(pipeline, spec(seconds=120)))) as events:
        async for event in events:
            if isinstance(event, LatentChunk) and event.index == 1:
                break
        assert pipeline.denoiser.sessions == 1
    assert pipeline.denoiser.sessions == 0
    assert pipeline.denoiser.outstanding_tokens == 0
    assert len(await fragments_of(pipeline, spec(seconds=1))) == 2
