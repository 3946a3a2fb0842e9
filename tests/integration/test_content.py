"""A video's files over HTTP: when they are there, of which kind, and in which parts."""

from __future__ import annotations

import httpx
import pytest
from service import Service, assert_envelope


async def test_content_is_refused_until_the_video_is_completed(service: Service, client: httpx.AsyncClient) -> None:
    video_id = (await client.post("/v1/videos", json={"prompt": "a red ball"})).json()["id"]
    content = f"/v1/videos/{video_id}/content"
    assert_envelope(await client.get(content), 400, "video_id")
    video = await service.claimed()
    assert_envelope(await client.get(content), 400, "video_id")
    await service.store.requeue(video_id, video.fence)
    await service.completed(video_id, video_mp4=b"abc")
    assert (await client.get(content)).content == b"abc"
    assert_envelope(await client.get(content, params={"variant": "thumbnail"}), 404, "variant")
    assert_envelope(await client.get(content, params={"variant": "poster"}), 400, "variant")
    done = (await client.get(f"/v1/videos/{video_id}")).json()
    assert (done["status"], done["progress"]) == ("completed", 100)
    assert done["expires_at"] > done["completed_at"]


async def test_each_variant_has_its_kind(service: Service, client: httpx.AsyncClient) -> None:
    video_id = (await client.post("/v1/videos", json={"prompt": "a red ball"})).json()["id"]
    await service.completed(video_id, video_mp4=b"v", thumbnail_webp=b"t", spritesheet_jpg=b"s")
    for variant, kind, suffix in (
        ("video", "video/mp4", "mp4"),
        ("thumbnail", "image/webp", "webp"),
        ("spritesheet", "image/jpeg", "jpg"),
    ):
        response = await client.get(f"/v1/videos/{video_id}/content", params={"variant": variant})
        assert (response.headers["content-type"], response.text) == (kind, variant[0])
        assert response.headers["content-disposition"] == f'attachment; filename="{video_id}.{suffix}"'


@pytest.mark.parametrize(
    ("asked", "status", "start", "stop"),
    [
        ({}, 200, 0, 100),
        ({"Range": "bytes=10-19"}, 206, 10, 20),
        ({"Range": "bytes=90-"}, 206, 90, 100),
        ({"Range": "bytes=90-5000"}, 206, 90, 100),
        ({"Range": "bytes=-7"}, 206, 93, 100),
        ({"Range": "bytes=-700"}, 206, 0, 100),
        ({"Range": "bytes=10-5"}, 200, 0, 100),
        ({"Range": "bytes=1-2,5-6"}, 200, 0, 100),
        ({"Range": "lines=1-2"}, 200, 0, 100),
        ({"Range": "bytes=10-19", "If-Range": "etag"}, 206, 10, 20),
        ({"Range": "bytes=10-19", "If-Range": '"other"'}, 200, 0, 100),
        ({"If-None-Match": "etag"}, 304, 0, 0),
        ({"If-None-Match": '"other"'}, 200, 0, 100),
        ({"Range": "bytes=100-"}, 416, 0, 0),
        ({"Range": "bytes=-0"}, 416, 0, 0),
    ],
    ids=str,
)
async def test_ranges_and_conditions(
    service: Service, client: httpx.AsyncClient, asked: dict[str, str], status: int, start: int, stop: int
) -> None:
    data = bytes(range(100))
    video_id = (await client.post("/v1/videos", json={"prompt": "a red ball"})).json()["id"]
    await service.completed(video_id, video_mp4=data)
    content = f"/v1/videos/{video_id}/content"
    etag = (await client.head(content)).headers["etag"]
    headers = {name: etag if value == "etag" else value for name, value in asked.items()}
    response = await client.get(content, headers=headers)
    if status == 416:
        assert_envelope(response, 416, "Range")
        assert response.headers["content-range"] == "bytes */100"
        return
    assert (response.status_code, response.content, response.headers["etag"]) == (status, data[start:stop], etag)
    if status == 206:
        assert response.headers["content-range"] == f"bytes {start}-{stop - 1}/100"
    head = await client.head(content, headers=headers)
    assert (head.status_code, head.content) == (status, b"")
    ignored = ("date",)
    assert {k: v for k, v in head.headers.items() if k not in ignored} == {
        k: v for k, v in response.headers.items() if k not in ignored
    }
