"""A fused service: the same API and the same bytes from one replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from marked import Mark
from pipelines import as_stream, made_alone

from models.bundle import Bundle
from serving.client import Rushes
from serving.config import ApiConfig, ConfigError, ServiceConfig
from serving.deployments.local import LocalService, free_port, local_service
from serving.jobs.store import SqlVideoStore, VideoStatus

MOST_REQUESTS = 4
ASKED: dict[str, Any] = {"prompt": "a red ball moving left", "seconds": 1, "seed": 7, "num_inference_steps": 4}


@dataclass(frozen=True)
class Running:
    service: LocalService
    config: ServiceConfig
    mark: Mark


@pytest.fixture(scope="module")
def running(
    tiny_bundle: Bundle, tiny_causal_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    config = ServiceConfig(
        models={"tiny": tiny_bundle.root, "tiny-causal": tiny_causal_bundle.root},
        fused=True,
        data_dir=tmp_path_factory.mktemp("fused"),
        port=free_port(),
        lease_seconds=3,
        api=ApiConfig(max_ongoing_requests=MOST_REQUESTS),
    )
    mark = Mark()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in mark.environment.items():
            patch.setenv(name, value)
        with local_service(config) as service:
            yield Running(service, config, mark)


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


def test_requests_do_not_pass_through_a_proxy(running: Running) -> None:
    commands = " ".join(running.mark.processes().values())
    assert "rushes:fused" in commands
    assert "ProxyActor" not in commands
    with httpx.Client(base_url=running.service.url, timeout=60) as client:
        made = client.post("/v1/videos", files={name: (None, str(value)) for name, value in ASKED.items()})
        path = f"/v1/videos/{made.json()['id']}"
        while client.get(path).json()["status"] != "completed":
            time.sleep(0.02)
        whole = client.get(f"{path}/content")
        part = client.get(f"{path}/content", headers={"Range": "bytes=10-19"})
        head = client.head(f"{path}/content")
        assert (part.status_code, part.content) == (206, whole.content[10:20])
        assert (head.headers["Content-Length"], head.content) == (str(len(whole.content)), b"")
        too_long = client.post("/v1/batches", content=bytes(running.config.api.max_body_bytes + 1))
        assert too_long.json()["error"]["code"] == "body_too_large"


def test_one_request_too_many_is_refused(running: Running, tiny_bundle: Bundle) -> None:
    limits = tiny_bundle.manifest.limits
    long = {"prompt": "a ball", "num_inference_steps": limits.max_steps, "seconds": limits.max_seconds, "stream": True}
    with httpx.Client(base_url=running.service.url, timeout=60) as client:
        with ExitStack() as watched:
            ids = [
                watched.enter_context(client.stream("POST", "/v1/videos", json=long)).headers["X-Video-Id"]
                for _ in range(MOST_REQUESTS)
            ]
            refused = client.get("/v1/models")
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            assert refused.json()["error"].keys() == {"message", "type", "param", "code"}
        for video_id in ids:
            while client.post(f"/v1/videos/{video_id}/cancel").status_code == 503:
                time.sleep(0.02)  # the service hears of the others' going in its own time


def test_a_replica_that_was_killed_is_followed_by_one_at_the_same_port(running: Running) -> None:
    asked = {"json": ASKED | {"seed": 8}, "headers": {"Idempotency-Key": "once"}}
    with httpx.Client(base_url=running.service.url, timeout=60) as client:
        before = client.post("/v1/videos", **asked).raise_for_status().json()
        assert running.mark.kill("rushes:fused")
        with pytest.raises(httpx.TransportError):
            client.get("/health")
        answer = None
        while answer is None:
            running.service.running()  # as whoever stops the service asks: that nobody is there is no error
            with suppress(httpx.TransportError):
                answer = client.post("/v1/videos", **asked)
        assert answer.raise_for_status().json()["id"] == before["id"]
        while (video := client.get(f"/v1/videos/{before['id']}").json())["status"] not in ("completed", "failed"):
            time.sleep(0.02)
        assert video["status"] == "completed", video


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
