"""A fused replica that hangs: it still has its clients' connections and its port, and nothing else would notice."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from pipelines import as_stream, made_alone
from supervised import SupervisedService, until

from models.bundle import Bundle
from serving.deployments.local import free_port
from serving.jobs.store import SqlVideoStore

LIMIT_SECONDS = 600
pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_SECONDS)]


def test_a_replica_that_hangs_is_replaced_and_its_video_goes_on(tiny_bundle: Bundle, tmp_path: Path) -> None:
    limits = tiny_bundle.manifest.limits
    asked = {"prompt": "a ball", "seed": 7, "seconds": limits.max_seconds, "num_inference_steps": limits.max_steps}
    config = {"models": {"tiny": tiny_bundle.root}, "fused": True, "data_dir": tmp_path / "data", "port": free_port()}
    expected = as_stream(made_alone(tiny_bundle, asked))
    with SupervisedService(config, tmp_path) as service, ThreadPoolExecutor() as clients:
        until(service.is_started)
        store = SqlVideoStore(f"sqlite:///{tmp_path / 'data' / 'videos.db'}")
        videos = f"{service.url}/v1/videos"
        video_id = httpx.post(videos, json=asked, timeout=60).json()["id"]

        def state() -> Any:
            return asyncio.run(store.get(video_id))

        def cut_off(url: str) -> None:
            """Long before the limit: nobody is left to wait for an answer that doesn't come."""
            since = time.monotonic()
            try:
                answer = httpx.get(url, timeout=LIMIT_SECONDS / 2, trust_env=False)
            except (httpx.NetworkError, httpx.RemoteProtocolError):
                return
            pytest.fail(f"after {time.monotonic() - since:.1f} s: {answer.status_code} {answer.headers}")

        watching = clients.submit(cut_off, f"{videos}/{video_id}/stream")
        until(lambda: state().progress >= 10)
        (replica,) = [pid for pid, command in service.processes().items() if "rushes:fused" in command]
        os.kill(replica, signal.SIGSTOP)
        began = time.monotonic()
        asking = clients.submit(cut_off, f"{service.url}/v1/models")
        until(lambda: replica not in service.processes())
        print(f"it was ended {time.monotonic() - began:.1f} s after it had begun to hang", flush=True)
        watching.result()
        asking.result()
        service.wait_until_up()
        print(f"the service answered {time.monotonic() - began:.1f} s after it had begun to hang", flush=True)
        assert service.starts == 1
        # Watched from its beginning by a client who comes now.
        assert httpx.get(f"{videos}/{video_id}/stream", timeout=60, trust_env=False).content == expected
        until(lambda: state().status not in ("queued", "in_progress"))
        assert (state().status, state().fence) == ("completed", 2)
        # Here the service may not know of the new replica yet.
        assert service.stop() == 0
        until(lambda: not service.processes())


def test_whoever_stops_it_meanwhile_does_not_wait_for_that(tiny_bundle: Bundle, tmp_path: Path) -> None:
    limits = tiny_bundle.manifest.limits
    asked = {"prompt": "a ball", "seconds": limits.max_seconds, "num_inference_steps": limits.max_steps}
    config = {"models": {"tiny": tiny_bundle.root}, "fused": True, "data_dir": tmp_path / "data", "port": free_port()}
    with SupervisedService(config, tmp_path) as service:
        until(service.is_started)
        httpx.post(f"{service.url}/v1/videos", json=asked, timeout=60).raise_for_status()
        (replica,) = [pid for pid, command in service.processes().items() if "rushes:fused" in command]
        os.kill(replica, signal.SIGSTOP)
        began = time.monotonic()
        service.signal(signal.SIGTERM)
        time.sleep(1)  # `stop` sends the second one
        assert service.stop() == 0
        took = time.monotonic() - began
        print(f"it took {took:.1f} s", flush=True)
        assert took < 60
        assert service.processes() == {}
