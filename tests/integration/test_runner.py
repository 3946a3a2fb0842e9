"""Runner, stages, store, log and HTTP together in one process, without Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import fields
from pathlib import Path

import pytest
import pytest_asyncio
from service import WholeService, until

from models.bundle import Bundle
from serving.api.creation import new_video
from serving.api.models import Catalog
from serving.api.schemas import parse_create
from serving.deployments.attempt import Stages
from serving.engines.engine import EngineError
from serving.jobs.fragment_log import FragmentLog
from serving.jobs.store import SqlVideoStore, Video, VideoStatus
from serving.jobs.sweeper import Sweeper
from serving.jobs.video import BATCH
from serving.media.trailer import error_box
from serving.pipeline.local import LocalPipeline
from serving.pipeline.stages import DenoiseRequest, Fragment, LatentChunk, StepDone, VideoSpec, same_bundle

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASKED = {"prompt": "a red ball", "seconds": 4, "seed": 7, "num_inference_steps": 2}


class GatedDecoder:
    """The real decoder, which decodes nothing of a video's second half before `gate` opens."""

    def __init__(self, pipeline: LocalPipeline, first_gated_chunk: int) -> None:
        self._decoder = pipeline.decoder
        self._first_gated_chunk = first_gated_chunk
        self.gate = asyncio.Event()

    async def decode(self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True) -> Fragment:
        if chunk.index >= self._first_gated_chunk:
            await self.gate.wait()
        return await self._decoder.decode(video_id, spec, chunk, interactive=interactive)

    async def replay(self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True) -> None:
        await self._decoder.replay(video_id, spec, chunk, interactive=interactive)

    async def close(self, video_id: str) -> None:
        await self._decoder.close(video_id)


class PatientDecoder(GatedDecoder):
    """The real decoder, which decodes a chunk when somebody can see its latents."""

    def __init__(self, service: WholeService) -> None:
        super().__init__(service.pipeline, 0)
        self._previews = service.storage.previews
        self.seen: dict[int, bytes] = {}

    async def decode(self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True) -> Fragment:
        while not (found := await self._previews.since(video_id, chunk.index)):
            pass
        self.gate.set()
        self.seen[chunk.index] = found[0][1]
        return await super().decode(video_id, spec, chunk, interactive=interactive)


class ReplacedDecoder:
    """The real decoder, until another bundle's takes its place."""

    def __init__(self, pipeline: LocalPipeline, first_chunk: int) -> None:
        self._decoder, self._first_chunk = pipeline.decoder, first_chunk

    async def decode(self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True) -> Fragment:
        same_bundle("now" if chunk.index >= self._first_chunk else "before", "before")
        return await self._decoder.decode(video_id, spec, chunk, interactive=interactive)

    async def replay(self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True) -> None:
        await self._decoder.replay(video_id, spec, chunk, interactive=interactive)

    async def close(self, video_id: str) -> None:
        await self._decoder.close(video_id)


class BrokenDenoiser:
    """Fails as an engine does, after a step."""

    async def denoise(self, request: DenoiseRequest) -> AsyncGenerator[StepDone | LatentChunk, None]:
        yield StepDone(1, 2)
        raise EngineError("denoiser.onnx: out of memory")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tiny_bundle: Bundle) -> AsyncIterator[LocalPipeline]:
    async with LocalPipeline.open(tiny_bundle) as opened:
        yield opened


@pytest.fixture
def service(tiny_bundle: Bundle, pipeline: LocalPipeline, tmp_path: Path) -> WholeService:
    return WholeService(tiny_bundle, pipeline, tmp_path)


async def in_state(service: WholeService, video_id: str, good: Callable[[VideoStatus], bool]) -> Video:
    while True:
        video = await service.store.get(video_id)
        if video is not None and good(video.status):
            return video
        await asyncio.sleep(0.01)


async def ended(service: WholeService, video_id: str) -> Video:
    return await in_state(service, video_id, lambda status: status.final)


async def test_the_first_fragment_is_at_the_client_before_the_second_half_is_decoded(service: WholeService) -> None:
    """By the order of events: the second half isn't decoded until the client says that it has the first fragment."""
    decoder = service.stages["decoder"] = GatedDecoder(service.pipeline, first_gated_chunk=3)
    received = b""
    async with service.running() as client, client.stream("POST", "/v1/videos", json={**ASKED, "stream": True}) as got:
        async for piece in got.aiter_raw():
            received += piece
            if b"mdat" in received:
                decoder.gate.set()
    video_id = got.headers["x-video-id"]
    log = FragmentLog.open(service.videos_dir, video_id)
    assert received == log.init() + b"".join(log.fragments())
    assert len(log.entries()) == 6


