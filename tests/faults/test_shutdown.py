"""How `rushes serve` ends: what becomes of the videos in hand, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import signal
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
        assert service.stop() == 0
        done = state(video_id)
        assert (done.status, done.fence) == (VideoStatus.COMPLETED, 2)
        until(lambda: not service.processes())
    assert artifacts.names(CHECKPOINTS) == []
    content = (tmp_path / "data" / "videos" / video_id / "video.mp4").read_bytes()
    assert sha256(content).hexdigest() == done.artifacts["video.mp4"]["sha256"]
