"""A runner that is stopped keeps no video for itself, at whatever moment that is."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from service import WholeService

from models.bundle import Bundle
from serving.api.creation import new_video
from serving.api.models import Catalog
from serving.api.schemas import parse_create
from serving.deployments import attempt as attempts
from serving.deployments import runner as runners
from serving.deployments.attempt import Stages
from serving.deployments.runner import Runner
from serving.jobs.store import Video, VideoStatus
from serving.pipeline.local import LocalPipeline
from serving.pipeline.stages import VideoSpec


@pytest.fixture
def service(tiny_bundle: Bundle, pipeline: LocalPipeline, tmp_path: Path) -> WholeService:
    return WholeService(tiny_bundle, pipeline, tmp_path)


class SlowClaims:
    """The store's own claims, each of which is answered when `answer` is set."""

    def __init__(self, service: WholeService) -> None:
        self._claim = service.store.claim
        self.made, self.answer = asyncio.Event(), asyncio.Event()

    async def __call__(self, *args: Any, **named: Any) -> Video | None:
        video = await self._claim(*args, **named)
        if video is not None:
            self.made.set()
            await self.answer.wait()
        return video


async def queued(service: WholeService) -> str:
    asked = parse_create({"prompt": "a red ball", "seconds": 1, "num_inference_steps": 2}, form=False)
    video = new_video(asked, Catalog({"tiny": service.bundle}, {}), service.webhooks, owner=None)
    return (await service.store.create(video)).id


async def state(service: WholeService, video_id: str) -> tuple[VideoStatus, int]:
    video = await service.store.get(video_id)
    assert video is not None
    return video.status, video.attempt


async def stopped(running: asyncio.Task[None]) -> None:
    running.cancel()
    await asyncio.wait({running})


async def test_a_claim_that_is_under_way(service: WholeService, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = SlowClaims(service)
    monkeypatch.setattr(service.store, "claim", claims)
    video_id = await queued(service)
    running = asyncio.create_task(service.new_runner().run())
    await claims.made.wait()
    stopping = asyncio.create_task(stopped(running))
    await asyncio.sleep(0.01)
    claims.answer.set()
    await stopping
    assert await state(service, video_id) == (VideoStatus.QUEUED, 0)


async def test_one_that_is_just_beginning(service: WholeService, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = service.store.claim

    async def last_claim(*args: Any, **named: Any) -> Video | None:
        video = await claim(*args, **named)
        running.cancel()
        return video

    monkeypatch.setattr(service.store, "claim", last_claim)
    video_id = await queued(service)
    running = asyncio.create_task(service.new_runner().run())
    await asyncio.wait({running})
    assert await state(service, video_id) == (VideoStatus.QUEUED, 0)


async def test_one_whose_bundle_is_looked_for(service: WholeService, monkeypatch: pytest.MonkeyPatch) -> None:
    looking, looked = threading.Event(), threading.Event()

    class SlowLog:
        @staticmethod
        def open(*_: object) -> SlowLog:
            return SlowLog()

        def origin(self) -> None:
            looking.set()
            looked.wait()

    monkeypatch.setattr(runners, "FragmentLog", SlowLog)
    service.retiring = {"tiny": Stages(**service.stages)}
    video_id = await queued(service)
    running = asyncio.create_task(service.new_runner().run())
    await asyncio.to_thread(looking.wait)
    await stopped(running)
    looked.set()
    assert await state(service, video_id) == (VideoStatus.QUEUED, 0)


async def test_one_whose_revised_prompt_is_being_written(
    service: WholeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing is tried again when the store is away, and not when nobody wants it any more."""
    writing, written = asyncio.Event(), 0

    async def revised(spec: VideoSpec, _: object) -> VideoSpec:
        return replace(spec, revised_prompt="a small red ball")

    async def slow(*_: object) -> None:
        nonlocal written
        written += 1
        writing.set()
        await asyncio.sleep(0.5)

    monkeypatch.setattr(attempts, "revise", revised)
    monkeypatch.setattr(service.store, "set_request", slow)
    video_id = await queued(service)
    running = asyncio.create_task(service.new_runner().run())
    await writing.wait()
    await stopped(running)
    assert await state(service, video_id) == (VideoStatus.QUEUED, 0)
    assert written == 1


async def test_draining_waits_for_a_claim_that_is_under_way(
    service: WholeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = SlowClaims(service)
    monkeypatch.setattr(service.store, "claim", claims)
    video_id = await queued(service)
    runner: Runner = service.new_runner()
    running = asyncio.create_task(runner.run())
    await claims.made.wait()
    draining = asyncio.create_task(runner.drain())
    await asyncio.sleep(0.01)
    assert not draining.done()
    claims.answer.set()
    await draining
    assert (await state(service, video_id))[0] is VideoStatus.COMPLETED
    await running