async def test_a_batch_leaves_places_to_those_who_watch(service: WholeService) -> None:
    """Of a runner's four places two; nothing is decoded before the one that is asked for meanwhile is begun."""
    decoder = service.stages["decoder"] = GatedDecoder(service.pipeline, first_gated_chunk=0)
    body, catalog = {**ASKED, "seconds": 1}, Catalog({"tiny": service.bundle}, {})
    lines = []
    for _ in range(5):
        line = new_video(parse_create(body, form=False), catalog, service.webhooks, owner=None, priority=BATCH)
        lines.append(await service.store.create(line))
    async with service.running() as client:
        for line in lines[:2]:
            await in_state(service, line.id, lambda status: status is VideoStatus.IN_PROGRESS)
        asked = (await client.post("/v1/videos", json=body)).json()["id"]
        await in_state(service, asked, lambda status: status is VideoStatus.IN_PROGRESS)
        found = [await service.store.get(line.id) for line in lines]
        assert [video.status for video in found if video] == ["in_progress"] * 2 + ["queued"] * 3
        decoder.gate.set()
        for id in (asked, *(line.id for line in lines)):
            assert (await ended(service, id)).status is VideoStatus.COMPLETED


async def test_a_finished_video_has_its_file_before_it_is_called_completed(service: WholeService) -> None:
    async with service.running() as client:
        video_id = (await client.post("/v1/videos", json={**ASKED, "seconds": 1})).json()["id"]
        video = await ended(service, video_id)
        assert video.status is VideoStatus.COMPLETED
        assert video.expires_at is not None
        content = await client.get(f"/v1/videos/{video_id}/content")
        thumbnail = await client.get(f"/v1/videos/{video_id}/content", params={"variant": "thumbnail"})
        sheet = await client.get(f"/v1/videos/{video_id}/content", params={"variant": "spritesheet"})
    assert (thumbnail.content[8:12], sheet.content[:2]) == (b"WEBP", b"\xff\xd8")
    assert video.stored_bytes > len(content.content) + len(thumbnail.content) + len(sheet.content)
    assert content.content == (service.videos_dir / video_id / "video.mp4").read_bytes()


async def test_a_video_that_began_with_the_bundle_before_is_finished_by_it(service: WholeService) -> None:
    """Its decoder is replaced while it is watched: the runner gives it back, and a new one's old stages go on."""
    service.stages["bundle_digest"] = "before"
    before = Stages(**service.stages)
    service.stages["decoder"] = ReplacedDecoder(service.pipeline, 3)
    async with service.running() as client:
        video_id = (await client.post("/v1/videos", json=ASKED)).json()["id"]
        log = FragmentLog.open(service.videos_dir, video_id)
        await until(lambda: len(log.entries()) == 3)
        given_back = await in_state(service, video_id, lambda status: status is VideoStatus.QUEUED)
    assert (given_back.attempt, len(log.entries())) == (0, 3)
    # The bundle now could not make it.
    service.stages |= {"bundle_digest": "now", "denoiser": BrokenDenoiser()}
    service.retiring = {"tiny": before}
    async with service.running():
        assert (await ended(service, video_id)).status is VideoStatus.COMPLETED
    service.stages, service.retiring = {field.name: getattr(before, field.name) for field in fields(before)}, {}
    async with service.running() as client:
        undisturbed = (await client.post("/v1/videos", json=ASKED)).json()["id"]
        assert (await ended(service, undisturbed)).status is VideoStatus.COMPLETED
    assert list(log.fragments()) == list(FragmentLog.open(service.videos_dir, undisturbed).fragments())


async def test_an_attempt_that_fails_is_tried_again_and_then_said(service: WholeService) -> None:
    service.stages["denoiser"] = BrokenDenoiser()
    async with service.running() as client:
        # So that a client can tell it from the end of a video.
        said = error_box("generation_failed", "denoiser.onnx: out of memory")
        assert (await client.post("/v1/videos", json={**ASKED, "stream": True})).content == said
        (log,) = service.videos_dir.iterdir()
        video = await ended(service, log.name)
    assert (video.status, video.attempt, video.error_code) == (VideoStatus.FAILED, 2, "generation_failed")
    assert video.error_message == "denoiser.onnx: out of memory"


