"""The service against OpenAI's own description of the videos, files, batches and models API.

The description is OpenAI's, so it isn't kept here: `RUSHES_OPENAI_CONTRACT` names the file (`openapi.yaml` of
github.com/openai/openai-openapi will do), where it isn't in `shared/contracts` beside the checkout.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from jsonschema import Draft202012Validator
from openai.types import Batch, FileObject, Model, Video, VideoCreateCharacterResponse, VideoDeleteResponse
from pictures import clip
from service import Service, assert_envelope

BESIDE = Path(__file__).parents[3] / "shared" / "contracts" / "openai" / "videos-files-batches.openapi.yaml"
CONTRACT = Path(os.environ.get("RUSHES_OPENAI_CONTRACT", BESIDE))
OURS = re.compile(r"/(videos|files|batches|models)(/.*)?")
# Nothing of a served model can be deleted over HTTP.
NOT_SERVED = {("delete", "/models/{model}")}
# OpenAI's models and what these allow.
OTHER_VALUES = ("VideoSize", "VideoSeconds", "VideoModel")


@pytest.fixture(scope="session")
def contract() -> dict[str, Any]:
    if not CONTRACT.exists():
        pytest.skip(f"there is no {CONTRACT}: RUSHES_OPENAI_CONTRACT may name OpenAI's openapi.yaml")
    described: dict[str, Any] = yaml.load(CONTRACT.read_bytes(), Loader=yaml.CSafeLoader)
    for name in OTHER_VALUES:
        described["components"]["schemas"][name] = {"type": "string"}
    return described


@pytest.fixture
async def answers(service: Service, tmp_path: Path) -> AsyncIterator[dict[str, Any]]:
    """An answer, or several, of every operation, by the operation's method and path."""
    transport = httpx.ASGITransport(service.api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test/v1") as client:

        async def answer(method: str, path: str, **asked: Any) -> Any:
            response = await client.request(method, path, **asked)
            assert response.status_code == 200, response.text
            return response.json()

        asked = {"prompt": "a ball", "seconds": "1", "size": "64x64"}
        moving = {"video": ("a.mkv", clip(tmp_path, 17), "video/x-matroska")}
        queued, failing = [await answer("POST", "/videos", json=asked) for _ in range(2)]
        done = queued["id"]
        await service.completed(done, video_mp4=clip(tmp_path, 17))
        failed = await service.claimed()
        await service.store.fail(failed.id, failed.fence, "generation_failed", "out of memory")
        of_done = {"prompt": "a cube", "video": {"id": done}}
        line = {"custom_id": "a", "method": "POST", "url": "/v1/videos", "body": asked}
        upload = {"file": ("a.jsonl", json.dumps(line))}
        file = await answer("POST", "/files", files=upload, data={"purpose": "batch"})
        batch = await answer(
            "POST",
            "/batches",
            json={"input_file_id": file["id"], "endpoint": "/v1/videos", "completion_window": "24h"},
        )
        other = await answer("POST", "/files", files=upload, data={"purpose": "batch"})
        character = await answer("POST", "/videos/characters", data={"name": "Rolly"}, files=moving)
        yield {
            "post /videos": [queued, failing],
            "post /videos/{video_id}/remix": [await answer("POST", f"/videos/{done}/remix", json={"prompt": "a"})],
            "post /videos/edits": [
                await answer("POST", "/videos/edits", json=of_done),
                await answer("POST", "/videos/edits", data={"prompt": "a"}, files=moving),
            ],
            "post /videos/extensions": [await answer("POST", "/videos/extensions", json={**of_done, "seconds": "1"})],
            "post /videos/characters": [character],
            "get /videos/characters/{character_id}": [await answer("GET", f"/videos/characters/{character['id']}")],
            "get /videos/{video_id}": [await answer("GET", f"/videos/{id}") for id in (done, failed.id)],
            "get /videos": [await answer("GET", "/videos"), await answer("GET", "/videos", params={"limit": 0})],
            "delete /videos/{video_id}": [await answer("DELETE", f"/videos/{failed.id}")],
            "post /files": [file],
            "get /files": [await answer("GET", "/files")],
            "get /files/{file_id}": [await answer("GET", f"/files/{file['id']}")],
            "delete /files/{file_id}": [await answer("DELETE", f"/files/{other['id']}")],
            "post /batches": [batch],
            "get /batches": [await answer("GET", "/batches")],
            "get /batches/{batch_id}": [await answer("GET", f"/batches/{batch['id']}")],
            "post /batches/{batch_id}/cancel": [await answer("POST", f"/batches/{batch['id']}/cancel")],
            "get /models": [await answer("GET", "/models")],
            "get /models/{model}": [await answer("GET", "/models/sora-2")],
        }


def operations(document: dict[str, Any], prefix: str = "") -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method, path.removeprefix(prefix)): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if OURS.fullmatch(path.removeprefix(prefix)) and method in ("get", "post", "delete")
    }


