"""Watching a video while it is made: from anywhere in it, at any time, by as many as like, in any of its forms."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import av
import httpx
import numpy as np
import pytest
from making import CHUNKS, FPS, FRAGMENTS, WHOLE, Making, queued
from service import Service, assert_envelope

from serving.media.trailer import read_error


@pytest.fixture
def client(http: httpx.AsyncClient) -> httpx.AsyncClient:
    return http


@pytest.fixture
async def making(service: Service, client: httpx.AsyncClient) -> Making:
    return await Making.begun(service, await queued(client))


@asynccontextmanager
async def reading(client: httpx.AsyncClient, path: str, **options: Any) -> AsyncIterator[Reader]:
    async with client.stream("GET", path, **options) as answer:
        assert answer.status_code == 200, await answer.aread()
        yield Reader(answer)


class Reader:
    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self.seen = b""
        self._bytes = answer.aiter_raw()

    async def until(self, size: int) -> bytes:
        while len(self.seen) < size:
            self.seen += await anext(self._bytes)
        return self.seen

    async def rest(self) -> bytes:
        async for piece in self._bytes:
            self.seen += piece
        return self.seen


async def test_a_stream_shows_each_fragment_when_it_is_there_and_ends_with_the_video(
    client: httpx.AsyncClient, making: Making
) -> None:
    async with reading(client, f"/v1/videos/{making.id}/stream") as reader:
        assert reader.answer.headers["content-type"] == "video/mp4"
        expected = FRAGMENTS[0].init
        for index, fragment in enumerate(FRAGMENTS):
            await making.show(index)
            expected += fragment.data
            assert await reader.until(len(expected)) == expected
        await making.complete()
        assert await reader.rest() == WHOLE


async def test_late_and_returning_readers_get_the_same_bytes(client: httpx.AsyncClient, making: Making) -> None:
    await making.show(0, 1, 2, 3)
    late = asyncio.create_task(client.get(f"/v1/videos/{making.id}/stream"))
    back = asyncio.create_task(client.get(f"/v1/videos/{making.id}/stream?from_fragment=2"))
    await making.complete()
    assert (await late).content == WHOLE
    assert (await back).content == FRAGMENTS[0].init + FRAGMENTS[2].data + FRAGMENTS[3].data
    assert (await client.get(f"/v1/videos/{making.id}/stream")).content == WHOLE
    beyond = await client.get(f"/v1/videos/{making.id}/stream?from_fragment=4")
    assert (beyond.status_code, beyond.content) == (200, b"")


@pytest.mark.parametrize("in_log", [True, False])
async def test_a_failed_video_ends_its_stream_with_what_was_wrong(
    client: httpx.AsyncClient, making: Making, in_log: bool
) -> None:
    async with reading(client, f"/v1/videos/{making.id}/stream") as reader:
        await making.show(0)
        begun = FRAGMENTS[0].init + FRAGMENTS[0].data
        await reader.until(len(begun))
        await making.fail(in_log=in_log)
        trailer = (await reader.rest()).removeprefix(begun)
    assert int.from_bytes(trailer[:4], "big") == len(trailer)
    assert trailer[4:8] == b"emsg"
    assert trailer[32:].startswith(b"urn:rushes:error:2026\0generation_failed\0")
    assert read_error(trailer) == ("generation_failed", "out of memory")
    # Players pass over it.
    with av.open(io.BytesIO(begun + trailer)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9


async def test_frames_without_a_codec(client: httpx.AsyncClient, making: Making) -> None:
    await making.show(0, 1, 2, 3)
    await making.complete()
    bare = await client.get(f"/v1/videos/{making.id}/stream?format=rgb24&from_fragment=1")
    about = [int(bare.headers[f"x-video-{name}"]) for name in ("width", "height", "fps")]
    assert about == [64, 64, FPS]
    frames = np.frombuffer(bare.content, np.uint8).reshape(-1, 64, 64, 3)
    assert len(frames) == 36
    # The clip's blue says which frame it is.
    assert np.abs(frames[:, 8:56, 8:56, 2].mean((1, 2)) - 5 * np.arange(9, 45)).max() < 4

    pictures = await client.get(f"/v1/videos/{making.id}/stream?format=jpeg&from_fragment=3")
    assert pictures.headers["content-type"] == "multipart/x-mixed-replace; boundary=frame"
    numbers = [int(found) for found in re.findall(rb"X-Frame: (\d+)\r\n", pictures.content)]
    assert numbers == list(range(33, 45))
    first = pictures.content.partition(b"\r\n\r\n")[2].partition(b"\r\n--frame")[0]
    with av.open(io.BytesIO(first)) as opened:
        assert next(opened.decode(video=0)).width == 64


async def test_jpegs_of_a_failed_video_end_with_what_was_wrong(client: httpx.AsyncClient, making: Making) -> None:
    await making.show(0)
    await making.fail()
    parts = (await client.get(f"/v1/videos/{making.id}/stream?format=jpeg")).content.split(b"--frame\r\n")
    assert len(parts) == 1 + 9 + 1
    assert b'"code": "generation_failed"' in parts[-1]
    assert (await client.get(f"/v1/videos/{making.id}/hls/media.m3u8")).text.endswith("#EXT-X-ENDLIST\n")


async def test_nothing_to_show_of_a_video_that_failed_at_once(client: httpx.AsyncClient, making: Making) -> None:
    await making.fail()
    for path in ("stream?format=rgb24", "hls/master.m3u8", "hls/media.m3u8", "hls/init.mp4"):
        assert_envelope(await client.get(f"/v1/videos/{making.id}/{path}"), 400, "video_id")


async def test_a_completed_video_whose_fragments_are_lost_keeps_nobody_waiting(
    service: Service, client: httpx.AsyncClient, making: Making
) -> None:
    await service.store.complete(making.id, making.video.fence)
    assert (await client.get(f"/v1/videos/{making.id}/stream")).content == b""
    assert_envelope(await client.get(f"/v1/videos/{making.id}/hls/media.m3u8"), 404, "video_id")
    assert "event: completed" in (await client.get(f"/v1/videos/{making.id}/events")).text


@pytest.mark.parametrize(
    ("path", "status", "param"),
    [
        ("stream?from_fragment=-1", 400, "from_fragment"),
        ("stream?from_fragment=x", 400, "from_fragment"),
        ("stream?format=gif", 400, "format"),
        ("hls/media.m3u8?_HLS_part=1", 400, "_HLS_part"),
        ("hls/media.m3u8?_HLS_msn=9", 400, "_HLS_msn"),
        ("hls/parts/7.m4s", 404, "index"),
        ("hls/parts/-1.m4s", 400, "index"),
        ("hls/segments/1.m4s", 404, "index"),
    ],
)
async def test_what_is_wrong_is_said(
    client: httpx.AsyncClient, making: Making, path: str, status: int, param: str
) -> None:
    await making.show(0, 1, 2)
    assert_envelope(await client.get(f"/v1/videos/{making.id}/{path}"), status, param)


@pytest.mark.parametrize("path", ["stream", "events", "hls/master.m3u8", "hls/media.m3u8", "hls/parts/0.m4s"])
async def test_videos_that_are_not_there(client: httpx.AsyncClient, path: str) -> None:
    assert_envelope(await client.get(f"/v1/videos/video_0/{path}"), 404, "video_id")


async def test_a_last_event_id_that_nobody_gave(client: httpx.AsyncClient, making: Making) -> None:
    answer = await client.get(f"/v1/videos/{making.id}/events", headers={"Last-Event-ID": "soon"})
    assert_envelope(answer, 400, "Last-Event-ID")


async def test_hls_waits_for_what_it_announces(client: httpx.AsyncClient, making: Making) -> None:
    base = f"/v1/videos/{making.id}/hls/"
    master = asyncio.create_task(client.get(base + "master.m3u8"))
    await making.show(0)
    assert 'CODECS="avc1.' in (await master).text
    live = (await client.get(base + "media.m3u8")).text
    assert "parts/0.m4s" in live
    assert 'URI="parts/1.m4s"' in live.splitlines()[-1]

    hinted = asyncio.create_task(client.get(base + "parts/1.m4s"))
    blocked = asyncio.create_task(client.get(base + "media.m3u8?_HLS_msn=1&_HLS_part=1"))
    whole = asyncio.create_task(client.get(base + "media.m3u8?_HLS_msn=1"))
    await making.show(1)
    assert (await hinted).content == FRAGMENTS[1].data
    assert not blocked.done()
    await making.show(2)
    assert "parts/2.m4s" in (await blocked).text
    assert not whole.done()
    await making.show(3)
    assert "segments/1.m4s" in (await whole).text
    for index, held in enumerate((FRAGMENTS[:1], FRAGMENTS[1:])):
        segment = await client.get(base + f"segments/{index}.m4s")
        assert segment.content == b"".join(fragment.data for fragment in held)
    assert (await client.get(base + "init.mp4")).content == FRAGMENTS[0].init

    last = asyncio.create_task(client.get(base + "media.m3u8?_HLS_msn=2&_HLS_part=0"))
    await making.complete()
    assert (await last).text.endswith("segments/1.m4s\n#EXT-X-ENDLIST\n")


async def test_a_player_reads_the_live_and_the_finished_playlist(client: httpx.AsyncClient, making: Making) -> None:
    url = str(client.base_url.join(f"/v1/videos/{making.id}/hls/master.m3u8"))

    def play() -> list[int]:
        with av.logging.Capture(local=False) as said, av.open(url) as container:
            assert container.streams.video[0].average_rate == FPS
            numbers = [round(frame.time * FPS) for frame in container.decode(video=0)]
        assert [line for line in said if line[0] <= av.logging.WARNING] == []
        return numbers

    av.logging.set_level(av.logging.WARNING)
    try:
        await making.show(0, 1, 2)
        live = asyncio.create_task(asyncio.to_thread(play))
        await making.show(3)
        await making.complete()
        assert await live == list(range(45))
        assert await asyncio.to_thread(play) == list(range(45))
    finally:
        av.logging.set_level(None)


@pytest.mark.parametrize("ended", [False, True])
async def test_the_multivariant_playlist_is_true(client: httpx.AsyncClient, making: Making, ended: bool) -> None:
    """4.4.6.2: what a variant needs is no more than what its playlist says, once that is known."""
    await making.show(0, 1, 2, 3)
    if ended:
        await making.complete()
    answer = await client.get(f"/v1/videos/{making.id}/hls/master.m3u8")
    assert answer.headers["content-type"] == "application/vnd.apple.mpegurl"
    assert "#EXT-X-INDEPENDENT-SEGMENTS" in answer.text
    said = dict(re.findall(r'([A-Z-]+)=("[^"]*"|[^,\n]*)', answer.text.splitlines()[-2]))
    assert said.keys() == {"BANDWIDTH", "AVERAGE-BANDWIDTH", "CODECS", "RESOLUTION", "FRAME-RATE"}
    bits = [8 * len(fragment.data) for fragment in FRAGMENTS]
    seconds = [(stop - start) / FPS for start, stop in CHUNKS]
    segments = [bits[0] / seconds[0], sum(bits[1:]) / sum(seconds[1:])]
    assert int(said["BANDWIDTH"]) >= max(segments)
    assert int(said["AVERAGE-BANDWIDTH"]) >= int(sum(bits) / sum(seconds))
    assert said["RESOLUTION"] == "64x64"
    assert said["FRAME-RATE"] == "16.000"
    with av.open(io.BytesIO(WHOLE)) as container:
        level = container.streams.video[0].codec_context.extradata[1:4].hex().upper()
    assert said["CODECS"] == f'"avc1.{level}"'


class Events:
    """Server-sent events, as a browser reads them."""

    def __init__(self, answer: httpx.Response) -> None:
        self._lines = answer.aiter_lines()

    async def next(self) -> tuple[str, str | None, dict[str, Any]]:
        fields: dict[str, str] = {}
        async for line in self._lines:
            if not line and fields:
                return fields["event"], fields.get("id"), json.loads(fields["data"])
            if line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                fields[name] = value
        raise EOFError

    async def until(self, name: str) -> dict[str, Any]:
        while True:
            event, _, data = await self.next()
            if event == name:
                return data


async def test_events_tell_a_video_from_the_queue_to_its_end(service: Service, client: httpx.AsyncClient) -> None:
    first = await queued(client)
    second = await queued(client)
    async with client.stream("GET", f"/v1/videos/{second}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = Events(answer)
        assert (await events.next())[::2] == ("queued", {"video_id": second, "position": 1})
        await service.completed(first)
        assert (await events.until("queued"))["position"] == 0
        making = await Making.begun(service, second)
        assert (await events.until("started"))["attempt"] == 1
        await service.store.set_progress(second, making.video.fence, 40, step=9, steps=20)
        assert await events.until("progress") == {"video_id": second, "progress": 40, "step": 9, "steps": 20}
        for index in range(2):
            await service.storage.previews.put(second, index, b"jpeg")
        for index in range(2):
            preview = {"video_id": second, "index": index, "preview": "data:image/jpeg;base64,anBlZw=="}
            assert await events.next() == ("preview", None, preview)
        await making.show(0)
        event, event_id, chunk = await events.next()
        assert (event, event_id) == ("chunk", "0")
        assert (chunk["first_frame"], chunk["frames"], chunk["seconds"]) == (0, 9, 9 / FPS)
        assert chunk["sha256"] == hashlib.sha256(FRAGMENTS[0].data).hexdigest()
        kind, _, data = chunk["preview"].partition(";base64,")
        with av.open(io.BytesIO(base64.b64decode(data))) as opened:
            assert (kind, next(opened.decode(video=0)).width) == ("data:image/jpeg", 64)
        await making.show(1)
        assert (await events.until("chunk"))["start_seconds"] == 9 / FPS
        await making.complete()
        assert (await events.until("completed"))["status"] == "completed"
        assert await service.storage.previews.since(second, 0) == []
        with pytest.raises(EOFError):
            await events.next()


async def test_a_client_that_comes_back_is_told_only_what_is_new(client: httpx.AsyncClient, making: Making) -> None:
    await making.show(0, 1, 2, 3)
    await making.fail()
    ids, last = [], ""
    async with client.stream("GET", f"/v1/videos/{making.id}/events", headers={"Last-Event-ID": "1"}) as answer:
        events = Events(answer)
        while last != "failed":
            last, event_id, data = await events.next()
            ids.append(event_id)
    assert ids == ["2", "3", None]
    assert data["error"] == {"code": "generation_failed", "message": "out of memory"}
