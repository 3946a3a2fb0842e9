"""How `rushes serve` ends, and how it is told to reload: what becomes of the videos in hand, and what is left of it."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from supervised import SupervisedService, until

from models.bundle import Bundle
from serving.deployments.local import free_port
from serving.jobs.artifacts import CHECKPOINTS, Artifacts
from serving.jobs.store import SqlVideoStore, VideoStatus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def reloaded(config: Path) -> tuple[int, str]:
    """The exit status and the output of `rushes reload`, in a process of its own."""
    command = [sys.executable, "-c", "from serving.cli import main; main()", "reload", "--config", str(config)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def test_one_signal_finishes_the_videos_in_hand_and_two_hand_them_back(tiny_bundle: Bundle, tmp_path: Path) -> None:
    config = {"models": {"tiny": tiny_bundle.root}, "data_dir": tmp_path / "data", "port": free_port()}
    limits = tiny_bundle.manifest.limits
    long = {"prompt": "a ball", "seed": 7, "seconds": limits.max_seconds, "num_inference_steps": limits.max_steps}
    artifacts = Artifacts(tmp_path / "data")
    store = SqlVideoStore(f"sqlite:///{tmp_path / 'data' / 'videos.db'}")

    def state(video_id: str) -> Any:
        return asyncio.run(store.get(video_id))

    with SupervisedService(config, tmp_path) as service:
        until(lambda: "Ctrl-C stops it" in (tmp_path / "serve.log").read_text())
        video_id = httpx.post(f"{service.url}/v1/videos", json=long, timeout=60).json()["id"]
        until(lambda: state(video_id).progress >= 10)
        service.signal(signal.SIGTERM)
        until(lambda: "finishing 1 video" in (tmp_path / "serve.log").read_text())
        assert state(video_id).status is VideoStatus.IN_PROGRESS
        assert service.stop() == 0
        handed_back = state(video_id)
        assert (handed_back.status, handed_back.attempt) == (VideoStatus.QUEUED, 0)
        assert artifacts.names(CHECKPOINTS) == [video_id]
        until(lambda: not service.processes())

    with SupervisedService(config, tmp_path) as service:
        until(lambda: (tmp_path / "serve.log").read_text().count("Ctrl-C stops it") == 2)
        until(lambda: state(video_id).status is not VideoStatus.QUEUED)
        assert state(video_id).progress >= handed_back.progress
        file, both = tmp_path / "config.json", {"tiny": tiny_bundle.root, "added": tiny_bundle.root}
        file.write_text(json.dumps(config | {"models": both}, default=str))
        assert reloaded(file) == (0, "loaded added\n")
        file.write_text(json.dumps(config | {"models": both | {"bad": tmp_path / "nowhere"}}, default=str))
        status, said = reloaded(file)
        assert status != 0
        assert "the service refused, and serves what it did" in " ".join(said.split())
        models = httpx.get(f"{service.url}/v1/models", timeout=60).json()["data"]
        assert [model["id"] for model in models] == ["tiny", "added"]
        asked = {"prompt": "a cube", "model": "added", "seconds": 1, "num_inference_steps": 1, "stream": True}
        assert len(httpx.post(f"{service.url}/v1/videos", json=asked, timeout=300).content) > 1000
        assert service.stop() == 0
        done = state(video_id)
        assert (done.status, done.fence) == (VideoStatus.COMPLETED, 2)
        until(lambda: not service.processes())
    assert artifacts.names(CHECKPOINTS) == []
    content = (tmp_path / "data" / "videos" / video_id / "video.mp4").read_bytes()
    assert sha256(content).hexdigest() == done.artifacts["video.mp4"]["sha256"]


def asking(url: str, head: str, body: bytes = b"") -> socket.socket:
    """A client that asks and doesn't read what it is answered."""
    host, _, port = url.removeprefix("http://").partition(":")
    client = socket.create_connection((host, int(port)))
    client.sendall(f"{head}\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return client


def session(url: str, settings: dict[str, Any]) -> socket.socket:
    """An interactive one, whose client reads its beginning and nothing more (RFC 6455, 4.1 and 5.2)."""
    upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13"
    client = asking(url, f"GET /v1/realtime HTTP/1.1\r\n{upgrade}\r\nSec-WebSocket-Key: {'A' * 22}==")
    read_until(client, b"\r\n\r\n")
    said = json.dumps({"type": "session.create", "session": settings}).encode()
    client.sendall(bytes([0x81, 0x80 | 126, *len(said).to_bytes(2, "big"), 0, 0, 0, 0]) + said)
    read_until(client, b"session.created")
    return client


def read_until(client: socket.socket, word: bytes) -> None:
    answered = b""
    while word not in answered:
        part = client.recv(4096)
        assert part, answered
        answered += part


@pytest.mark.timeout(240)
def test_a_fused_service_shows_what_it_finishes_and_ends_whoever_stays(
    tiny_bundle: Bundle, tiny_causal_bundle: Bundle, tmp_path: Path
) -> None:
    bundles = {"tiny": tiny_bundle.root, "tiny-causal": tiny_causal_bundle.root}
    config = {"models": bundles, "fused": True, "data_dir": tmp_path / "data", "port": free_port()}
    config["runner"] = {"max_videos": 1}
    limits = tiny_bundle.manifest.limits
    long = {"prompt": "a ball", "seed": 7, "seconds": limits.max_seconds, "num_inference_steps": limits.max_steps}
    seen: list[bytes] = []

    with SupervisedService(config, tmp_path) as service, ExitStack() as clients:
        until(service.is_started)
        store = SqlVideoStore(f"sqlite:///{tmp_path / 'data' / 'videos.db'}")
        idle = clients.enter_context(httpx.Client(base_url=service.url, timeout=60))
        video_id = idle.post("/v1/videos", json=long).json()["id"]

        def watch() -> None:
            seen.append(httpx.get(f"{service.url}/v1/videos/{video_id}/stream", timeout=None).content)

        watching = threading.Thread(target=watch)
        watching.start()
        queued = idle.post("/v1/videos", json=long).json()["id"]
        clients.enter_context(asking(service.url, f"GET /v1/videos/{queued}/stream HTTP/1.1"))
        clients.enter_context(asking(service.url, "POST /v1/videos HTTP/1.1", json.dumps(long).encode()))
        clients.enter_context(session(service.url, {"model": "tiny-causal", "prompt": " ".join(["a cube"] * 20)}))
        until(lambda: asyncio.run(store.get(video_id)).progress >= 10)
        assert service.stop() == 0
        until(lambda: not service.processes())
        watching.join()
        assert seen
        assert "finishing 1 video" in (tmp_path / "serve.log").read_text()
        states = [asyncio.run(store.get(id)) for id in (video_id, queued)]
        assert [state.status for state in states] == [VideoStatus.COMPLETED, VideoStatus.QUEUED]