async def test_a_cancelled_video_lets_go_of_the_denoiser(service: WholeService, tiny_bundle: Bundle) -> None:
    async with service.running() as client:
        steps = tiny_bundle.manifest.limits.max_steps
        asked = {**ASKED, "seconds": tiny_bundle.manifest.limits.max_seconds, "num_inference_steps": steps}
        video_id = (await client.post("/v1/videos", json=asked)).json()["id"]
        denoiser = service.pipeline.denoiser
        await until(lambda: denoiser.sessions == 1)
        await service.store.request_cancel(video_id)
        video = await ended(service, video_id)
        assert (video.status, video.error_code) == (VideoStatus.FAILED, "cancelled")
        assert denoiser.sessions == 0
        assert denoiser.outstanding_tokens == 0
        log = FragmentLog.open(service.videos_dir, video_id)
        await until(lambda: log.end() is not None)


async def test_a_running_video_that_is_deleted_is_let_go_of_and_swept(
    service: WholeService, tiny_bundle: Bundle
) -> None:
    async with service.running() as client:
        limits = tiny_bundle.manifest.limits
        asked = {**ASKED, "seconds": limits.max_seconds, "num_inference_steps": limits.max_steps}
        video_id = (await client.post("/v1/videos", json=asked)).json()["id"]
        await until(lambda: service.pipeline.denoiser.sessions == 1)
        assert (await client.delete(f"/v1/videos/{video_id}")).status_code == 200
        video = await ended(service, video_id)
        assert (video.error_code, service.pipeline.denoiser.sessions) == ("cancelled", 0)
    later = SqlVideoStore(f"sqlite:///{service.videos_dir.parent / 'videos.db'}", clock=lambda: time.time() + 61)
    assert await Sweeper(later, service.artifacts).sweep() == 1
    assert list(service.videos_dir.iterdir()) == []


async def test_a_stopped_runners_videos_go_back_and_the_next_one_makes_the_same_bytes(service: WholeService) -> None:
    decoder = service.stages["decoder"] = GatedDecoder(service.pipeline, first_gated_chunk=2)
    async with service.running() as client:
        video_id = (await client.post("/v1/videos", json=ASKED)).json()["id"]
        log = FragmentLog.open(service.videos_dir, video_id)
        await until(lambda: len(log.entries()) == 2)
    stopped = await service.store.get(video_id)
    assert stopped is not None
    assert (stopped.status, stopped.attempt) == (VideoStatus.QUEUED, 0)
    half = list(log.fragments())

    decoder.gate.set()
    async with service.running():
        assert (await ended(service, video_id)).status is VideoStatus.COMPLETED
    assert list(log.fragments())[:2] == half
    assert len(log.entries()) == 6


async def test_draining_finishes_what_is_in_hand_and_leaves_the_queue(service: WholeService) -> None:
    decoder = service.stages["decoder"] = GatedDecoder(service.pipeline, first_gated_chunk=0)
    async with service.running() as client:
        first = (await client.post("/v1/videos", json=ASKED)).json()["id"]
        await in_state(service, first, lambda status: status is VideoStatus.IN_PROGRESS)
        assert service.runner is not None
        draining = asyncio.create_task(service.runner.drain())
        await asyncio.sleep(0)
        second = (await client.post("/v1/videos", json=ASKED)).json()["id"]
        decoder.gate.set()
        await draining
    finished, waiting = await service.store.get(first), await service.store.get(second)
    assert finished is not None
    assert waiting is not None
    assert (finished.status, waiting.status) == (VideoStatus.COMPLETED, VideoStatus.QUEUED)


async def test_chunks_are_to_be_seen_before_they_are_decoded(service: WholeService) -> None:
    decoder = service.stages["decoder"] = PatientDecoder(service)
    async with service.running() as client:
        video = (await client.post("/v1/videos", json=ASKED | {"seconds": 1})).json()["id"]
        while (await client.get(f"/v1/videos/{video}")).json()["status"] != "completed":
            pass
    assert sorted(decoder.seen) == [entry.index for entry in FragmentLog.open(service.videos_dir, video).entries()]
    assert all(picture.startswith(b"\xff\xd8") for picture in decoder.seen.values())
    assert await service.storage.previews.since(video, 0) == []
