"""Files: whole or not there, on a disk, in memory and in an S3 bucket; and what is deleted when."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from serving.jobs.artifacts import Artifact, ArtifactError, Artifacts, video_key
from serving.jobs.fragment_log import FragmentLog
from serving.jobs.store import SqlVideoStore, Video, new_video_id
from serving.jobs.sweeper import Sweeper

DATA = bytes(range(256)) * 4096


@pytest.fixture(scope="session")
def s3() -> Iterator[dict[str, Any]]:
    """A server that speaks S3, in this process."""
    server_of_moto = pytest.importorskip("moto.server")
    server = server_of_moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test"}
    server.stop()


@pytest.fixture(params=["disk", "memory", "s3"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Artifacts:
    if request.param == "disk":
        return Artifacts(tmp_path)
    if request.param == "memory":
        return Artifacts(tmp_path, f"memory://{uuid.uuid4().hex}")
    options = request.getfixturevalue("s3")
    bucket = f"rushes-{uuid.uuid4().hex}"
    opened = Artifacts(tmp_path, f"s3://{bucket}/some/prefix", options)
    opened._files.mkdir(bucket)
    return opened


def put(artifacts: Artifacts, key: str, data: bytes) -> Artifact:
    with artifacts.scratch() as path:
        path.write_bytes(data)
        return artifacts.put(key, path)


async def read(artifacts: Artifacts, key: str, start: int, stop: int) -> bytes:
    return b"".join([piece async for piece in artifacts.read(key, start, stop)])


async def test_what_was_put_is_read_whole_or_in_part(artifacts: Artifacts, tmp_path: Path) -> None:
    key = video_key(new_video_id(), "video.mp4")
    put(artifacts, key, b"older")
    artifact = put(artifacts, key, DATA)
    assert artifact == Artifact(len(DATA), sha256(DATA).hexdigest())
    assert await read(artifacts, key, 0, len(DATA)) == DATA
    assert await read(artifacts, key, 300_000, 300_010) == DATA[300_000:300_010]
    assert list((tmp_path / "scratch").iterdir()) == []


async def test_a_removed_video_is_gone_and_others_are_not(artifacts: Artifacts) -> None:
    gone, kept = new_video_id(), new_video_id()
    for video_id in (gone, kept):
        writer = await FragmentLog.create(artifacts.videos_dir, video_id, fence=1)
        await writer.append(0, 0, 9, b"init", b"data")
        put(artifacts, video_key(video_id, "video.mp4"), DATA)
    for _ in range(2):
        artifacts.remove_video(gone)
    with pytest.raises(FileNotFoundError):
        await read(artifacts, video_key(gone, "video.mp4"), 0, 5)
    assert await read(artifacts, video_key(kept, "video.mp4"), 0, 5) == DATA[:5]
    assert [path.name for path in artifacts.videos_dir.iterdir()] == [kept]


def test_a_file_that_could_not_be_put_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails at the last moment, for good."""
    monkeypatch.setattr(Artifacts._put.retry, "stop", lambda state: True)  # type: ignore[attr-defined]  # tenacity adds it
    artifacts = Artifacts(tmp_path)
    (tmp_path / "files").write_text("a file where the directory should be")
    with pytest.raises(OSError, match="files"):
        put(artifacts, "files/a", DATA)
    assert list((tmp_path / "scratch").iterdir()) == []


async def test_a_file_store_that_is_away_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = Artifacts(tmp_path)
    replace, failures = os.replace, iter([OSError("away"), OSError("away")])

    def failing(source: Any, target: Any) -> None:
        for error in failures:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    put(artifacts, "files/a", b"abc")
    assert await read(artifacts, "files/a", 0, 3) == b"abc"


@pytest.mark.parametrize("key", ["", "/etc/passwd", "videos/../../x", "videos//x", "./x", "a\\b"])
def test_keys_stay_below_the_root(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        put(Artifacts(tmp_path), key, b"abc")
    with pytest.raises(ValueError, match="not a video id"):
        Artifacts(tmp_path).remove_video(f"../{key}")


def test_a_url_that_nothing_can_write() -> None:
    with pytest.raises(ArtifactError, match="no files can be kept at nonsense://x"):
        Artifacts(Path("nowhere"), "nonsense://x")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def completed(store: SqlVideoStore, artifacts: Artifacts, data: bytes) -> Video:
    await store.create(Video(id=new_video_id(), model="mini", prompt="a ball", seconds="2", size="128x128"))
    video = await store.claim("runner", 60)
    assert video is not None
    artifact = put(artifacts, video_key(video.id, "video.mp4"), data)
    done = await store.complete(video.id, video.fence, artifacts={"video.mp4": artifact}, log_bytes=50)
    assert done.artifacts == {"video.mp4": asdict(artifact)}
    return done


async def test_videos_are_swept_when_their_time_is_over(database_url: str, tmp_path: Path) -> None:
    clock = Clock()
    store, artifacts = SqlVideoStore(database_url, retention_seconds=100, clock=clock), Artifacts(tmp_path)
    sweeper = Sweeper(store, artifacts)
    old = await completed(store, artifacts, DATA)
    clock.now += 50
    new = await completed(store, artifacts, DATA)
    assert await sweeper.sweep() == 0
    clock.now += 60
    assert await sweeper.sweep() == 1
    assert await store.get(old.id) is None
    assert [path.name for path in artifacts.videos_dir.iterdir()] == [new.id]
    store.dispose()


async def test_beyond_the_quota_the_oldest_go_first(database_url: str, tmp_path: Path) -> None:
    clock = Clock()
    store, artifacts = SqlVideoStore(database_url, clock=clock), Artifacts(tmp_path)
    videos = []
    for _ in range(4):
        clock.now += 1
        videos.append(await completed(store, artifacts, bytes(100)))  # with its log, 150 bytes
    assert await Sweeper(store, artifacts, quota_bytes=600).sweep() == 0
    assert await Sweeper(store, artifacts, quota_bytes=350).sweep() == 2
    left = (await store.list(order="asc")).videos
    assert [video.id for video in left] == [video.id for video in videos[2:]]
    assert sorted(path.name for path in artifacts.videos_dir.iterdir()) == [video.id for video in videos[2:]]
    store.dispose()
