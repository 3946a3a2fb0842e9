"""Machines that share a database and a file store and no directory: what one makes is watched on the other."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from making import FRAGMENTS, WHOLE, Making, queued
from postgres import Cluster
from service import Service, SharedFiles, WholeService, served, until

from models.bundle import Bundle
from serving.jobs.fragment_log import FragmentLog
from serving.jobs.log_copies import LogCopies
from serving.jobs.news import LogNews
from serving.jobs.store import new_video_id
from serving.pipeline.local import LocalPipeline


@pytest.fixture(scope="module")
def s3() -> Iterator[SharedFiles]:
    server_of_moto = pytest.importorskip("moto.server")
    server = server_of_moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield "s3://rushes/here", {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test"}
    server.stop()


@pytest.fixture(params=["sqlite and memory", "postgresql and s3"])
def machines(request: pytest.FixtureRequest, tiny_bundle: Bundle, tmp_path: Path) -> tuple[Service, Service]:
    if request.param == "sqlite and memory":
        url, files = f"sqlite:///{tmp_path / 'videos.db'}", (f"memory://{uuid.uuid4().hex}", {})
    else:
        cluster: Cluster = request.getfixturevalue("postgres_cluster")
        url, files = cluster.cleared_database(), request.getfixturevalue("s3")
    one, two = (Service(tiny_bundle, tmp_path / name, url=url, shared_files=files) for name in ("one", "two"))
    if request.param != "sqlite and memory":
        one.artifacts._files.makedirs("rushes", exist_ok=True)
    return one, two


@pytest.fixture
async def two(machines: tuple[Service, Service]) -> AsyncIterator[httpx.AsyncClient]:
    async with served(machines[1].api) as opened:
        yield opened
    for machine in machines:
        machine.storage.database.dispose()


async def test_a_video_is_watched_where_it_is_not_made(
    machines: tuple[Service, Service], two: httpx.AsyncClient
) -> None:
    making = await Making.begun(machines[0], await queued(two))
    seen, waited = b"", []
    async with two.stream("GET", f"/v1/videos/{making.id}/stream") as answer:
        pieces = answer.aiter_raw()
        expected = FRAGMENTS[0].init
        for index, fragment in enumerate(FRAGMENTS):
            await making.show(index)
            shown = time.monotonic()
            expected += fragment.data
            while len(seen) < len(expected):
                seen += await anext(pieces)
            waited.append(time.monotonic() - shown)
            assert seen == expected
        await making.complete()
        assert [piece async for piece in pieces] == []
    print(f"seen {', '.join(f'{1000 * seconds:.0f}' for seconds in waited)} ms after they were shown")
    # All that can be asked is answered there, and the log that it made is whole.
    playlist = (await two.get(f"/v1/videos/{making.id}/hls/media.m3u8")).text
    assert playlist.endswith("segments/1.m4s\n#EXT-X-ENDLIST\n")
    assert "event: completed" in (await two.get(f"/v1/videos/{making.id}/events")).text
    here, there = (FragmentLog.open(machine.videos_dir, making.id) for machine in machines)
    assert there.entries() == here.entries()
    assert there.end() == here.end()


async def test_a_late_viewer_of_a_failed_video(machines: tuple[Service, Service], two: httpx.AsyncClient) -> None:
    making = await Making.begun(machines[0], await queued(two))
    await making.show(0, 1)
    await making.fail()
    seen = (await two.get(f"/v1/videos/{making.id}/stream")).content
    begun = FRAGMENTS[0].init + FRAGMENTS[0].data + FRAGMENTS[1].data
    assert seen.startswith(begun)
    assert seen[len(begun) + 4 :].startswith(b"emsg")
    # The video goes, and so do the copies.
    assert (await two.delete(f"/v1/videos/{making.id}")).status_code == 200
    assert machines[0].artifacts.names(f"videos/{making.id}/log") == []


async def test_a_runner_puts_what_it_makes_where_others_find_it(tiny_bundle: Bundle, tmp_path: Path) -> None:
    files: SharedFiles = (f"memory://{uuid.uuid4().hex}", {})
    (tmp_path / "one").mkdir()
    asked = {"prompt": "a ball", "seconds": 2, "seed": 7, "size": "64x64", "num_inference_steps": 2, "stream": True}
    async with LocalPipeline.open(tiny_bundle) as pipeline:
        one = WholeService(tiny_bundle, pipeline, tmp_path / "one", shared_files=files)
        two = Service(
            tiny_bundle, tmp_path / "two", url=f"sqlite:///{tmp_path / 'one' / 'videos.db'}", shared_files=files
        )
        async with one.running() as client, served(two.api) as elsewhere:
            answer = await client.post("/v1/videos", json=asked)
            watched = await elsewhere.get(f"/v1/videos/{answer.headers['x-video-id']}/stream")
    assert watched.content == answer.content
    assert len(answer.content) > 1000


async def test_what_an_attempt_could_not_put_the_next_one_puts(
    machines: tuple[Service, Service], two: httpx.AsyncClient
) -> None:
    making = await Making.begun(machines[0], await queued(two))
    copies = machines[0].storage.copies
    assert copies is not None
    fragment = FRAGMENTS[0]
    await making.writer.append(0, 0, 9, fragment.init, fragment.data)  # and then its process died
    await copies.put_missing(making.writer.log)
    await copies.put_missing(making.writer.log)
    await making.show(1, 2, 3)
    await making.complete()
    assert (await two.get(f"/v1/videos/{making.id}/stream")).content == WHOLE


async def test_news_reach_other_processes_and_outlast_a_restart(postgres_cluster: Cluster) -> None:
    from serving.jobs.database import Database

    url = postgres_cluster.cleared_database()
    teller, hearer = LogNews(Database.open(url)), LogNews(Database.open(url))
    for restarted in (False, True):
        if restarted:
            await asyncio.to_thread(postgres_cluster.restart)
        video_id = new_video_id()
        waiting = asyncio.create_task(hearer.wait(video_id, 3600))
        while not waiting.done():  # said again: nobody may have listened yet
            await teller.tell(new_video_id())
            await teller.tell(video_id)
            await asyncio.sleep(0.01)


async def test_copies_that_nobody_reads_are_made_again(
    machines: tuple[Service, Service], two: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    making = await Making.begun(machines[0], await queued(two))
    await making.show(0, 1, 2, 3)
    await making.complete()
    stream = f"/v1/videos/{making.id}/stream"
    assert (await two.get(stream)).content == WHOLE
    monkeypatch.setattr("serving.jobs.log_copies._KEPT_SECONDS", 0.0)
    log = machines[1].videos_dir / making.id
    copies: LogCopies | None = machines[1].storage.copies
    assert copies is not None
    await until(lambda: not _swept(copies, log))
    assert (await two.get(stream)).content == WHOLE


def _swept(copies: Any, log: Path) -> bool:
    copies._sweep()
    return log.exists()
