"""The Python client against the service on a real socket, through connections that break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from making import FRAGMENTS, WHOLE, Making, queued
from service import Service, WholeService

from models.bundle import Bundle
from serving.client import ApiError, AsyncRushes, Rushes, Unreachable, VideoFailed
from serving.pipeline.local import LocalPipeline


@pytest.fixture
async def client(http: httpx.AsyncClient) -> AsyncIterator[AsyncRushes]:
    async with AsyncRushes(str(http.base_url), retry_seconds=10) as opened:
        yield opened


@pytest.fixture
async def making(service: Service, http: httpx.AsyncClient) -> Making:
    return await Making.begun(service, await queued(http))


class Flaky:
    """A way to the service that breaks: the first connections are cut after so many bytes of their answers."""

    def __init__(self, target: str, cuts: list[int]) -> None:
        parts = urlsplit(target)
        self._target, self._cuts = (parts.hostname, parts.port), iter(cuts)
        self.connections = 0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        left = next(self._cuts, 1 << 40)
        above, below = await asyncio.open_connection(*self._target)
        asking = asyncio.create_task(self._pump(reader, below))
        with suppress(OSError):
            while left > 0 and (data := await above.read(min(left, 65536))):
                writer.write(data)
                await writer.drain()
                left -= len(data)
        asking.cancel()
        below.transport.abort()
        writer.transport.abort() if left <= 0 else writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def flaky(target: str, cuts: list[int]) -> AsyncIterator[tuple[str, Flaky]]:
    way = Flaky(target, cuts)
    server = await asyncio.start_server(way.carry, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", way
    finally:
        server.close()


async def test_no_chunk_is_lost_or_repeated_over_broken_connections(http: httpx.AsyncClient, making: Making) -> None:
    # Within the headers, within the init segment, within a fragment, after one.
    cuts = [40, 500, 2500, 6000, len(WHOLE) // 2, 300, 900]
    async with flaky(str(http.base_url), cuts) as (url, way), AsyncRushes(url, retry_seconds=20) as client:
        seen = b""
        indexes = []
        following = count()
        await making.show(next(following))
        async for chunk in client.watch(making.id):
            indexes.append(chunk.index)
            seen += chunk.data
            if (index := next(following)) < len(FRAGMENTS):
                await making.show(index)
            else:
                await making.complete()
        assert indexes == [0, 1, 2, 3]
        assert FRAGMENTS[0].init + seen == WHOLE
        assert way.connections > 3


async def test_events_go_on_over_broken_connections(http: httpx.AsyncClient, making: Making) -> None:
    await making.show(0, 1, 2, 3)
    await making.complete()
    async with flaky(str(http.base_url), [100, 2000, 4000, 200]) as (url, _), AsyncRushes(url) as client:
        events = [event async for event in client.events(making.id)]
    assert [event.data["index"] for event in events if event.name == "chunk"] == [0, 1, 2, 3]
    assert events[-1].name == "completed"


async def test_a_failed_video_raises_after_what_there_is(client: AsyncRushes, making: Making) -> None:
    await making.show(0, 1)
    await making.fail()
    chunks = client.watch(making.id)
    assert [(await anext(chunks)).index, (await anext(chunks)).index] == [0, 1]
    with pytest.raises(VideoFailed, match="out of memory"):
        await anext(chunks)
    with pytest.raises(VideoFailed):
        await client.wait(making.id)


async def test_refusals_are_typed(client: AsyncRushes) -> None:
    with pytest.raises(ApiError) as refused:
        await client.create("a red ball", seconds=1000)
    assert (refused.value.status, refused.value.param) == (400, "seconds")
    with pytest.raises(ApiError) as missing:
        await anext(client.watch("video_0"))
    assert missing.value.status == 404


async def test_a_service_that_is_away_is_tried_for_as_long_as_asked() -> None:
    async with AsyncRushes("http://127.0.0.1:9", retry_seconds=0.3) as client:
        with pytest.raises(Unreachable):
            await client.get("video_0")


async def test_lists_and_cancels(client: AsyncRushes, service: Service) -> None:
    ids = [(await client.create("a red ball", seconds=1))["id"] for _ in range(5)]
    assert [video["id"] async for video in client.list(order="asc")] == ids
    assert [video["id"] async for video in client.list(limit=2)] == ids[:-3:-1]
    assert (await client.cancel(ids[0]))["error"]["code"] == "cancelled"
    await client.delete(ids[1])
    assert len([video async for video in client.list()]) == 4
    again = await client.create("a red ball", seconds=1, idempotency_key="once")
    assert (await client.create("a red ball", seconds=1, idempotency_key="once"))["id"] == again["id"]


async def test_everything_without_asyncio(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Against the whole service: made, watched, saved, in a batch."""

    def use(url: str) -> None:
        progress: list[int] = []
        with Rushes(url) as rushes:
            video = rushes.create("a red ball", seconds=1, size="64x64", num_inference_steps=3, seed=3)
            frames = list(rushes.frames(video["id"]))
            assert (len(frames), frames[0].shape) == (17, (64, 64, 3))
            assert rushes.wait(video["id"], progress.append)["status"] == "completed"
            rushes.save(video["id"], tmp_path / "ball.mp4")
            assert (tmp_path / "ball.mp4").read_bytes()[4:8] == b"ftyp"
            assert [video["id"] for video in rushes.list()] == [video["id"]]
            assert [event.name for event in rushes.events(video["id"])][-1] == "completed"
            body = {"prompt": "a blue cube", "seconds": 1, "size": "64x64", "num_inference_steps": 2}
            batch = rushes.wait_batch(rushes.create_batch([body, body])["id"], poll_seconds=0.1)
            assert batch["status"] == "completed"
            assert sorted(line["custom_id"] for line in rushes.batch_results(batch)) == ["0", "1"]

    async with LocalPipeline.open(tiny_bundle) as pipeline:
        service = WholeService(tiny_bundle, pipeline, tmp_path)
        async with service.running() as http:
            await asyncio.to_thread(use, str(http.base_url))


async def test_watching_the_same_pixels_that_are_in_the_log(client: AsyncRushes, making: Making) -> None:
    await making.show(0, 1, 2, 3)
    await making.complete()
    frames = np.stack([frame async for frame in client.frames(making.id)])
    assert frames.shape == (45, 64, 64, 3)
    assert np.abs(frames[:, 8:56, 8:56, 2].mean((1, 2)) - 5 * np.arange(45)).max() < 4
