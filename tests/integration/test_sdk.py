"""The official openai SDK against the whole service, with nothing but its `base_url` changed."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai._resource import AsyncAPIResource
from openai.types import Video
from pictures import PICTURE, clip, data_url
from receiver import SECRET, Receiver
from service import WholeService
from typer.testing import CliRunner

from models.bundle import Bundle
from serving.cli import app
from serving.pipeline.local import LocalPipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `.content\\(\\)` method should be used instead:DeprecationWarning"),
]

FAST = {"num_inference_steps": 2, "seed": 7}
BRIEF: dict[str, Any] = {"seconds": "1", "size": "64x64", "extra_body": FAST}

# What an SDK has and this service leaves out. A method that is in neither this list nor the tests below fails them.
LEFT_OUT = {
    "videos": set[str](),
    "files": set[str](),
    "batches": set[str](),
    "models": {"delete"},
    # Those that register endpoints: here a request names its own.
    "webhooks": {"create", "delete", "list", "retrieve", "rotate_secret", "test", "update"},
}


@pytest.fixture
async def url(tiny_bundle: Bundle, tmp_path: Path) -> AsyncIterator[str]:
    async with (
        LocalPipeline.open(tiny_bundle) as pipeline,
        WholeService(tiny_bundle, pipeline, tmp_path, webhook_secret=SECRET).running() as client,
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


class Used:
    """One of an SDK's resources; its methods become coroutines, whichever SDK it is of, and are remembered."""

    def __init__(self, resource: Any) -> None:
        self._resource = resource
        self._is_async = isinstance(resource, AsyncAPIResource | openai.AsyncOpenAI)
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._resource, name)
        self.names.add(name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_async:
                answer = method(*args, **kwargs)
                return await answer if inspect.isawaitable(answer) else answer
            return await asyncio.to_thread(method, *args, **kwargs)

        return call

    async def all(self, **kwargs: Any) -> list[str]:
        """The ids of a whole list, page after page."""
        self.names.add("list")
        if self._is_async:
            return [one.id async for one in self._resource.list(**kwargs)]
        return await asyncio.to_thread(lambda: [one.id for one in self._resource.list(**kwargs)])

    def unused(self) -> set[str]:
        methods = {name for name, _ in inspect.getmembers(type(self._resource), inspect.isfunction) if name[0] != "_"}
        return methods - self.names


class Sdk:
    def __init__(self, sdk: Any) -> None:
        self.videos, self.files, self.batches = Used(sdk.videos), Used(sdk.files), Used(sdk.batches)
        self.models, self.webhooks = Used(sdk.models), Used(sdk.webhooks)
        self.post = Used(sdk).post


async def make_videos(sdk: Sdk) -> str:
    """One that stays; its id."""
    video = await sdk.videos.create_and_poll(prompt="a red ball", model="sora-2", **BRIEF)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert video.expires_at is not None
    assert video.completed_at is not None
    for variant, magic in (("video", b"ftyp"), ("thumbnail", b"WEBP"), ("spritesheet", b"\xff\xd8")):
        content = await sdk.videos.download_content(video.id, variant=variant)
        assert magic in content.read()[:12]

    more = [await sdk.videos.create(prompt=f"ball {n}", **BRIEF) for n in range(4)]
    everything = [video.id, *(one.id for one in more)]
    assert await sdk.videos.all(limit=2, order="asc") == everything
    assert await sdk.videos.all(limit=3) == everything[::-1]
    for one in more:
        assert (await sdk.videos.poll(one.id, poll_interval_ms=20)).status == "completed"
        deleted = await sdk.videos.delete(one.id)
        assert (deleted.id, deleted.deleted, deleted.object) == (one.id, True, "video.deleted")
    assert await sdk.videos.all() == [video.id]
    assert (await sdk.videos.retrieve(video.id)).prompt == "a red ball"
    with pytest.raises(openai.NotFoundError):
        await sdk.videos.retrieve(more[0].id)
    with pytest.raises(openai.BadRequestError) as refused:
        await sdk.videos.create(prompt="a ball", size="100x100")
    assert (refused.value.param, refused.value.code) == ("size", "invalid_value")
    kept: str = video.id
    return kept


async def begin_from(sdk: Sdk, video_id: str, moving: bytes) -> None:
    """Everything that a video can begin from, by id and as an upload."""
    picture = await sdk.files.create(file=("a.png", PICTURE), purpose="vision")
    character = await sdk.videos.create_character(name="Rolly", video=moving)
    assert character.id is not None
    found = await sdk.videos.get_character(character.id)
    assert (character.name, found.model_dump()) == ("Rolly", character.model_dump())
    # The SDK takes only uploads where the contract has objects too (openai-python 3.57, `extract_files`).
    named: list[dict[str, Any]] = [
        {"input_reference": {"file_id": picture.id}},
        {"input_reference": {"image_url": data_url(PICTURE)}},
        {"characters": [{"id": character.id}]},
    ]
    hops = {"prompt": "it hops", "seconds": "1"}
    made = [
        await sdk.videos.remix(video_id, prompt="a blue ball"),
        await sdk.post("/videos/edits", cast_to=Video, body={"prompt": "a blue ball", "video": {"id": video_id}}),
        await sdk.videos.edit(prompt="a blue ball", video=moving),
        await sdk.post("/videos/extensions", cast_to=Video, body={**hops, "video": {"id": video_id}}),
        await sdk.videos.extend(**hops, video=("a.mkv", moving)),
        await sdk.videos.create(prompt="a ball", input_reference=("a.png", PICTURE), **BRIEF),
        *[await sdk.videos.create(prompt="Rolly", **BRIEF | {"extra_body": FAST | more}) for more in named],
    ]
    assert [one.seconds for one in made] == ["1", "1", "1", "2", "2", "1", "1", "1", "1"]
    origins = [one.remixed_from_video_id for one in made]
    assert origins == [video_id, video_id, None, video_id, None, None, None, None, None]
    for one in made:
        done = await sdk.videos.poll(one.id, poll_interval_ms=20)
        assert (done.status, done.error) == ("completed", None)

    with pytest.raises(openai.NotFoundError):
        await sdk.videos.get_character("char_1")
    refused: list[tuple[Callable[[], Awaitable[Any]], str]] = [
        (lambda: sdk.videos.edit(prompt="a", video=b"video"), "video"),
        (lambda: sdk.videos.extend(prompt="a", seconds="4", video=b"video"), "video"),
        (lambda: sdk.videos.create_character(name="a", video=b"video"), "video"),
        (lambda: sdk.videos.create_character(name="", video=moving), "name"),
        (lambda: sdk.videos.create(prompt="a", input_reference=b"image"), "input_reference"),
    ]
    for ask, param in refused:
        with pytest.raises(openai.BadRequestError) as error:
            await ask()
        assert error.value.param == param


async def make_batches(sdk: Sdk) -> None:
    file = await sdk.files.create(file=("in.jsonl", batch_file(3)), purpose="batch")
    assert await sdk.files.retrieve(file.id) == file
    assert await sdk.files.wait_for_processing(file.id) == file
    assert (await sdk.files.content(file.id)).read() == batch_file(3)
    assert (await sdk.files.retrieve_content(file.id)).encode() == batch_file(3)
    other = await sdk.files.create(file=b"x", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert await sdk.files.all(limit=1, order="asc", purpose="batch") == [file.id, other.id]
    assert (await sdk.files.delete(other.id)).deleted

    asked = {"input_file_id": file.id, "endpoint": "/v1/videos", "completion_window": "24h"}
    batch = await sdk.batches.create(**asked, metadata={"a": "b"})
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        batch = await sdk.batches.retrieve(batch.id)
        await asyncio.sleep(0.02)
    assert batch.status == "completed", batch.errors
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.metadata) == (3, 3, {"a": "b"})
    lines = [json.loads(line) for line in (await sdk.files.content(batch.output_file_id)).text.splitlines()]
    assert [line["custom_id"] for line in lines] == ["clip-0", "clip-1", "clip-2"]
    assert b"ftyp" in (await sdk.videos.download_content(lines[0]["response"]["body"]["id"])).read()[:12]
    with pytest.raises(openai.ConflictError):
        await sdk.batches.cancel(batch.id)
    again = await sdk.batches.create(**asked)
    assert (await sdk.batches.cancel(again.id)).status in ("cancelling", "cancelled")
    assert await sdk.batches.all(limit=1) == [again.id, batch.id]
    assert await sdk.models.all() == ["tiny", "sora-2"]
    assert (await sdk.models.retrieve("sora-2")).id == "sora-2"


async def be_told(sdk: Sdk, receiver: Receiver) -> None:
    told = {"prompt": "a ball", **BRIEF, "extra_body": {**FAST, "webhook_url": receiver.url}}
    video = await sdk.videos.create_and_poll(**told)
    headers, body = await asyncio.to_thread(receiver.wait)
    event = await sdk.webhooks.unwrap(body, headers, secret=SECRET)
    assert (event.type, event.data.id) == ("video.completed", video.id)
    await sdk.webhooks.verify_signature(body, headers, secret=SECRET)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        await sdk.webhooks.unwrap(body + b" ", headers, secret=SECRET)


@pytest.mark.parametrize("kind", [openai.OpenAI, openai.AsyncOpenAI])
async def test_every_method_of_the_sdk(url: str, receiver: Receiver, tmp_path: Path, kind: type[Any]) -> None:
    opened = kind(base_url=url, api_key="unused")
    sdk = Sdk(opened)
    video_id = await make_videos(sdk)
    await begin_from(sdk, video_id, clip(tmp_path, 17))
    await make_batches(sdk)
    await be_told(sdk, receiver)
    unused = {name: getattr(sdk, name).unused() for name in LEFT_OUT}
    assert unused == LEFT_OUT
    if inspect.isawaitable(closing := opened.close()):
        await closing


async def test_the_sdk_streams_a_download_to_a_file(url: str, tmp_path: Path) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="unused") as sdk:
        video = await sdk.videos.create_and_poll(prompt="a red ball", **BRIEF)
        async with sdk.videos.with_streaming_response.download_content(video.id) as response:
            await response.stream_to_file(tmp_path / "async.mp4")
        assert (tmp_path / "async.mp4").stat().st_size == int(response.headers["content-length"])

    def download() -> int:
        with (
            openai.OpenAI(base_url=url, api_key="unused") as sdk,
            sdk.videos.with_streaming_response.download_content(video.id) as response,
        ):
            response.stream_to_file(tmp_path / "sync.mp4")
            return int(response.headers["content-length"])

    size = await asyncio.to_thread(download)
    assert (tmp_path / "sync.mp4").stat().st_size == size


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
    assert done.exit_code == 2
    assert "completion_window must be" in done.stderr
    done = await submit(root="http://127.0.0.1:9")
    assert done.exit_code == 1
    assert "could not be reached" in done.stderr
