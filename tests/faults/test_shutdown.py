"""How `rushes serve` ends, and how it is told to reload: what becomes of the videos in hand, and what is left of it."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from supervised import SupervisedService

from models.bundle import Bundle
from serving.deployments.local import free_port
from serving.jobs.artifacts import CHECKPOINTS, Artifacts
from serving.jobs.store import SqlVideoStore, VideoStatus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def until(look: Any) -> Any:
    """Bounded by the test's own time limit."""
    while not (seen := look()):
        time.sleep(0.1)
    return seen


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
