"""The pipeline in one process, on a real (tiny, untrained) bundle: what comes out, in what order, whatever happens."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import av
import numpy as np
import pytest
from pipelines import opened_pipeline
from watched import Watched

from models.bundle import Bundle
from serving.engines.engine import Array, EngineError
from serving.engines.onnx_runtime import OnnxRuntimeEngine
from serving.engines.opening import Opener
from serving.pipeline.decoding import EngineDecoder
from serving.pipeline.denoising import EngineDenoiser
from serving.pipeline.generation import generate
from serving.pipeline.local import LocalPipeline
from serving.pipeline.request import make_spec
from serving.pipeline.stages import (
    Decoder,
    DenoiseRequest,
    Fragment,
    LatentChunk,
    LostSession,
    StepDone,
    VideoSpec,
)

PROMPT = "a red ball bouncing on a sand floor at sunset"


@pytest.fixture
async def pipeline(tiny_bundle: Bundle) -> AsyncGenerator[LocalPipeline, None]:
    async with opened_pipeline(tiny_bundle) as opened:
        yield opened


@pytest.fixture
def spec(tiny_bundle: Bundle) -> Callable[..., VideoSpec]:
    def make(prompt: str = PROMPT, **asked: Any) -> VideoSpec:
        side = tiny_bundle.manifest.limits.min_side
        defaults = {"seed": 7, "num_inference_steps": 3, "size": f"{side}x{side}"}
        return make_spec(tiny_bundle.manifest, prompt, rewrite_prompt=False, **{**defaults, **asked})

    return make


async def fragments_of(
    pipeline: LocalPipeline, spec: VideoSpec, *, decoder: Decoder | None = None, video_id: str = "video"
) -> list[Fragment]:
    fragments: list[Fragment] = []

    async def sink(fragment: Fragment) -> None:
        fragments.append(fragment)

    await generate(
        video_id,
        spec,
        text_encoder=pipeline.text_encoder,
        denoiser=pipeline.denoiser,
        decoder=decoder or pipeline.decoder,
        sink=sink,
    )
    return fragments


async def request_of(pipeline: LocalPipeline, spec: VideoSpec, video_id: str = "video") -> DenoiseRequest:
    encode = pipeline.text_encoder.encode
    return DenoiseRequest(video_id, spec, await encode(spec.prompt), await encode(spec.negative_prompt))


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
    ]
    videos = [others[0], spec(), *others[1:]]
    together = await asyncio.gather(*(fragments_of(pipeline, video, video_id=str(i)) for i, video in enumerate(videos)))
    assert together[1] == alone
    assert together[0] != alone


async def test_another_seed_prompt_or_guidance_gives_another_video(
    pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    variants = [
        spec(seconds=1),
        spec(seconds=1, seed=8),
        spec("a blue cube", seconds=1),
        spec(seconds=1, guidance_scale=1.0),
        spec(seconds=1, negative_prompt="a blue cube"),
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


async def test_a_lost_decoder_session_is_replayed_to_the_same_bytes(
    tiny_bundle: Bundle, pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    expected = await fragments_of(pipeline, spec(seconds=4))
    losses = {1, 4}

    class Forgetful(EngineDecoder):
        async def decode(
            self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True
        ) -> Fragment:
            if chunk.index in losses:
                losses.remove(chunk.index)
                await self.close(video_id)
            return await super().decode(video_id, spec, chunk, interactive=interactive)

    decoder = Forgetful.open(tiny_bundle)
    assert await fragments_of(pipeline, spec(seconds=4), decoder=decoder) == expected
    await decoder.stop()
    assert not losses


async def test_a_decoder_that_never_keeps_a_session_is_given_up(
    tiny_bundle: Bundle, pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    class Amnesiac(EngineDecoder):
        async def decode(
            self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True
        ) -> Fragment:
            if chunk.index:
                await self.close(video_id)
            return await super().decode(video_id, spec, chunk, interactive=interactive)

    decoder = Amnesiac.open(tiny_bundle)
    with pytest.raises(LostSession, match="chunk 1"):
        await fragments_of(pipeline, spec(seconds=1), decoder=decoder)
    await decoder.stop()
    assert pipeline.denoiser.sessions == 0


async def test_more_videos_than_decoder_sessions_still_all_come_out(
    tiny_bundle: Bundle, pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    decoder = EngineDecoder.open(tiny_bundle, max_sessions=1)
    expected = [await fragments_of(pipeline, spec(seed=seed)) for seed in range(3)]
    made = await asyncio.gather(
        *(fragments_of(pipeline, spec(seed=seed), decoder=decoder, video_id=str(seed)) for seed in range(3))
    )
    assert made == expected
    assert decoder.sessions == 0
    await decoder.stop()


async def test_the_longest_idle_session_makes_room(
    tiny_bundle: Bundle, pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    async with aclosing(pipeline.denoiser.denoise(await request_of(pipeline, spec()))) as events:
        chunks = [event async for event in events if isinstance(event, LatentChunk)]
    decoder = EngineDecoder.open(tiny_bundle, max_sessions=2, idle_seconds=0)
    for video in ("a", "b"):
        await decoder.decode(video, spec(), chunks[0])
    await decoder.decode("a", spec(), chunks[1])
    await decoder.decode("c", spec(), chunks[0])
    assert decoder.sessions == 2
    with pytest.raises(LostSession, match="b: no decoder session"):
        await decoder.decode("b", spec(), chunks[1])
    with pytest.raises(LostSession, match="is at 2, not at 1"):
        await decoder.decode("a", spec(), chunks[1])
    await decoder.decode("a", spec(), chunks[2])
    await decoder.stop()


async def test_what_somebody_watches_is_decoded_before_a_batch_and_finds_a_place(
    tiny_bundle: Bundle, pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    async with aclosing(pipeline.denoiser.denoise(await request_of(pipeline, spec()))) as events:
        chunk = await anext(event async for event in events if isinstance(event, LatentChunk))
    begun, gate, done = threading.Event(), threading.Event(), list[str]()

    def hold(_: object) -> None:
        begun.set()
        gate.wait()

    first, following = Opener(tiny_bundle).open("decoder_first", "decoder_next")
    decoder = EngineDecoder((Watched(first, hold), following), tiny_bundle.manifest, max_sessions=3)

    async def decode(video: str) -> None:
        await decoder.decode(video, spec(), chunk, interactive=video.startswith("stream"))
        done.append(video)

    tasks = {video: asyncio.create_task(decode(video)) for video in ("batch 1", "batch 2", "batch 3", "batch 4")}
    await asyncio.to_thread(begun.wait)
    tasks["stream"] = asyncio.create_task(decode("stream"))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*(tasks[video] for video in ("batch 1", "batch 2", "stream")))
    assert done == ["batch 1", "stream", "batch 2"]
    # Of three places a batch has two, and the next of it gets one when one of them is free.
    assert decoder.sessions == 3
    await decoder.close("stream")
    tasks["batch 3"].cancel()
    await asyncio.gather(tasks["batch 3"], return_exceptions=True)
    assert decoder.sessions == 2
    await decoder.close("batch 1")
    await tasks["batch 4"]
    assert done[3:] == ["batch 4"]
    for video in tasks:
        await decoder.close(video)
    assert decoder.sessions == 0
    await decoder.stop()


async def test_cancelling_frees_the_rows_before_the_next_step_but_one(
    tiny_bundle: Bundle, pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    rows: list[int] = []
    engine = OnnxRuntimeEngine(tiny_bundle.path_of("denoiser"))
    denoiser = EngineDenoiser(Watched(engine, lambda feeds: rows.append(len(feeds["latents"]))), tiny_bundle.manifest)
    stays = await request_of(pipeline, spec(num_inference_steps=12), "stays")
    goes = await request_of(pipeline, spec(num_inference_steps=12, seed=8), "goes")

    async def all_events() -> list[StepDone | LatentChunk]:
        async with aclosing(denoiser.denoise(stays)) as events:
            return [event async for event in events]

    staying = asyncio.create_task(all_events())
    async with aclosing(denoiser.denoise(goes)) as events:
        async for event in events:
            assert isinstance(event, StepDone)
            if event.step == 3:
                break
    assert denoiser.sessions == 1
    calls_when_closed = len(rows)
    assert sum(isinstance(event, StepDone) for event in await staying) == 12
    # The call that was under way when the generator was closed may still have held the rows; none after it did.
    assert 4 in rows
    assert set(rows[calls_when_closed + 1 :]) == {2}
    assert denoiser.sessions == 0
    assert denoiser.outstanding_tokens == 0
    await denoiser.stop()


async def test_cancelling_a_video_leaves_nothing_behind(
    pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    first = asyncio.Event()

    async def stalled(fragment: Fragment) -> None:
        first.set()
        await asyncio.Event().wait()

    making = asyncio.create_task(pipeline.generate(spec(), stalled))
    await first.wait()
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert pipeline.denoiser.sessions == 0
    assert pipeline.decoder.sessions == 0
    assert len(await fragments_of(pipeline, spec(seconds=1))) > 1


async def test_what_the_sink_raises_comes_out_and_leaves_nothing_behind(
    pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    async def full(fragment: Fragment) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        await pipeline.generate(spec(), full)
    assert pipeline.denoiser.sessions == 0
    assert pipeline.decoder.sessions == 0


async def test_a_failed_call_fails_its_videos_and_no_other(
    tiny_bundle: Bundle, pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    def fail_once(feeds: Mapping[str, Array]) -> None:
        if len(feeds["latents"]) == 1 and not failed:
            failed.append(True)
            raise EngineError("denoiser: out of memory")

    failed: list[bool] = []
    engine = OnnxRuntimeEngine(tiny_bundle.path_of("denoiser"))
    denoiser = EngineDenoiser(Watched(engine, fail_once), tiny_bundle.manifest)

    async def last(request: DenoiseRequest) -> StepDone | LatentChunk:
        async with aclosing(denoiser.denoise(request)) as events:
            return [event async for event in events][-1]

    # Another shape, so that the two are never in one call.
    good = await request_of(pipeline, spec())
    bad = await request_of(pipeline, spec(seconds=1, guidance_scale=1.0), "bad")
    results = await asyncio.gather(last(bad), last(good), return_exceptions=True)
    assert isinstance(results[0], EngineError)
    assert isinstance(results[1], LatentChunk)
    assert isinstance(await last(bad), LatentChunk)
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
