"""The pipeline in one process, on a real (tiny, untrained) bundle: what comes out, in what order, and when."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import av
import numpy as np
import pytest
from pipelines import fragments_of, opened_pipeline, request_of, small_spec
from watched import Watched

from models.bundle import Bundle
from serving.engines.onnx_runtime import OnnxRuntimeEngine
from serving.pipeline import denoising
from serving.pipeline.decoding import EngineDecoder
from serving.pipeline.denoising import EngineDenoiser
from serving.pipeline.generation import generate
from serving.pipeline.local import LocalPipeline
from serving.pipeline.scheduler import Limits
from serving.pipeline.stages import Fragment, LatentChunk, StepDone, VideoSpec


def pictures(fragments: Sequence[Fragment]) -> list[np.ndarray[Any, Any]]:
    with av.open(io.BytesIO(fragments[0].init + b"".join(f.data for f in fragments))) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


async def test_every_frame_comes_once_in_order_and_every_prefix_plays(
    pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    fragments = await fragments_of(pipeline, spec())
    assert [f.index for f in fragments] == list(range(len(fragments)))
    assert [f.first_frame for f in fragments] == [sum(f.frames for f in fragments[:i]) for i in range(len(fragments))]
    assert sum(f.frames for f in fragments) == spec().frames
    assert len({f.init for f in fragments}) == 1
    for n in range(1, len(fragments) + 1):
        assert len(pictures(fragments[:n])) == sum(f.frames for f in fragments[:n])


async def test_a_size_that_latents_do_not_fit_is_cropped(
    pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    for picture in pictures(await fragments_of(pipeline, spec(size="80x112", seconds=1))):
        assert picture.shape == (112, 80, 3)


async def test_progress_counts_every_step(pipeline: LocalPipeline, spec: Callable[..., VideoSpec]) -> None:
    seen: list[StepDone] = []

    async def sink(fragment: Fragment) -> None: ...

    await pipeline.generate(spec(seconds=1), sink, seen.append)
    assert seen == [StepDone(step, 3) for step in (1, 2, 3)]


async def test_other_videos_in_flight_change_no_byte(pipeline: LocalPipeline, spec: Callable[..., VideoSpec]) -> None:
    alone = await fragments_of(pipeline, spec())
    others = [
        spec("a blue cube spinning", seed=1, num_inference_steps=5),
        spec("a green cone", seed=2, guidance_scale=1.0),
        spec("a small white ball at night", seed=3, seconds=1),
        spec("a red cone", seed=4, guidance_cache="alternate"),
    ]
    videos = [others[0], spec(), *others[1:]]
    together = await asyncio.gather(*(fragments_of(pipeline, video) for video in videos))
    assert together[1] == alone
    assert together[0] != alone
    assert together[-1] == await fragments_of(pipeline, others[-1])


async def test_kept_guidance_leaves_room_for_others(
    pipeline: LocalPipeline, spec: Callable[..., VideoSpec], tiny_bundle: Bundle
) -> None:
    """In a call of three rows two guided videos fit only while one of them needs no unconditional row."""
    rows: list[int] = []
    engine = Watched(
        OnnxRuntimeEngine(tiny_bundle.path_of("denoiser")), lambda feeds: rows.append(len(feeds["latents"]))
    )
    denoiser = EngineDenoiser(engine, tiny_bundle.manifest, limits=Limits(max_rows=3))
    asked = [spec(seconds=1, seed=seed, num_inference_steps=6, guidance_cache="alternate") for seed in (1, 2)]

    async def latents(video: VideoSpec) -> list[bytes]:
        request = await request_of(pipeline, video, str(video.seed))
        return [e.latents.tobytes() async for e in denoiser.denoise(request) if isinstance(e, LatentChunk)]

    alone = [await latents(video) for video in asked]
    assert rows == [2, 2, 1, 2, 1, 2] * 2
    rows.clear()
    assert await asyncio.gather(*map(latents, asked)) == alone
    assert sum(rows) == 2 * 10
    assert rows.count(3) >= 2
    await denoiser.stop()


async def test_another_seed_prompt_or_guidance_gives_another_video(
    pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    variants = [
        spec(seconds=1),
        spec(seconds=1, seed=8),
        spec("a blue cube", seconds=1),
        spec(seconds=1, guidance_scale=1.0),
        spec(seconds=1, negative_prompt="a blue cube"),
        spec(seconds=1, guidance_cache="alternate"),
    ]
    made = [await fragments_of(pipeline, variant) for variant in variants]
    assert len({b"".join(f.data for f in fragments) for fragments in made}) == len(variants)


async def test_the_first_fragment_is_out_before_the_second_half_is_decoded(
    tiny_bundle: Bundle, pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    events: list[str] = []

    class Recording(EngineDecoder):
        async def decode(
            self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True
        ) -> Fragment:
            events.append(f"decode {chunk.index}")
            return await super().decode(video_id, spec, chunk, interactive=interactive)

    async def sink(fragment: Fragment) -> None:
        events.append(f"out {fragment.index}")

    decoder = Recording.open(tiny_bundle)
    await generate(
        "video",
        spec(seconds=4),
        text_encoder=pipeline.text_encoder,
        denoiser=pipeline.denoiser,
        decoder=decoder,
        sink=sink,
    )
    await decoder.stop()
    assert [event for event in events if event.startswith("decode")] == [f"decode {i}" for i in range(6)]
    # Never more than two chunks are on their way to the sink, so fragment 0 is out before chunk 2 is begun.
    for i in range(4):
        assert events.index(f"out {i}") < events.index(f"decode {i + 2}")


@pytest.mark.parametrize(("interactive", "alone"), [(True, True), (True, False), (False, True)])
async def test_a_lone_viewer_sees_the_first_chunk_before_the_next_is_begun(
    tiny_causal_bundle: Bundle, interactive: bool, alone: bool
) -> None:
    calls: list[int] = []
    out_after: list[int] = []

    class Slow(EngineDecoder):
        async def decode(
            self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True
        ) -> Fragment:
            await asyncio.sleep(0.1)
            return await super().decode(video_id, spec, chunk, interactive=interactive)

    async def sink(_: Fragment) -> None:
        out_after.append(len(calls))

    manifest = tiny_causal_bundle.manifest
    engine = OnnxRuntimeEngine(tiny_causal_bundle.path_of("denoiser"))
    denoiser = EngineDenoiser(Watched(engine, lambda feeds: calls.append(len(feeds["latents"]))), manifest)
    decoder = Slow.open(tiny_causal_bundle)
    spec = small_spec(tiny_causal_bundle, seconds=2, num_inference_steps=2)
    async with (
        opened_pipeline(tiny_causal_bundle) as pipeline,
        aclosing(denoiser.denoise(replace(await request_of(pipeline, spec, "beside"), interactive=False))) as beside,
    ):
        if not alone:
            await anext(beside)
        await generate(
            "video",
            spec,
            text_encoder=pipeline.text_encoder,
            denoiser=denoiser,
            decoder=decoder,
            sink=sink,
            interactive=interactive,
        )
    one_chunk = 2  # its steps; what puts it into the cache comes after it
    assert (out_after[0] == one_chunk) == (interactive and alone)
    assert len(calls) >= one_chunk * len(out_after)
    await decoder.stop()
    await denoiser.stop()


async def test_a_viewer_who_does_not_come_back_is_waited_for_once(
    tiny_causal_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoising, "_SHOWING_SECONDS", 1.0)
    denoiser = EngineDenoiser.open(tiny_causal_bundle)
    spec = small_spec(tiny_causal_bundle, seconds=2, num_inference_steps=4)
    async with opened_pipeline(tiny_causal_bundle) as pipeline:
        async with aclosing(denoiser.denoise(await request_of(pipeline, spec))) as events:
            await anext(event async for event in events if isinstance(event, LatentChunk))
            calls_left = denoiser.outstanding_tokens
            began = time.monotonic()
            while denoiser.outstanding_tokens:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.02)
            assert calls_left
            assert 1 <= time.monotonic() - began < 4
        # Nobody is waited for any more when such a one has left.
        async with aclosing(denoiser.denoise(await request_of(pipeline, spec))) as events:
            assert [event.index async for event in events if isinstance(event, LatentChunk)] == [0, 1, 2]
    await denoiser.stop()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_bits_in_any_batch(tiny_bundle: Bundle, threads: int) -> None:
    """Invariant 2 rests on this: videos can share engine calls only because a row doesn't feel the others."""
    latent, text = tiny_bundle.manifest.latent, tiny_bundle.manifest.text
    rng = np.random.default_rng(5)
    reference = OnnxRuntimeEngine(tiny_bundle.path_of("denoiser"), threads=1)
    engine = OnnxRuntimeEngine(tiny_bundle.path_of("denoiser"), threads=threads)
    for frames, height, width in [(5, 6, 8), (1, 4, 4)]:
        feeds = {
            "latents": rng.standard_normal((8, latent.channels, frames, height, width), dtype=np.float32),
            "timestep": rng.uniform(0, 1000, (8, frames)).astype(np.float32),
            "encoder_hidden_states": rng.standard_normal((8, text.max_tokens, text.dim), dtype=np.float32),
        }
        alone = [reference.run({k: v[i : i + 1] for k, v in feeds.items()})["velocity"][0] for i in range(8)]
        for rows in (1, 2, 3, 5, 8):
            for start in range(0, 8 - rows + 1, rows):
                part = engine.run({k: v[start : start + rows] for k, v in feeds.items()})["velocity"]
                np.testing.assert_array_equal(part, np.stack(alone[start : start + rows]))
