"""A decoder's sessions: lost and made again, and fewer than there are videos."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import aclosing

import pytest
from pipelines import fragments_of, request_of
from watched import Watched

from models.bundle import Bundle
from serving.engines.opening import Opener
from serving.pipeline.decoding import EngineDecoder
from serving.pipeline.local import LocalPipeline
from serving.pipeline.stages import Fragment, LatentChunk, LostSession, VideoSpec


def with_decoder(pipeline: LocalPipeline, decoder: EngineDecoder) -> LocalPipeline:
    return LocalPipeline(pipeline.bundle, pipeline.text_encoder, pipeline.denoiser, decoder)


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
    assert await fragments_of(with_decoder(pipeline, decoder), spec(seconds=4)) == expected
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
        await fragments_of(with_decoder(pipeline, decoder), spec(seconds=1))
    await decoder.stop()
    assert pipeline.denoiser.sessions == 0


async def test_more_videos_than_decoder_sessions_still_all_come_out(
    tiny_bundle: Bundle, pipeline: LocalPipeline, spec: Callable[..., VideoSpec]
) -> None:
    decoder = EngineDecoder.open(tiny_bundle, max_sessions=1)
    expected = [await fragments_of(pipeline, spec(seed=seed)) for seed in range(3)]
    made = await asyncio.gather(*(fragments_of(with_decoder(pipeline, decoder), spec(seed=seed)) for seed in range(3)))
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
