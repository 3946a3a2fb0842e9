"""Ids and file names that try to be paths, and uploads that are too large or broken: refused, and nothing is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from pictures import PICTURE, clip, data_url
from service import MAX_FILE, MAX_REFERENCE_BODY, REFERENCES, Service, assert_envelope

from models.bundle import Bundle

ASKED = {"prompt": "a red ball", "seconds": "1", "size": "64x64"}
BAD_IDS = (
    "%2e%2e",
    "..%2f..%2fvideos.db",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "..%5c..%5cvideos.db",
    "video_%00",
    "video_" + "0" * 31,
    "video_" + "0" * 33,
    "video_" + "G" * 32,
    "VIDEO_" + "0" * 32,
    "file-" + "0" * 31 + "/",
    "batch_" + "0" * 31 + "%0a",
    "char_" + "0" * 32 + "%0a",
    "%f0%9f%8e%ac",
    "a" * 5000,
)
BAD_NAMES = (
    "../../../escaped.png",
    "/tmp/escaped.png",
    "..\\..\\escaped.png",
    "a" * 3000,
    ".",
    "",
    "videos.db",
    "a\tb;.png",
)


@pytest.fixture
def service(tiny_bundle: Bundle, tmp_path: Path) -> Service:
    root = tmp_path / "inside" / "data"
    root.mkdir(parents=True)
    return Service(tiny_bundle, root)


def files_below(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "videos.db" not in path.name
    }


@pytest.mark.parametrize("bad", BAD_IDS, ids=range(len(BAD_IDS)))
async def test_ids_are_no_paths(service: Service, client: httpx.AsyncClient, tmp_path: Path, bad: str) -> None:
    for method, path in (
        ("GET", "/v1/videos/{}"),
        ("DELETE", "/v1/videos/{}"),
        ("GET", "/v1/videos/{}/content"),
        ("POST", "/v1/videos/{}/cancel"),
        ("POST", "/v1/videos/{}/remix"),
        ("GET", "/v1/videos/characters/{}"),
        ("DELETE", "/v1/videos/characters/{}"),
        ("GET", "/v1/files/{}"),
        ("DELETE", "/v1/files/{}"),
        ("GET", "/v1/files/{}/content"),
        ("GET", "/v1/batches/{}"),
        ("POST", "/v1/batches/{}/cancel"),
    ):
        body = {"prompt": "a"} if path.endswith("remix") else None
        response = await client.request(method, path.format(bad), json=body)
        assert response.status_code in (404, 405), (path, response.text)
        assert response.json().keys() == {"error"}
        assert len(response.text) < 1000
    named = unquote(bad)
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "input_reference": ("/v1/videos", {**ASKED, "input_reference": {"file_id": named}}),
        "characters": ("/v1/videos", {**ASKED, "characters": [{"id": named}]}),
        "video": ("/v1/videos/edits", {"prompt": "a", "video": {"id": named}}),
        "input_file_id": (
            "/v1/batches",
            {"input_file_id": named, "endpoint": "/v1/videos", "completion_window": "24h"},
        ),
    }
    for param, (path, body) in asked.items():
        response = await client.post(path, json=body)
        assert response.status_code in (400, 404), response.text
        assert_envelope(response, response.status_code, param)
    assert service.created() == 0
    assert files_below(tmp_path) == set()


async def test_file_names_are_no_paths(service: Service, client: httpx.AsyncClient, tmp_path: Path) -> None:
    for name in BAD_NAMES:
        files = {"file": (name, PICTURE, "image/png")}
        response = await client.post("/v1/files", files=files, data={"purpose": "vision"})
        if not name:  # a part without a file name is no upload
            assert_envelope(response, 400, "file")
            continue
        assert response.status_code == 200, response.text
        file_id = response.json()["id"]
        content = await client.get(f"/v1/files/{file_id}/content")
        disposition = content.headers["content-disposition"]
        assert disposition.startswith(f'attachment; filename="{file_id}')
        assert len(disposition) < 100
        await client.delete(f"/v1/files/{file_id}")
        for path, field in (("/v1/videos", "input_reference"), ("/v1/videos/characters", "video")):
            fields = ASKED if field == "input_reference" else {"name": "Rolly"}
            response = await client.post(path, data=fields, files={field: (name, PICTURE, "image/png")})
            assert response.status_code == 200, response.text
            made = "videos" if field == "input_reference" else "videos/characters"
            await client.delete(f"/v1/{made}/{response.json()['id']}")
    assert files_below(tmp_path) == set()


def broken(data: bytes) -> list[bytes]:
    """What is cut off, what is damaged in the middle, and what only begins like one."""
    half = len(data) // 2
    return [
        data[:half],
        data[:40],
        data[:8] + bytes(64),
        bytes(len(data)),
        b"\xff" * 4096,
        b"GIF89a",
        b"\0\0\0\x1cftypisom",
    ]


async def test_broken_and_large_uploads_leave_nothing(
    service: Service, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    moving = clip(tmp_path, 17)
    large = b"\0" * (REFERENCES.max_bytes + 1)
    for path, field, fields, good in (
        ("/v1/videos", "input_reference", ASKED, PICTURE),
        ("/v1/videos/edits", "video", {"prompt": "a"}, moving),
        ("/v1/videos/extensions", "video", {"prompt": "a", "seconds": "1"}, moving),
        ("/v1/videos/characters", "video", {"name": "Rolly"}, moving),
    ):
        bad = broken(good) if field == "input_reference" else broken(good)[1:]  # of half a video a half is left
        for data in bad:
            response = await client.post(path, data=fields, files={field: ("a", data, "video/mp4")})
            assert_envelope(response, 400, field)
        response = await client.post(path, data=fields, files={field: ("a", large, "video/mp4")})
        assert_envelope(response, 413, field)
        response = await client.post(path, data=fields, files={field: ("a", b"\0" * MAX_REFERENCE_BODY, "video/mp4")})
        assert_envelope(response, 413, None)
        two = [(field, ("a", good, "video/mp4")), (field, ("b", good, "video/mp4"))]
        assert (await client.post(path, data=fields, files=two)).status_code == 400
        if field == "video":
            as_text = await client.post(path, data={**fields, "video": "a"})
            assert_envelope(as_text, 400, "video")
    response = await client.post("/v1/videos", json={**ASKED, "input_reference": {"image_url": data_url(large)}})
    assert_envelope(response, 400, "input_reference")
    response = await client.post("/v1/files", files={"file": ("a", b"\0" * MAX_FILE)}, data={"purpose": "vision"})
    assert_envelope(response, 413, None)
    assert service.created() == 0
    assert files_below(tmp_path) == set()


async def test_a_size_must_fit_the_model_whatever_the_video_begins_with(
    service: Service, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    for size in ("48x64", "72x64", "1280x720", "a"):
        body = {**ASKED, "size": size, "input_reference": {"image_url": data_url(PICTURE)}}
        assert_envelope(await client.post("/v1/videos", json=body), 400, "size")
        reference = json.dumps({"image_url": data_url(PICTURE)})
        form = {**ASKED, "size": size, "input_reference": reference}
        assert_envelope(await client.post("/v1/videos", data=form), 400, "size")
    assert files_below(tmp_path) == set()
