"""The official openai SDK against the whole service, with nothing but its `base_url` changed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Video
from pictures import PICTURE, clip, data_url
from service import WholeService
from typer.testing import CliRunner

from models.bundle import Bundle
from serving.cli import app
from serving.pipeline.local import LocalPipeline

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

FAST = {"num_inference_steps": 2, "seed": 7}
SHORT: dict[str, Any] = {"seconds": "1", "size": "64x64", "extra_body": FAST}


@pytest.fixture
async def url(tiny_bundle: Bundle, tmp_path: Path) -> AsyncIterator[str]:
    async with (
        LocalPipeline.open(tiny_bundle) as pipeline,
        WholeService(tiny_bundle, pipeline, tmp_path).running() as client,
    ):
        yield str(client.base_url.join("/v1"))


def batch_file(count: int) -> bytes:
    lines = [
        {
            "custom_id": f"clip-{n}",
            "method": "POST",
            "url": "/v1/videos",
            "body": {"prompt": f"ball {n}", "seconds": "1", **FAST},
        }
        for n in range(count)
    ]
    return "\n".join(json.dumps(line) for line in lines).encode()


def sync_videos(sdk: openai.OpenAI, tmp_path: Path) -> None:
    video = sdk.videos.create_and_poll(prompt="a red ball", model="sora-2", seconds="1", extra_body=FAST)  # type: ignore[arg-type]
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert video.expires_at is not None
    assert video.completed_at is not None
    for variant, magic in (("video", b"ftyp"), ("thumbnail", b"WEBP"), ("spritesheet", b"\xff\xd8")):
        content = sdk.videos.download_content(video.id, variant=variant)  # type: ignore[arg-type]
        assert magic in content.read()[:12]
    with sdk.videos.with_streaming_response.download_content(video.id) as response:
        response.stream_to_file(tmp_path / "clip.mp4")
    assert (tmp_path / "clip.mp4").stat().st_size == int(response.headers["content-length"])

    more = [sdk.videos.create(prompt=f"ball {n}", seconds="1", extra_body=FAST) for n in range(4)]  # type: ignore[arg-type]
    everything = [video.id, *(one.id for one in more)]
    assert [one.id for one in sdk.videos.list(limit=2, order="asc")] == everything
    assert [one.id for one in sdk.videos.list(limit=3)] == everything[::-1]
    assert all(sdk.videos.poll(one.id, poll_interval_ms=20).status == "completed" for one in more)
    for one in more:
        deleted = sdk.videos.delete(one.id)
        assert (deleted.id, deleted.deleted, deleted.object) == (one.id, True, "video.deleted")
    assert [one.id for one in sdk.videos.list()] == [video.id]

    with pytest.raises(openai.NotFoundError):
        sdk.videos.retrieve(more[0].id)
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.videos.create(prompt="a ball", size="100x100")  # type: ignore[arg-type]
    assert (refused.value.param, refused.value.code) == ("size", "invalid_value")
    assert [model.id for model in sdk.models.list()] == ["tiny", "sora-2"]
    assert sdk.models.retrieve("sora-2").id == "sora-2"


def sync_beginnings(sdk: openai.OpenAI, moving: bytes) -> None:
    """Everything that a video can begin from, by id and as an upload."""
    video = sdk.videos.create_and_poll(prompt="a red ball", **SHORT)
    picture = sdk.files.create(file=("a.png", PICTURE), purpose="vision")
    character = sdk.videos.create_character(name="Rolly", video=moving)
    assert character.id is not None
    assert (character.name, sdk.videos.get_character(character.id).model_dump()) == ("Rolly", character.model_dump())
    # The SDK takes only uploads where the contract has objects too (openai-python 3.57, `extract_files`).
    hops = {"prompt": "it hops", "seconds": "1"}
    named: list[dict[str, Any]] = [
        {"input_reference": {"file_id": picture.id}},
        {"input_reference": {"image_url": data_url(PICTURE)}},
        {"characters": [{"id": character.id}]},
    ]
    made = [
        sdk.videos.remix(video.id, prompt="a blue ball"),
        sdk.post("/videos/edits", cast_to=Video, body={"prompt": "a blue ball", "video": {"id": video.id}}),
        sdk.videos.edit(prompt="a blue ball", video=moving),
        sdk.post("/videos/extensions", cast_to=Video, body={**hops, "video": {"id": video.id}}),
        sdk.videos.extend(prompt="it hops", seconds="1", video=("a.mkv", moving)),  # type: ignore[arg-type]
        sdk.videos.create(prompt="a ball", input_reference=("a.png", PICTURE), **SHORT),
        *(sdk.videos.create(prompt="Rolly", seconds="1", size="64x64", extra_body={**FAST, **more}) for more in named),  # type: ignore[arg-type]
    ]
    seconds = [one.seconds for one in made]
    assert seconds == ["1", "1", "1", "2", "2", "1", "1", "1", "1"]
    origins = [one.remixed_from_video_id for one in made]
    assert origins == [video.id, video.id, None, video.id, None, None, None, None, None]
    for one in made:
        done = sdk.videos.poll(one.id, poll_interval_ms=20)
        assert (done.status, done.error) == ("completed", None)

    with pytest.raises(openai.NotFoundError):
        sdk.videos.get_character("char_1")
    for ask, param in (
        (lambda: sdk.videos.edit(prompt="a", video=b"video"), "video"),
        (lambda: sdk.videos.extend(prompt="a", seconds="4", video=b"video"), "video"),
        (lambda: sdk.videos.create_character(name="a", video=b"video"), "video"),
        (lambda: sdk.videos.create_character(name="", video=moving), "name"),
        (lambda: sdk.videos.create(prompt="a", input_reference=b"image"), "input_reference"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            ask()
        assert refused.value.param == param


async def async_beginnings(sdk: openai.AsyncOpenAI, moving: bytes) -> None:
    video = await sdk.videos.create_and_poll(prompt="a red ball", **SHORT)
    character = await sdk.videos.create_character(name="Rolly", video=moving)
    assert character.id is not None
    assert (await sdk.videos.get_character(character.id)).name == "Rolly"
    made = [
        await sdk.videos.remix(video.id, prompt="a blue ball"),
        await sdk.videos.edit(prompt="a blue ball", video=moving),
        await sdk.videos.extend(prompt="it hops", seconds="1", video=("a.mkv", moving)),  # type: ignore[arg-type]
        await sdk.videos.create(prompt="a ball", input_reference=("a.png", PICTURE), **SHORT),
    ]
    for one in made:
        assert (await sdk.videos.poll(one.id, poll_interval_ms=20)).status == "completed"


def sync_batches(sdk: openai.OpenAI) -> None:
    file = sdk.files.create(file=("in.jsonl", batch_file(3)), purpose="batch")
    assert sdk.files.retrieve(file.id) == file
    assert sdk.files.wait_for_processing(file.id) == file
    assert sdk.files.content(file.id).read() == batch_file(3)
    other = sdk.files.create(file=b"x", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert [one.id for one in sdk.files.list(limit=1, order="asc")] == [file.id, other.id]
    assert sdk.files.delete(other.id).deleted

    batch = sdk.batches.create(
        input_file_id=file.id, endpoint="/v1/videos", completion_window="24h", metadata={"a": "b"}
    )
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        batch = sdk.batches.retrieve(batch.id)
        time.sleep(0.02)
    assert batch.status == "completed", batch.errors
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.metadata) == (3, 3, {"a": "b"})
    assert batch.output_file_id is not None
    lines = [json.loads(line) for line in sdk.files.content(batch.output_file_id).text.splitlines()]
    assert [line["custom_id"] for line in lines] == ["clip-0", "clip-1", "clip-2"]
    assert b"ftyp" in sdk.videos.download_content(lines[0]["response"]["body"]["id"]).read()[:12]

    again = sdk.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h")
    assert sdk.batches.cancel(again.id).status in ("cancelling", "cancelled")
    assert [one.id for one in sdk.batches.list(limit=1)] == [again.id, batch.id]


async def test_the_sdk(url: str, tmp_path: Path) -> None:
    with openai.OpenAI(base_url=url, api_key="unused") as sdk:
        await asyncio.to_thread(sync_videos, sdk, tmp_path)
        await asyncio.to_thread(sync_batches, sdk)


async def test_the_async_sdk(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="unused") as sdk:
        asked: dict[str, Any] = {"seconds": "1", "extra_body": FAST}
        video = await sdk.videos.create_and_poll(prompt="a red ball", **asked)
        assert video.status == "completed"
        assert b"ftyp" in (await sdk.videos.download_content(video.id)).read()[:12]
        more = [await sdk.videos.create(prompt=f"ball {n}", **asked) for n in range(2)]
        assert [one.id async for one in sdk.videos.list(limit=1, order="asc")] == [video.id, *(one.id for one in more)]
        assert (await sdk.videos.poll(more[0].id)).status == "completed"
        assert (await sdk.videos.delete(more[1].id)).deleted
        with pytest.raises(openai.NotFoundError):
            await sdk.videos.retrieve(more[1].id)

        file = await sdk.files.create(file=("in.jsonl", batch_file(1)), purpose="batch")
        assert [one.id async for one in sdk.files.list()] == [file.id]
        batch = await sdk.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h")
        while batch.status not in ("completed", "failed"):
            batch = await sdk.batches.retrieve(batch.id)
            await asyncio.sleep(0.02)
        assert batch.output_file_id is not None
        assert "clip-0" in (await sdk.files.content(batch.output_file_id)).text
        assert [one.id async for one in sdk.batches.list()] == [batch.id]
        with pytest.raises(openai.ConflictError):
            await sdk.batches.cancel(batch.id)
        assert (await sdk.files.delete(file.id)).deleted
        assert (await sdk.files.retrieve(batch.output_file_id)).purpose == "batch_output"


async def test_the_sdks_make_videos_of_pictures_videos_and_characters(url: str, tmp_path: Path) -> None:
    moving = clip(tmp_path, 17)
    with openai.OpenAI(base_url=url, api_key="unused") as sdk:
        await asyncio.to_thread(sync_beginnings, sdk, moving)
    async with openai.AsyncOpenAI(base_url=url, api_key="unused") as async_sdk:
        await async_beginnings(async_sdk, moving)


async def test_rushes_submit_waits_for_the_answers(url: str, tmp_path: Path) -> None:
    requests = tmp_path / "dailies.jsonl"

    async def submit(*options: str, root: str = url.removesuffix("/v1")) -> Any:
        asked = ["submit", str(requests), "--url", root, *options]
        return await asyncio.to_thread(CliRunner().invoke, app, asked)

    requests.write_bytes(batch_file(2))
    done = await submit("--wait")
    answers = tmp_path / "dailies.out.jsonl"
    assert (done.exit_code, done.stdout) == (0, f"{answers}\n"), done.output
    assert [json.loads(line)["custom_id"] for line in answers.read_text().splitlines()] == ["clip-0", "clip-1"]
    done = await submit()
    assert (done.exit_code, done.stdout[:6]) == (0, "batch_")

    requests.write_text("{\n")
    done = await submit("--wait")
    assert done.exit_code == 1
    assert "line 1: The line is not valid JSON." in done.stderr
    done = await submit("--window", "soon")
    assert done.exit_code == 1
    assert "completion_window must be" in done.stderr
    done = await submit(root="http://127.0.0.1:9")
    assert done.exit_code == 1
    assert "can't be reached" in done.stderr
