"""Videos that begin from something: pictures, other videos, uploads. What they show, and what is refused."""

from __future__ import annotations

import asyncio
import json
import struct
import zlib
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import numpy as np
import pytest
from pictures import PICTURE, Frames, clip, data_url, png, shaded
from service import REFERENCES, Service, WholeService, assert_envelope

from models.bundle import Bundle
from serving.jobs.artifacts import video_key
from serving.jobs.store import Video
from serving.media.fmp4 import encode_fragment, remux_to_mp4
from serving.media.frames import read_all, read_frames
from serving.pipeline.geometry import first_frame
from serving.pipeline.local import LocalPipeline

ASKED = {"prompt": "a red ball", "seconds": 1, "size": "64x64", "seed": 7, "num_inference_steps": 4}


def upload(data: bytes = PICTURE, **fields: Any) -> dict[str, Any]:
    asked = {**ASKED, **fields}
    return {
        "data": {name: str(value) for name, value in asked.items()},
        "files": {"input_reference": ("a.png", data, "image/png")},
    }


def kept(service: Service) -> list[str]:
    """The videos that something is kept of on the disk."""
    return sorted(path.name for path in service.videos_dir.iterdir())


def nothing_is_left(service: Service) -> bool:
    scratch = [path for path in (service.videos_dir.parent / "scratch").iterdir() if path.is_file()]
    return service.created() == 0 and not kept(service) and not scratch


async def a_completed_video(service: Service, client: httpx.AsyncClient, folder: Path, **asked: Any) -> str:
    video_id: str = (await client.post("/v1/videos", json={**ASKED, **asked})).json()["id"]
    await service.completed(video_id, video_mp4=clip(folder, 17))
    return video_id


async def test_every_way_to_name_a_picture_keeps_the_same_one(service: Service, client: httpx.AsyncClient) -> None:
    form = {"file": ("a.png", PICTURE, "image/png")}
    file = (await client.post("/v1/files", files=form, data={"purpose": "vision"})).json()
    asked = [
        upload(),
        {"json": {**ASKED, "input_reference": {"image_url": data_url(PICTURE)}}},
        {"json": {**ASKED, "input_reference": {"file_id": file["id"]}}},
        {"data": {**ASKED, "input_reference": json.dumps({"file_id": file["id"]})}, "files": {"x": b""}},
        {"data": {**ASKED, "input_reference[file_id]": file["id"]}},
    ]
    del asked[3]["files"]
    sources = []
    for body in asked:
        response = await client.post("/v1/videos", **body)
        assert response.status_code == 200, response.text
        video = await service.claimed()
        assert video.id == response.json()["id"]
        assert (video.request["source"], video.request["source_frames"]) == (video_key(video.id, "source"), 1)
        assert video.request["strength"] is None
        sources.append(read_all(service.videos_dir / video.id / "source", 64, 64, 1))
    for source in sources:
        np.testing.assert_array_equal(source[0], shaded())
    assert file["purpose"] == "vision"
    content = await client.get(f"/v1/files/{file['id']}/content")
    assert content.headers["content-disposition"] == f'attachment; filename="{file["id"]}.png"'


