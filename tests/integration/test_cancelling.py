"""Whoever is cancelled or fails frees every stage, even when cancelled once more while at it; nobody else feels it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

import pytest
from pipelines import fragments_of, idle, opened_pipeline, request_of, small_spec
from watched import Watched

from models.bundle import Bundle
from serving.engines.engine import Array, EngineError
from serving.engines.onnx_runtime import OnnxRuntimeEngine
from serving.pipeline.denoising import EngineDenoiser
from serving.pipeline.interactive import Interaction
from serving.pipeline.local import LocalPipeline
from serving.pipeline.stages import DenoiseRequest, Fragment, LatentChunk, StepDone, VideoSpec


@pytest.fixture
async def causal_pipeline(tiny_causal_bundle: Bundle) -> AsyncGenerator[LocalPipeline, None]:
    async with opened_pipeline(tiny_causal_bundle) as opened:
        yield opened


@pytest.fixture
def causal_spec(tiny_causal_bundle: Bundle) -> VideoSpec:
    return small_spec(tiny_causal_bundle, seconds=4, num_inference_steps=2)


async def test_cancelling_frees_the_rows_before_the_next_step_but_one(
    tiny_bundle: Bundle, pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    rows: list[int] = []
    closed = threading.Event()

    def seen(feeds: Mapping[str, Array]) -> None:
        rows.append(len(feeds["latents"]))
        if len(rows) == 6:  # both are in it, and it is under way
            closed.wait()

    engine = OnnxRuntimeEngine(tiny_bundle.path_of("denoiser"))
    denoiser = EngineDenoiser(Watched(engine, seen), tiny_bundle.manifest)
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
    closed.set()
    assert sum(isinstance(event, StepDone) for event in await staying) == 12
    # The call that was under way when the generator was closed may still have held the rows; none after it did.
    assert 4 in rows
    assert set(rows[6:]) == {2}
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
    assert idle(pipeline)
    assert len(await fragments_of(pipeline, spec(seconds=1))) > 1


async def test_what_the_sink_raises_comes_out_and_leaves_nothing_behind(
    pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    async def full(fragment: Fragment) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        await pipeline.generate(spec(), full)
    assert idle(pipeline)


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


async def cancel_twice(making: asyncio.Task[None]) -> None:
    for _ in range(2):
        making.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await making


@pytest.mark.parametrize("fails", [False, True])
async def test_a_session_that_is_cancelled_twice_frees_every_stage(
    causal_pipeline: LocalPipeline, causal_spec: VideoSpec, fails: bool
) -> None:
    """As when a connection is lost: sending fails, and while that is cleaned up after, listening does."""

    async def play() -> None:
        async with aclosing(interaction.fragments()) as fragments:
            async for _ in fragments:
                out.set()
                if fails:
                    raise ConnectionError
                await asyncio.Event().wait()

    out = asyncio.Event()
    interaction = Interaction("sess_1", causal_pipeline.bundle.manifest, causal_spec, causal_pipeline)
    await interaction.begin()
    playing = asyncio.create_task(play())
    await out.wait()
    assert not idle(causal_pipeline)
    await cancel_twice(playing)
    assert idle(causal_pipeline)


@pytest.mark.parametrize("fails", [False, True])
async def test_a_video_that_is_cancelled_twice_frees_every_stage(
    causal_pipeline: LocalPipeline, causal_spec: VideoSpec, fails: bool
) -> None:
    async def sink(_: Fragment) -> None:
        out.set()
        if fails:
            raise OSError("disk full")
        await asyncio.Event().wait()

    out = asyncio.Event()
    making = asyncio.create_task(causal_pipeline.generate(causal_spec, sink))
    await out.wait()
    assert not idle(causal_pipeline)
    await cancel_twice(making)
    assert idle(causal_pipeline)
