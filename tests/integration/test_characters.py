"""`/v1/videos/characters`: a clip's picture under a name, and videos that begin with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pictures import PICTURE, clip, data_url, shaded
from service import REFERENCES, Service, assert_envelope

from models.bundle import Bundle
from serving.jobs.artifacts import video_key
from serving.media.frames import read_all

ASKED = {"prompt": "Rolly rolls away", "seconds": 1, "size": "64x64", "seed": 7}


async def created(client: httpx.AsyncClient, video: bytes, name: str = "Rolly", **headers: str) -> dict[str, Any]:
    files = {"video": ("../../rolly.mkv", video, "video/x-matroska")}
    response = await client.post("/v1/videos/characters", data={"name": name}, files=files, headers=headers)
    assert response.status_code == 200, response.text
    character: dict[str, Any] = response.json()
    return character


async def test_a_video_begins_with_the_middle_of_its_characters_clip(
    service: Service, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    character = await created(client, clip(tmp_path, 9))
    assert character.keys() == {"id", "name", "created_at"}
    assert character["name"] == "Rolly"
    assert (await client.get(f"/v1/videos/characters/{character['id']}")).json() == character
    ways: list[dict[str, Any]] = [
        {"json": {**ASKED, "characters": [{"id": character["id"]}]}},
        {"data": {**ASKED, "characters[][id]": character["id"]}},
        {"data": {**ASKED, "characters": f'[{{"id": "{character["id"]}"}}]'}},
    ]
    for body in ways:
        response = await client.post("/v1/videos", **body)
        assert response.status_code == 200, response.text
        video = await service.claimed()
        assert (video.request["source"], video.request["source_frames"]) == (video_key(video.id, "source"), 1)
        source = read_all(service.videos_dir / video.id / "source", 64, 64, 1)
        np.testing.assert_array_equal(source[0], shaded(shade=5 * 4))


async def test_a_character_is_no_file_and_can_be_deleted(
    service: Service, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    character = await created(client, clip(tmp_path, 3))
    assert (await client.get("/v1/files")).json()["data"] == []
    assert_envelope(await client.get(f"/v1/files/{character['id']}"), 404, "file_id")
    gone = await client.delete(f"/v1/videos/characters/{character['id']}")
    assert gone.json() == {"id": character["id"], "deleted": True}
    assert_envelope(await client.get(f"/v1/videos/characters/{character['id']}"), 404, "character_id")
    assert left(service) == []


def left(service: Service) -> list[Path]:
    """All files below the artifacts' root."""
    root = service.videos_dir.parent
    return [path for path in root.rglob("*") if path.is_file() and not path.name.startswith("videos.db")]