def fields(document: dict[str, Any], schema: dict[str, Any]) -> set[str]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    # `expires_after[seconds]` is how a form has `expires_after`.
    return {name.partition("[")[0] for name in schema["properties"]}


def test_every_operation_is_served_with_its_parameters_and_fields(contract: dict[str, Any], service: Service) -> None:
    document = service.api.openapi()
    served = operations(document, "/v1")
    described = {key: operation for key, operation in operations(contract).items() if key not in NOT_SERVED}
    assert described.keys() <= served.keys()
    for key, operation in described.items():
        ours = {parameter["name"] for parameter in served[key].get("parameters", ())}
        assert {parameter["name"] for parameter in operation.get("parameters", ())} <= ours, key
        bodies = operation.get("requestBody", {}).get("content", {})
        for kind, body in bodies.items():
            served_kinds = served[key]["requestBody"]["content"]
            assert kind in served_kinds, key
            missing = fields(contract, body["schema"]) - fields(document, served_kinds[kind]["schema"])
            assert not missing, key


def without_nulls(value: Any) -> Any:
    """Where the description leaves out a key, OpenAI's service and this one say null."""
    if isinstance(value, dict):
        return {name: without_nulls(of) for name, of in value.items() if of is not None}
    return [without_nulls(of) for of in value] if isinstance(value, list) else value


def test_every_answer_is_as_described(contract: dict[str, Any], answers: dict[str, Any]) -> None:
    described = operations(contract)
    binary = {"get /videos/{video_id}/content", "get /files/{file_id}/content"}
    wanted = {f"{method} {path}" for method, path in described.keys() - NOT_SERVED} - binary
    assert wanted == answers.keys()
    for name, given in answers.items():
        method, _, path = name.partition(" ")
        schema = described[method, path]["responses"]["200"]["content"]["application/json"]["schema"]
        checker = Draft202012Validator({**schema, "components": contract["components"]})
        nullable = path.startswith("/videos")
        for answer in given:
            problems = [error.message for error in checker.iter_errors(answer if nullable else without_nulls(answer))]
            assert not problems, (name, answer)


async def test_every_answer_has_all_that_the_sdk_knows(answers: dict[str, Any], service: Service) -> None:
    """Even without OpenAI's description at hand: each field of the SDK's classes is there, and of its type."""
    for name, kind in (
        ("post /videos", Video),
        ("get /videos/{video_id}", Video),
        ("post /videos/extensions", Video),
        ("post /videos/characters", VideoCreateCharacterResponse),
        ("delete /videos/{video_id}", VideoDeleteResponse),
        ("post /files", FileObject),
        ("post /batches", Batch),
        ("get /models/{model}", Model),
    ):
        for answer in answers[name]:
            required = {field for field, info in kind.model_fields.items() if info.is_required()}
            assert required <= answer.keys(), name
            if kind in (Video, VideoCreateCharacterResponse):
                assert kind.model_fields.keys() <= answer.keys(), name
    for status in ("post /videos", "get /videos/{video_id}"):
        for answer in answers[status]:
            assert {"expires_at", "completed_at", "error", "remixed_from_video_id", "prompt"} <= answer.keys()


async def test_a_whole_number_of_seconds_and_any_size_within_the_limits(service: Service) -> None:
    transport = httpx.ASGITransport(service.api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test/v1") as client:
        for seconds in range(1, 9):
            for given in (seconds, str(seconds)):
                video = (await client.post("/videos", json={"prompt": "a", "seconds": given})).json()
                assert video["seconds"] == str(seconds)
        for given in (0, 9, -1, "9", "1.5", 1.5, "", "four", True, [], "1" * 12):
            assert_envelope(await client.post("/videos", json={"prompt": "a", "seconds": given}), 400, "seconds")
        for size in ("64x64", "256x64", "64x256", "80x112", "256x256"):
            assert (await client.post("/videos", json={"prompt": "a", "size": size})).json()["size"] == size
        for size in (
            "48x64",
            "272x64",
            "72x64",
            "64",
            "64x",
            "64X64",
            "0x0",
            "-64x64",
            " 64x64",
            64,
            "1280x720",
        ):
            assert_envelope(await client.post("/videos", json={"prompt": "a", "size": size}), 400, "size")