async def test_a_picture_of_another_shape_covers_the_size(service: Service, client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/videos", **upload(png(shaded(300, 100)), size="96x64"))
    assert response.status_code == 200
    source = read_all(service.videos_dir / response.json()["id"] / "source", 96, 64, 1)[0]
    assert source[:, 0, 0].mean() > 30  # its left edge lies outside


def with_sides(picture: bytes, width: int, height: int) -> bytes:
    """A PNG whose header says that it is of another size."""
    header = b"IHDR" + struct.pack(">II", width, height) + picture[24:29]
    return picture[:12] + header + struct.pack(">I", zlib.crc32(header)) + picture[33:]


BAD_PICTURES: list[tuple[Any, int]] = [
    ("a picture", 400),
    (7, 400),
    ([], 400),
    ({}, 400),
    ({"url": "https://example.com/a.png"}, 400),
    ({"image_url": data_url(PICTURE), "file_id": "file-1"}, 400),
    ({"image_url": 7}, 400),
    ({"image_url": "data:,"}, 400),
    ({"image_url": "data:image/png;base64,????"}, 400),
    ({"image_url": data_url(b"no picture")}, 400),
    ({"image_url": data_url(PICTURE[: len(PICTURE) // 3])}, 400),
    ({"image_url": "ftp://example.com/a.png"}, 400),
    ({"image_url": "http://127.0.0.1:1/a.png"}, 400),
    ({"image_url": "http://[::1]:1/a.png"}, 400),
    ({"image_url": "http://169.254.169.254/latest/meta-data"}, 400),
    ({"image_url": "http://10.0.0.1/a.png"}, 400),
    ({"image_url": "http://localhost:1/a.png"}, 400),
    ({"image_url": "http://127.1:1/a.png"}, 400),
    ({"image_url": "http://2130706433:1/a.png"}, 400),
    ({"image_url": "http://[::ffff:127.0.0.1]:1/a.png"}, 400),
    ({"image_url": "http://[64:ff9b::7f00:1]:1/a.png"}, 400),
    ({"image_url": "http://user:password@127.0.0.1:1/a.png"}, 400),
    ({"image_url": "http:///a.png"}, 400),
    ({"image_url": "http://127.0.0.1:99999/a.png"}, 400),
    ({"image_url": "http://a b/"}, 400),
    ({"image_url": "https://example.com/" + "a" * 3000}, 400),
    ({"image_url": "file:///etc/passwd"}, 400),
    ({"image_url": "/etc/passwd"}, 400),
    ({"image_url": data_url(b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "image/svg+xml")}, 400),
    ({"image_url": data_url(with_sides(PICTURE, 60_000, 60_000))}, 400),
    ({"image_url": data_url(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")}, 400),
    ({"image_url": data_url(b"ffconcat version 1.0\nfile videos.db\n")}, 400),
    ({"file_id": "file-" + "0" * 32}, 404),
    ({"file_id": "../../videos.db"}, 404),
]


@pytest.mark.parametrize(("reference", "status"), BAD_PICTURES)
async def test_a_bad_picture_is_refused_and_leaves_nothing(
    service: Service, client: httpx.AsyncClient, reference: Any, status: int
) -> None:
    response = await client.post("/v1/videos", json={**ASKED, "input_reference": reference})
    assert_envelope(response, status, "input_reference")
    assert nothing_is_left(service)


async def test_what_else_is_refused_leaves_nothing(service: Service, client: httpx.AsyncClient, tmp_path: Path) -> None:
    moving = clip(tmp_path, 5)
    assert_envelope(await client.post("/v1/videos", **upload(moving)), 400, "input_reference")
    assert_envelope(await client.post("/v1/videos", **upload(b"")), 400, "input_reference")
    assert_envelope(await client.post("/v1/videos", **upload(size="65x64")), 400, "size")
    assert_envelope(
        await client.post("/v1/videos", **upload(b"\0" * (REFERENCES.max_bytes + 1))), 413, "input_reference"
    )
    assert_envelope(await client.post("/v1/videos/edits", json={"prompt": "a"}), 400, "video")
    assert_envelope(await client.post("/v1/videos/edits", json={"video": {"id": "video_1"}}), 400, "prompt")
    for video in ("video_1", {"id": 7}, {"id": "video_1", "x": 1}, {}, ["video_1"]):
        assert_envelope(await client.post("/v1/videos/edits", json={"prompt": "a", "video": video}), 400, "video")
    gone = {"id": "video_" + "0" * 32}
    assert_envelope(await client.post("/v1/videos/edits", json={"prompt": "a", "video": gone}), 404, "video")
    asked = {"prompt": "a", "video": gone, "seconds": 1}
    assert_envelope(await client.post("/v1/videos/extensions", json=asked), 404, "video")
    assert_envelope(await client.post("/v1/videos/extensions", json={**asked, "strength": 0.5}), 400, "strength")
    del asked["seconds"]
    assert_envelope(await client.post("/v1/videos/extensions", json=asked), 400, "seconds")
    for strength in (0, -1, 1.5, "much"):
        body = {"prompt": "a", "video": gone, "strength": strength}
        assert_envelope(await client.post("/v1/videos/edits", json=body), 400, "strength")
    files = {"video": ("a.mp4", PICTURE, "video/mp4")}
    assert_envelope(await client.post("/v1/videos/edits", data={"prompt": "a"}, files=files), 400, "video")
    assert nothing_is_left(service)


async def test_a_video_that_is_not_completed_can_not_be_gone_on_from(
    service: Service, client: httpx.AsyncClient
) -> None:
    video_id = (await client.post("/v1/videos", json=ASKED)).json()["id"]
    assert_envelope(await client.post(f"/v1/videos/{video_id}/remix", json={"prompt": "a"}), 400, "video_id")
    body = {"prompt": "a", "video": {"id": video_id}, "seconds": 1}
    assert_envelope(await client.post("/v1/videos/extensions", json=body), 400, "video")
    unknown = "video_" + "0" * 32
    assert_envelope(await client.post(f"/v1/videos/{unknown}/remix", json={"prompt": "a"}), 404, "video_id")
    assert service.created() == 1


async def test_a_remix_has_the_settings_of_its_video(
    service: Service, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    shortcuts = {"guidance_interval": [0.1, 0.9], "cache": "fast", "guidance_cache": "alternate"}
    source_id = await a_completed_video(
        service, client, tmp_path, negative_prompt="fog", guidance_scale=2.5, **shortcuts
    )
    remix = (await client.post(f"/v1/videos/{source_id}/remix", json={"prompt": "a blue ball"})).json()
    assert remix["remixed_from_video_id"] == source_id
    assert (remix["prompt"], remix["negative_prompt"]) == ("a blue ball", "fog")
    same = ("seconds", "size", "seed", "num_inference_steps", "guidance_scale", "model")
    source = (await client.get(f"/v1/videos/{source_id}")).json()
    assert {name: remix[name] for name in same} == {name: source[name] for name in same}
    assert {name: remix[name] for name in shortcuts} == shortcuts
    video = await service.claimed()
    assert (video.request["strength"], video.request["source_frames"], video.request["frames"]) == (0.75, 17, 17)
    assert video.request["guidance_cache"] == "alternate"
    # The remix has a copy: the video that it is of may go.
    assert (await client.delete(f"/v1/videos/{source_id}")).status_code == 200
    assert len(read_all(service.videos_dir / video.id / "source", 64, 64, 17)) == 17


async def test_an_extension_adds_seconds_within_the_limit(
    service: Service, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    source_id = await a_completed_video(service, client, tmp_path)
    body = {"prompt": "it hops", "video": {"id": source_id}, "seconds": "3"}
    longer = (await client.post("/v1/videos/extensions", json=body)).json()
    assert (longer["seconds"], longer["remixed_from_video_id"]) == ("4", source_id)
    video = await service.claimed()
    assert (video.request["frames"], video.request["source_frames"], video.request["strength"]) == (65, 17, None)
    too_long = await client.post("/v1/videos/extensions", json={**body, "seconds": 8})
    assert_envelope(too_long, 400, "seconds")
    assert "8 seconds at most; it has 1 already" in too_long.json()["error"]["message"]
    assert kept(service) == sorted([source_id, video.id])


async def test_an_uploaded_video_is_cut_to_whole_groups_of_frames(
    service: Service, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    source_id = await a_completed_video(service, client, tmp_path)
    asked = {"prompt": "a cone", "strength": "0.5"}
    files = {"video": ("a.mkv", clip(tmp_path, 24, fps=16, side=80), "video/x-matroska")}
    response = await client.post("/v1/videos/edits", data={**asked, "size": "96x64"}, files=files)
    assert response.status_code == 200, response.text
    video = await service.claimed()
    assert (video.request["frames"], video.request["source_frames"], video.request["strength"]) == (21, 21, 0.5)
    assert (response.json()["remixed_from_video_id"], response.json()["size"]) == (None, "96x64")
    form = {"prompt": "a cone", "seconds": "1", "video[id]": video.id}
    assert_envelope(await client.post("/v1/videos/extensions", data=form), 400, "video")  # understood
    for name, value in (("model", "tiny"), ("size", "96x64")):
        body = {"prompt": "a cone", "video": {"id": source_id}, name: value}
        assert_envelope(await client.post("/v1/videos/edits", json=body), 400, name)
    assert_envelope(await client.post("/v1/videos/edits", data={**asked, "size": "9x9"}, files=files), 400, "size")
    short = {"video": ("a.mkv", clip(tmp_path, 3), "video/x-matroska")}
    assert_envelope(await client.post("/v1/videos/edits", data={"prompt": "a"}, files=short), 400, "video")


async def test_a_repeated_request_keeps_one_source(service: Service, client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "once"}
    first = await client.post("/v1/videos", **upload(), headers=headers)
    again = await client.post("/v1/videos", **upload(), headers=headers)
    other = await client.post("/v1/videos", **upload(png(shaded(shade=9))), headers=headers)
    assert first.json()["id"] == again.json()["id"]
    assert_envelope(other, 409, "Idempotency-Key")
    assert kept(service) == [first.json()["id"]]
    assert service.created() == 1


async def test_others_pictures_and_videos_are_not_there(tiny_bundle: Bundle, tmp_path: Path) -> None:
    service = Service(tiny_bundle, tmp_path, require_keys=True)
    secrets = [service.storage.keys.create(name)[1] for name in ("one", "two")]
    transport = httpx.ASGITransport(service.api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        mine, theirs = ({"Authorization": f"Bearer {secret}"} for secret in secrets)
        form = {"file": ("a.png", PICTURE, "image/png")}
        file = (await client.post("/v1/files", files=form, data={"purpose": "vision"}, headers=mine)).json()
        body = {**ASKED, "input_reference": {"file_id": file["id"]}}
        assert_envelope(await client.post("/v1/videos", json=body, headers=theirs), 404, "input_reference")
        video = (await client.post("/v1/videos", json=body, headers=mine)).json()
        edit = {"prompt": "a", "video": {"id": video["id"]}}
        assert_envelope(await client.post("/v1/videos/edits", json=edit, headers=theirs), 404, "video")
        assert_envelope(await client.post("/v1/videos/edits", json=edit, headers=mine), 400, "video")


async def test_a_picture_is_fetched_where_that_is_allowed(tiny_bundle: Bundle, tmp_path: Path) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path != "/elsewhere.png"
            self.send_response(200 if found else 302)
            self.send_header("Location", "http://169.254.169.254/")
            self.end_headers()
            self.wfile.write({"/a.png": PICTURE, "/large.png": PICTURE + b"a"}.get(self.path, b""))

        def log_message(self, *_: object) -> None:
            pass

    from serving.api.app import create_api
    from serving.api.beginnings import ReferencePolicy

    service = Service(tiny_bundle, tmp_path)
    policy = ReferencePolicy(max_bytes=len(PICTURE), allow_private=True)
    api = create_api(service.storage, {"tiny": tiny_bundle}, service.wake, references=policy)
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for path, status in (("a.png", 200), ("elsewhere.png", 400), ("large.png", 400), ("empty", 400)):
                url = f"http://127.0.0.1:{server.server_port}/{path}"
                response = await client.post("/v1/videos", json={**ASKED, "input_reference": {"image_url": url}})
                assert response.status_code == status, response.text
        server.shutdown()


@pytest.fixture(params=["tiny_bundle", "tiny_causal_bundle"])
async def whole(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[WholeService]:
    bundle: Bundle = request.getfixturevalue(request.param)
    async with LocalPipeline.open(bundle) as pipeline:
        yield WholeService(bundle, pipeline, tmp_path)


async def made(service: WholeService, video_id: str) -> Video:
    while True:
        video = await service.store.get(video_id)
        if video is not None and video.status.final:
            assert video.error_message is None, video.error_message
            return video
        await asyncio.sleep(0.01)


async def frames_of(service: WholeService, client: httpx.AsyncClient, body: dict[str, Any], path: str = "") -> Frames:
    response = await client.post(f"/v1/videos{path}", json=body)
    assert response.status_code == 200, response.text
    video = await made(service, response.json()["id"])
    file = service.videos_dir / video.id / "video.mp4"
    return np.stack(list(read_frames(file, fps=16, width=64, height=64)))


def expected_of(service: WholeService, frames: Frames) -> Frames:
    """What a video shows whose latents are those of `frames`: through the model's autoencoder and the video codec."""
    pipeline, manifest = service.pipeline, service.bundle.manifest
    assert pipeline.encoder is not None
    latents = pipeline.encoder.encode(iter(frames), len(frames))
    decoded, _ = pipeline.decoder._run(pipeline.decoder._engines["full"], {}, {"latents": latents[None]})
    borders = [start for chunk in range(len(frames)) if (start := first_frame(manifest, chunk)) < len(decoded)]
    fragments = [
        encode_fragment(part, fps=manifest.fps, index=index, first_frame=start)
        for index, (start, part) in enumerate(zip(borders, np.split(decoded, borders[1:]), strict=True))
    ]
    path = service.videos_dir.parent / "expected.mp4"
    remux_to_mp4(fragments[0].init, (fragment.data for fragment in fragments), path)
    return np.stack(list(read_frames(path, fps=16, width=64, height=64)))


def error(one: Frames, other: Frames) -> float:
    return float(np.abs(one.astype(int) - other).mean())


async def test_a_video_begins_with_the_picture(whole: WholeService) -> None:
    plain: dict[str, Any] = dict(ASKED)
    async with whole.running() as client:
        without = await frames_of(whole, client, plain)
        body = {**plain, "input_reference": {"image_url": data_url(PICTURE)}}
        begun, again = [await frames_of(whole, client, body) for _ in range(2)]
    expected = expected_of(whole, shaded()[None])[0]
    assert error(begun[0], expected) < 1 < 20 < error(without[0], expected)
    np.testing.assert_array_equal(begun, again)
    assert not np.array_equal(begun[-1], without[-1])


async def test_an_extension_begins_with_its_video_and_goes_on(whole: WholeService) -> None:
    async with whole.running() as client:
        response = await client.post("/v1/videos", json=ASKED)
        source_id = response.json()["id"]
        await made(whole, source_id)
        source = np.stack(list(read_frames(whole.videos_dir / source_id / "video.mp4", fps=16, width=64, height=64)))
        body = {"prompt": "it hops", "video": {"id": source_id}, "seconds": 2}
        longer = await frames_of(whole, client, body, "/extensions")
    assert (len(source), len(longer)) == (17, 17 + 32)
    assert error(longer[:17], expected_of(whole, source)) < 1


async def test_a_remix_is_as_near_to_its_video_as_its_strength_says(whole: WholeService) -> None:
    async with whole.running() as client:
        source_id = (await client.post("/v1/videos", json={**ASKED, "num_inference_steps": 8})).json()["id"]
        await made(whole, source_id)
        source = np.stack(list(read_frames(whole.videos_dir / source_id / "video.mp4", fps=16, width=64, height=64)))
        path = f"/{source_id}/remix"
        weak, strong = [
            await frames_of(whole, client, {"prompt": "a blue cube", "strength": strength, "seed": 8}, path)
            for strength in (0.05, 1.0)
        ]
        fresh = await frames_of(whole, client, {**ASKED, "prompt": "a blue cube", "seed": 8, "num_inference_steps": 8})
    near = expected_of(whole, source)
    assert error(weak, near) < error(strong, near)
    assert error(strong, fresh) < 4  # nothing of the source is left
