"""The service against its own OpenAPI document: schemathesis sends what the document allows and what it forbids."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import strategies as st
from making import CHUNKS, FRAGMENTS
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema
from service import Service

from models.bundle import Bundle
from serving.jobs.fragment_log import FragmentLog
from serving.jobs.video import is_video_id

# A wider run has some hundred examples of each operation, and other seeds.
EXAMPLES = int(os.environ.get("RUSHES_CONTRACT_EXAMPLES", "3"))
SEED = int(os.environ.get("RUSHES_CONTRACT_SEED", "1"))
# These may refuse what the document allows: it depends on what a video is, or on what an upload holds.
DEPENDS = (
    "/v1/videos/{video_id}/content",
    "/v1/videos/{video_id}/remix",
    "/v1/videos/edits",
    "/v1/videos/extensions",
    "/v1/videos/characters",
    "/v1/videos/{video_id}/stream",
    "/v1/videos/{video_id}/hls/master.m3u8",
    "/v1/videos/{video_id}/hls/media.m3u8",
    "/v1/videos/{video_id}/hls/init.mp4",
    "/v1/videos/{video_id}/hls/parts/{index}.m4s",
    "/v1/videos/{video_id}/hls/segments/{index}.m4s",
)
# Nobody makes the unfinished videos here, so whoever watched one would wait for ever.
WATCHED = ("/stream", "/events", "/hls/")
REFUSALS = ["2xx", "400", "404", "409"]


async def furnish(service: Service) -> dict[str, list[str]]:
    """A video of each status, files and batches: their ids, by the name of the path parameter."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(service.api), base_url="http://test") as client:
        videos = []
        for n in range(4):
            created = await client.post("/v1/videos", json={"prompt": f"ball {n}", "seconds": "1"})
            videos.append(created.json()["id"])
        await service.completed(videos[0], video_mp4=b"abc", thumbnail_webp=b"def")
        log = await FragmentLog.create(service.videos_dir, videos[0], fence=1)
        for index, (start, stop) in enumerate(CHUNKS):
            await log.append(index, start, stop - start, FRAGMENTS[index].init, FRAGMENTS[index].data)
        await log.close()
        failing = await service.claimed()
        await service.store.fail(failing.id, failing.fence, "generation_failed", "out of memory")
        await service.claimed()
        line = '{"custom_id": "a", "method": "POST", "url": "/v1/videos", "body": {"prompt": "x"}}'
        files = [
            (await client.post("/v1/files", files={"file": ("a.jsonl", line)}, data={"purpose": "batch"})).json()["id"]
            for _ in range(2)
        ]
        asked = {"input_file_id": files[0], "endpoint": "/v1/videos", "completion_window": "24h"}
        batches = [(await client.post("/v1/batches", json=asked)).json()["id"] for _ in range(2)]
    return {"video_id": videos, "file_id": files, "batch_id": batches, "model": ["tiny", "sora-2"]}


def without_endless(context: Any, case: schemathesis.Case, kwargs: Any) -> None:
    """Nobody watches while a video is made, since none is; and a picture depends on what is fetched."""
    if isinstance(case.body, dict) and case.path == "/v1/videos" and case.method.upper() == "POST":
        case.body = {name: value for name, value in case.body.items() if name not in ("stream", "input_reference")}


@pytest.fixture
def schema(tiny_bundle: Bundle, tmp_path: Path) -> Iterator[Any]:
    service = Service(tiny_bundle, tmp_path)
    kept = asyncio.run(furnish(service))
    depends = [
        {
            "include-path": path,
            "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "400", "404", "409"]}},
        }
        for path in DEPENDS
    ]
    # The one that was just created isn't the one that is watched: see `of_ended_videos`.
    depends += [
        {"include-path-regex": part, "checks": {"ensure_resource_availability": {"enabled": False}}} for part in WATCHED
    ]
    config = SchemathesisConfig.from_dict(
        {
            "seed": SEED,
            "generation": {"max-examples": EXAMPLES, "deterministic": True, "database": "none"},
            "operations": depends,
        }
    )
    opened = schemathesis.openapi.from_asgi("/openapi.json", service.api, config=config)

    @opened.hook
    def before_generate_path_parameters(context: Any, strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        """Mostly of things that are there: any other text is a 404 and no more."""

        @st.composite
        def with_known(draw: st.DrawFn) -> Any:
            parameters = draw(strategy)
            if isinstance(parameters, dict):
                for name in parameters.keys() & kept.keys():
                    if draw(st.integers(0, 3)):
                        parameters = {**parameters, name: draw(st.sampled_from(kept[name]))}
            return parameters

        return with_known()

    def of_ended_videos(context: Any, case: schemathesis.Case, kwargs: Any) -> None:
        asked = str(case.path_parameters.get("video_id"))
        if any(part in case.path for part in WATCHED) and is_video_id(asked) and asked not in kept["video_id"][:2]:
            case.path_parameters = {**case.path_parameters, "video_id": kept["video_id"][0]}

    for change in (without_endless, of_ended_videos):
        schemathesis.hook("before_call")(change)
    yield opened
    for change in (without_endless, of_ended_videos):
        schemathesis.hooks.unregister(change)


def test_every_answer_is_as_documented(schema: Any) -> None:
    failures: dict[str, str] = {}
    answers = 0
    for event in from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            answers += len(event.recorder.interactions)
            for checks in event.recorder.checks.values():
                for check in checks:
                    if (found := check.failure_info) is not None:
                        said = f"{event.label}: {found.failure.title}"
                        failures.setdefault(said, f"{said}\n{found.failure.message}\n{found.code_sample}")
        elif isinstance(event, events.NonFatalError | events.FatalError):
            failures[repr(event)] = str(getattr(event, "value", event))
    assert not failures, "\n\n".join(failures.values())
    assert answers > 500
