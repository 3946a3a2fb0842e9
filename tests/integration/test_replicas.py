"""Two replicas of the API over one database: what is made on one is there on the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from service import Service

from models.bundle import Bundle


@pytest.fixture
def replicas(tiny_bundle: Bundle, tmp_path: Path, database_url: str) -> tuple[Service, Service]:
    """Each with connections and caches of its own, as in two processes."""
    return Service(tiny_bundle, tmp_path, url=database_url), Service(tiny_bundle, tmp_path, url=database_url)


@pytest.fixture
async def clients(replicas: tuple[Service, Service]) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    async with (
        httpx.AsyncClient(transport=httpx.ASGITransport(replicas[0].api), base_url="http://one") as one,
        httpx.AsyncClient(transport=httpx.ASGITransport(replicas[1].api), base_url="http://two") as two,
    ):
        yield one, two
    for replica in replicas:
        replica.storage.database.dispose()


async def test_any_replica_answers_for_any_video(
    replicas: tuple[Service, Service], clients: tuple[httpx.AsyncClient, httpx.AsyncClient]
) -> None:
    one, two = clients
    asked, key = {"prompt": "a ball", "seed": 2**63 - 1}, {"Idempotency-Key": "retry"}
    video = (await one.post("/v1/videos", json=asked, headers=key)).json()
    assert (await two.post("/v1/videos", json=asked, headers=key)).json() == video
    assert (await two.get(f"/v1/videos/{video['id']}")).json() == video
    assert (await two.get("/v1/videos")).json()["data"] == [video]
    await replicas[1].completed(video["id"], video_mp4=b"abc", thumbnail_webp=b"t")
    assert (await one.get(f"/v1/videos/{video['id']}/content")).content == b"abc"

    second = (await two.post("/v1/videos", json=asked)).json()["id"]
    running = await replicas[1].claimed()
    assert (await one.post(f"/v1/videos/{second}/cancel")).json()["status"] == "in_progress"
    assert (await replicas[1].store.heartbeat(second, running.fence, 60)).cancel_requested
    await replicas[1].store.fail(second, running.fence, "cancelled", "The video was cancelled.")
    assert (await one.get(f"/v1/videos/{second}")).json()["error"]["code"] == "cancelled"
    assert (await one.delete(f"/v1/videos/{video['id']}")).status_code == 200
    assert (await two.get(f"/v1/videos/{video['id']}")).status_code == 404


async def test_files_and_batches_are_everybodys_too(
    replicas: tuple[Service, Service], clients: tuple[httpx.AsyncClient, httpx.AsyncClient]
) -> None:
    one, two = clients
    line = b'{"custom_id": "a", "method": "POST", "url": "/v1/videos", "body": {"prompt": "a ball"}}'
    file = (await one.post("/v1/files", files={"file": ("in.jsonl", line)}, data={"purpose": "batch"})).json()["id"]
    assert (await two.get(f"/v1/files/{file}/content")).content == line
    asked = {"input_file_id": file, "endpoint": "/v1/videos", "completion_window": "24h", "metadata": {"a": "b"}}
    batch = (await two.post("/v1/batches", json=asked)).json()["id"]
    assert await replicas[0].batch_worker.work()
    assert (await two.get(f"/v1/batches/{batch}")).json()["status"] == "in_progress"
    await replicas[1].completed((await one.get("/v1/videos")).json()["first_id"], video_mp4=b"abc")
    assert await replicas[1].batch_worker.work()
    done = (await one.get(f"/v1/batches/{batch}")).json()
    assert (done["status"], done["request_counts"]) == ("completed", {"total": 1, "completed": 1, "failed": 0})
    assert b'"custom_id": "a"' in (await one.get(f"/v1/files/{done['output_file_id']}/content")).content