async def test_bad_characters_are_refused_and_leave_nothing(
    service: Service, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    good = clip(tmp_path, 3)
    long = clip(tmp_path, 42, fps=2)
    bad: list[tuple[dict[str, str], bytes | None, int, str]] = [
        ({}, good, 400, "name"),
        ({"name": ""}, good, 400, "name"),
        ({"name": "a" * 81}, good, 400, "name"),
        ({"name": "a\0b"}, good, 400, "name"),
        ({"name": "a", "model": "tiny"}, good, 400, "model"),
        ({"name": "a"}, None, 400, "video"),
        ({"name": "a", "video": "char.mp4"}, None, 400, "video"),
        ({"name": "a"}, b"", 400, "video"),
        ({"name": "a"}, b"no video", 400, "video"),
        ({"name": "a"}, good[: len(good) // 4], 400, "video"),
        ({"name": "a"}, long, 400, "video"),
        ({"name": "a"}, b"\0" * (REFERENCES.max_bytes + 1), 413, "video"),
    ]
    for form, video, status, param in bad:
        files = None if video is None else {"video": ("a.mp4", video, "video/mp4")}
        assert_envelope(await client.post("/v1/videos/characters", data=form, files=files), status, param)
    assert_envelope(await client.post("/v1/videos/characters", json={"name": "a", "video": "b"}), 400, "video")
    assert left(service) == []


UNKNOWN = "char_" + "0" * 32


@pytest.mark.parametrize(
    ("characters", "status"),
    [
        ("Rolly", 400),
        ([], 400),
        (["Rolly"], 400),
        ([{}], 400),
        ([{"id": 7}], 400),
        ([{"id": UNKNOWN, "x": 1}], 400),
        ([{"id": UNKNOWN}, {"id": UNKNOWN}], 400),
        ([{"id": UNKNOWN}], 404),
        ([{"id": "../../videos.db"}], 404),
        ([{"id": "file-" + "0" * 32}], 404),
    ],
)
async def test_bad_mentions_are_refused_and_leave_nothing(
    service: Service, client: httpx.AsyncClient, characters: Any, status: int
) -> None:
    assert_envelope(await client.post("/v1/videos", json={**ASKED, "characters": characters}), status, "characters")
    both = {"characters": [{"id": UNKNOWN}], "input_reference": {"image_url": data_url(PICTURE)}}
    assert_envelope(await client.post("/v1/videos", json={**ASKED, **both}), 400, "characters")
    assert service.created() == 0
    assert left(service) == []


async def test_others_characters_are_not_there(tiny_bundle: Bundle, tmp_path: Path) -> None:
    service = Service(tiny_bundle, tmp_path, require_keys=True)
    mine, theirs = (f"Bearer {service.storage.keys.create(name)[1]}" for name in ("one", "two"))
    transport = httpx.ASGITransport(service.api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        character = await created(client, clip(tmp_path, 3), Authorization=mine)
        body, url = {**ASKED, "characters": [{"id": character["id"]}]}, f"/v1/videos/characters/{character['id']}"
        for headers, status in (({"Authorization": theirs}, 404), ({"Authorization": mine}, 200)):
            assert (await client.post("/v1/videos", json=body, headers=headers)).status_code == status
            assert (await client.get(url, headers=headers)).status_code == status
            assert (await client.delete(url, headers=headers)).status_code == status


async def test_a_model_without_an_encoder_says_so(tiny_bundle: Bundle, tmp_path: Path) -> None:
    graphs = {name: graph for name, graph in tiny_bundle.manifest.graphs.items() if not name.startswith("encoder_")}
    plain = tiny_bundle.manifest.model_copy(update={"graphs": graphs, "captioner": None})
    service = Service(replace(tiny_bundle, manifest=plain), tmp_path)
    transport = httpx.ASGITransport(service.api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        video_id = (await client.post("/v1/videos", json={**ASKED, "seconds": 1})).json()["id"]
        await service.completed(video_id, video_mp4=clip(tmp_path, 9))
        kept = left(service)
        files = {"video": ("a.mkv", b"any", "video/x-matroska")}
        for path, asked, param in (
            ("", {"json": {**ASKED, "input_reference": {"image_url": data_url(PICTURE)}}}, "input_reference"),
            ("", {"json": {**ASKED, "characters": [{"id": UNKNOWN}]}}, "characters"),
            ("/characters", {"data": {"name": "a"}, "files": files}, "video"),
            ("/edits", {"data": {"prompt": "a"}, "files": files}, "video"),
            ("/extensions", {"data": {"prompt": "a", "seconds": "1"}, "files": files}, "video"),
            ("/edits", {"json": {"prompt": "a", "video": {"id": video_id}}}, "video"),
            (f"/{video_id}/remix", {"json": {"prompt": "a"}}, "video_id"),
        ):
            response = await client.post(f"/v1/videos{path}", **asked)  # type: ignore[arg-type]  # a mapping of several types
            assert_envelope(response, 400, param)
            assert response.json()["error"]["code"] == "unsupported_by_model"
        assert service.created() == 1
        assert left(service) == kept
