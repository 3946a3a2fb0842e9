"""A fused service: the same API and the same bytes from one replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from pipelines import as_stream, made_alone

from models.bundle import Bundle
from serving.client import Rushes
from serving.config import ConfigError, ServiceConfig
from serving.deployments.local import LocalService, free_port, local_service
from serving.jobs.store import SqlVideoStore, VideoStatus

ASKED: dict[str, Any] = {"prompt": "a red ball moving left", "seconds": 1, "seed": 7, "num_inference_steps": 4}


@dataclass(frozen=True)
class Running:
    service: LocalService
    config: ServiceConfig


@pytest.fixture(scope="module")
def running(
    tiny_bundle: Bundle, tiny_causal_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    config = ServiceConfig(
        models={"tiny": tiny_bundle.root, "tiny-causal": tiny_causal_bundle.root},
        fused=True,
        data_dir=tmp_path_factory.mktemp("fused"),
        port=free_port(),
    )
    with local_service(config) as service:
        yield Running(service, config)


@pytest.mark.parametrize("model", ["tiny", "tiny-causal"])
def test_a_stream_has_the_bytes_of_one_process(
    running: Running, tiny_bundle: Bundle, tiny_causal_bundle: Bundle, model: str
) -> None:
    bundle = {"tiny": tiny_bundle, "tiny-causal": tiny_causal_bundle}[model]
    answer = httpx.post(f"{running.service.url}/v1/videos", json={**ASKED, "model": model, "stream": True}, timeout=120)
    assert answer.content == as_stream(made_alone(bundle, ASKED))


def test_a_session_plays_and_a_long_video_is_cancelled_beside_it(running: Running, tiny_bundle: Bundle) -> None:
    limits = tiny_bundle.manifest.limits
    side = f"{limits.max_side}x{limits.max_side}"
    long = {"prompt": "a ball", "num_inference_steps": limits.max_steps, "seconds": limits.max_seconds, "size": side}
    settings = {"seed": 7, "num_inference_steps": 2, "size": "64x64", "rewrite_prompt": False}
    with httpx.Client(base_url=running.service.url, timeout=120) as client, Rushes(running.service.url) as rushes:
        video_id = client.post("/v1/videos", json=long).json()["id"]
        with rushes.realtime("a blue cube", model="tiny-causal", **settings) as live:
            assert [chunk.index for chunk, _ in zip(live, range(3), strict=False)] == [0, 1, 2]
        while client.get(f"/v1/videos/{video_id}").json()["status"] == "queued":
            time.sleep(0.02)
        client.post(f"/v1/videos/{video_id}/cancel").raise_for_status()
        while (video := client.get(f"/v1/videos/{video_id}").json())["status"] == "in_progress":
            time.sleep(0.02)
        assert (video["status"], video["error"]["code"]) == ("failed", "cancelled")
        load = client.get("/v1/load").json()
    assert (load["running"], load["queued"]) == (0, 0)
    assert len(load["stages"]) == 6
    assert all((stage["replicas"], stage["in_work"]) == (1, 0) for stage in load["stages"])


def test_it_is_not_changed_while_it_runs(running: Running, tiny_bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="new start"):
        running.service.fleet.change(running.config.model_copy(update={"models": {"tiny": tiny_bundle.root}}))


def test_what_is_in_hand_is_handed_back(running: Running, tiny_bundle: Bundle) -> None:
    """The last of these tests: the service takes nothing new after it."""
    limits = tiny_bundle.manifest.limits
    long = {"prompt": "a ball", "num_inference_steps": limits.max_steps, "seconds": limits.max_seconds}
    url = f"{running.service.url}/v1/videos"
    video_id = httpx.post(url, json=long, timeout=60).json()["id"]
    while not running.service.running():
        time.sleep(0.02)
    running.service.hand_back()
    video = asyncio.run(SqlVideoStore(running.config.resolved_store_url).get(video_id))
    assert video is not None
    assert (video.status, video.attempt) == (VideoStatus.QUEUED, 0)
