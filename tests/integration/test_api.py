"""The HTTP API over the real store and log, without Ray: what is refused, and how."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from service import MAX_REFERENCE_BODY, Service, assert_envelope

from models.bundle import Bundle

REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": " \n\t"}, 400, "prompt"),
    ({"prompt": "a" * 40_000}, 400, "prompt"),
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": 5}, 400, "prompt"),
    ({"prompt": ["a ball"]}, 400, "prompt"),
    ({"prompt": "\ud800"}, 400, "prompt"),
    ({"prompt": "a\0ball"}, 400, "prompt"),
    ({"size": "100x100"}, 400, "size"),
    ({"size": "128x120"}, 400, "size"),
    ({"size": "128"}, 400, "size"),
    ({"size": "-128x128"}, 400, "size"),
    ({"size": "100000x100000"}, 400, "size"),
    ({"size": "0x0"}, 400, "size"),
    ({"size": 128}, 400, "size"),
    ({"seconds": 0}, 400, "seconds"),
    ({"seconds": -1}, 400, "seconds"),
    ({"seconds": "0"}, 400, "seconds"),
    ({"seconds": 100_000}, 400, "seconds"),
    ({"seconds": "9" * 30}, 400, "seconds"),
    ({"seconds": 1.5}, 400, "seconds"),
    ({"seconds": "two"}, 400, "seconds"),
    ({"seconds": True}, 400, "seconds"),
    ({"seconds": [2]}, 400, "seconds"),
    ({"model": "sora-9"}, 404, "model"),
    ({"model": 3}, 400, "model"),
    ({"seed": -1}, 400, "seed"),
    ({"seed": 2**64}, 400, "seed"),
    ({"seed": "7"}, 400, "seed"),
    ({"seed": 0.5}, 400, "seed"),
    ({"num_inference_steps": 0}, 400, "num_inference_steps"),
    ({"num_inference_steps": 10_000}, 400, "num_inference_steps"),
    ({"guidance_scale": "high"}, 400, "guidance_scale"),
    ({"guidance_scale": -3}, 400, "guidance_scale"),
    ({"guidance_scale": 1e300}, 400, "guidance_scale"),
    ({"guidance_scale": float("nan")}, 400, "guidance_scale"),
    ({"negative_prompt": "\0"}, 400, "negative_prompt"),
    ({"negative_prompt": 1}, 400, "negative_prompt"),
    ({"negative_prompt": "b" * 40_000}, 400, "negative_prompt"),
    ({"stream": "maybe"}, 400, "stream"),
    ({"stream": 1}, 400, "stream"),
    ({"rewrite_prompt": "yes"}, 400, "rewrite_prompt"),
    ({"rewrite_prompt": 1}, 400, "rewrite_prompt"),
    ({"scene_prompts": [{"start_seconds": 1, "prompt": "a cube"}]}, 400, "scene_prompts"),
    ({"scene_prompts": "a cube"}, 400, "scene_prompts"),
    ({"num_steps": 3}, 400, "num_steps"),
    ({"webhook_url": "https://example.com/hook"}, 400, "webhook_url"),
    ({"webhook_url": 5}, 400, "webhook_url"),
    ({"input_reference": {"image_url": "data:,"}}, 400, "input_reference"),
]


@pytest.mark.parametrize(("wrong", "status", "param"), REFUSED, ids=lambda value: str(value)[:40])
async def test_bad_json_is_refused_by_name_and_creates_nothing(
    service: Service, client: httpx.AsyncClient, wrong: dict[str, Any], status: int, param: str
) -> None:
    body = {"prompt": "a red ball", **wrong} if wrong else {}
    response = await client.post(
        "/v1/videos", content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    assert_envelope(response, status, param)
    assert service.created() == 0
    assert service.wakes == 0
    assert list(service.videos_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"size": "100x100"}, 400, "size"),
        ({"seconds": "two"}, 400, "seconds"),
        ({"seed": "x"}, 400, "seed"),
        ({"stream": "maybe"}, 400, "stream"),
        ({"quality": "high"}, 400, "quality"),
        ({"model": "sora-9"}, 404, "model"),
    ],
    ids=str,
)
async def test_bad_form_is_refused_by_name(
    service: Service, client: httpx.AsyncClient, wrong: dict[str, str], status: int, param: str
) -> None:
    fields = {"prompt": "a red ball", **wrong} if wrong else {"model": "tiny"}
    response = await client.post("/v1/videos", files={name: (None, value) for name, value in fields.items()})
    assert_envelope(response, status, param)
    assert service.created() == 0


async def test_a_file_is_refused_by_name(service: Service, client: httpx.AsyncClient) -> None:
    files = {"prompt": (None, "a red ball"), "input_reference": ("a.png", b"\x89PNG", "image/png")}
    assert_envelope(await client.post("/v1/videos", files=files), 400, "input_reference")
    files = {"prompt": ("prompt.txt", b"a red ball", "text/plain")}
    assert_envelope(await client.post("/v1/videos", files=files), 400, "prompt")
    assert service.created() == 0


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'"a red ball"', "application/json", 400),
        (b"null", "application/json", 400),
        (b'{"prompt": "\xff"}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x", 400),
        (b"prompt=a", "multipart/form-data", 400),
        (b"<prompt/>", "application/xml", 415),
        (b'{"prompt": "' + b"a" * MAX_REFERENCE_BODY + b'"}', "application/json", 413),
        (b"prompt=" + b"a" * MAX_REFERENCE_BODY, "application/x-www-form-urlencoded", 413),
    ],
    ids=range(12),
)
async def test_bodies_that_cannot_be_read(
    service: Service, client: httpx.AsyncClient, content: bytes, kind: str, status: int
) -> None:
    response = await client.post("/v1/videos", content=content, headers={"Content-Type": kind})
    # A form that breaks off before its first field is one without fields.
    assert_envelope(response, status, "prompt" if content.startswith(b"--x") else None)
    assert service.created() == 0


async def test_a_video_object_has_openais_keys_and_the_settings(
    service: Service, client: httpx.AsyncClient, tiny_bundle: Bundle
) -> None:
    size = f"{tiny_bundle.manifest.limits.max_side}x{tiny_bundle.manifest.limits.min_side}"
    asked = {"prompt": "a red ball", "seconds": "1", "size": size, "seed": 7, "guidance_scale": 2}
    response = await client.post("/v1/videos", json=asked)
    assert response.status_code == 200, response.text
    video = response.json()
    assert video.pop("id").startswith("video_")
    assert isinstance(video.pop("created_at"), int)
    assert isinstance(video.pop("num_inference_steps"), int)
    assert video == {
        "object": "video",
        "model": "tiny",
        "status": "queued",
        "progress": 0,
        "completed_at": None,
        "expires_at": None,
        "estimated_seconds_left": None,
        "prompt": "a red ball",
        "revised_prompt": None,
        "size": size,
        "seconds": "1",
        "remixed_from_video_id": None,
        "error": None,
        "seed": 7,
        "negative_prompt": "",
        "guidance_scale": 2.0,
        "best_of": 1,
        "guidance_interval": [0.0, 1.0],
        "cache": "off",
        "guidance_cache": "off",
        "scene_prompts": [],
        "lora": [],
        "codec": "h264",
        "decoder": "full",
    }
    assert (await client.get(f"/v1/videos/{response.json()['id']}")).json() == response.json()
    assert service.wakes == 1


async def test_json_and_form_mean_the_same_and_defaults_are_the_bundles(
    client: httpx.AsyncClient, tiny_bundle: Bundle
) -> None:
    fields = {"prompt": "a red ball", "seconds": "1", "seed": "7", "stream": "false", "guidance_scale": "2.5"}
    form = (await client.post("/v1/videos", files={name: (None, value) for name, value in fields.items()})).json()
    asked = {"prompt": "a red ball", "seconds": 1, "seed": 7, "guidance_scale": 2.5}
    plain = (await client.post("/v1/videos", json=asked)).json()
    same = {"prompt", "seconds", "size", "seed", "guidance_scale", "num_inference_steps", "model"}
    assert {key: form[key] for key in same} == {key: plain[key] for key in same}

    default = (await client.post("/v1/videos", json={"prompt": "a red ball"})).json()
    limits = tiny_bundle.manifest.limits
    assert default["size"] == "{}x{}".format(*limits.default_size)
    assert default["seconds"] == str(limits.default_seconds)
    assert default["num_inference_steps"] == tiny_bundle.manifest.sampler.num_inference_steps


async def test_lists_are_pages(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/videos")).json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    ids = [(await client.post("/v1/videos", json={"prompt": f"ball {n}"})).json()["id"] for n in range(3)]
    page = (await client.get("/v1/videos", params={"limit": 2})).json()
    assert [video["id"] for video in page["data"]] == [ids[2], ids[1]]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[2], ids[1], True)
    page = (await client.get("/v1/videos", params={"limit": 2, "after": page["last_id"]})).json()
    assert ([video["id"] for video in page["data"]], page["has_more"]) == ([ids[0]], False)
    page = (await client.get("/v1/videos", params={"order": "asc"})).json()
    assert [video["id"] for video in page["data"]] == ids
    for wrong in ({"limit": 101}, {"limit": -1}, {"limit": "x"}, {"order": "up"}, {"after": "../x"}):
        assert_envelope(await client.get("/v1/videos", params=wrong), 400, next(iter(wrong)))


async def test_cancel_and_delete(service: Service, client: httpx.AsyncClient) -> None:
    ids = [(await client.post("/v1/videos", json={"prompt": f"ball {n}"})).json()["id"] for n in range(4)]
    cancelled = (await client.post(f"/v1/videos/{ids[0]}/cancel")).json()
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    assert (await client.post(f"/v1/videos/{ids[0]}/cancel")).json() == cancelled

    running = await service.claimed()
    assert running.id == ids[1]
    assert (await client.post(f"/v1/videos/{ids[1]}/cancel")).json()["status"] == "in_progress"
    assert (await client.delete(f"/v1/videos/{ids[1]}")).json() == {
        "id": ids[1],
        "object": "video.deleted",
        "deleted": True,
    }
    assert_envelope(await client.get(f"/v1/videos/{ids[1]}"), 404, "video_id")
    assert (await service.store.heartbeat(ids[1], running.fence, 60)).cancel_requested

    await service.completed(ids[2], video_mp4=b"abc")
    assert (service.videos_dir / ids[2]).exists()
    for video_id in (ids[0], ids[2], ids[3]):
        assert (await client.delete(f"/v1/videos/{video_id}")).status_code == 200
        assert_envelope(await client.delete(f"/v1/videos/{video_id}"), 404, "video_id")
        assert_envelope(await client.post(f"/v1/videos/{video_id}/cancel"), 404, "video_id")
        assert await service.store.get(video_id) is None
    assert list(service.videos_dir.iterdir()) == []
    assert (await client.get("/v1/videos")).json()["data"] == []


async def test_an_idempotency_key_makes_a_request_count_once(service: Service, client: httpx.AsyncClient) -> None:
    asked = {"prompt": "a red ball", "seconds": 1}
    key = {"Idempotency-Key": "retry-1"}
    first = (await client.post("/v1/videos", json=asked, headers=key)).json()
    assert (await client.post("/v1/videos", json=asked, headers=key)).json() == first
    form = {"prompt": (None, "a red ball"), "seconds": (None, "1")}
    assert (await client.post("/v1/videos", files=form, headers=key)).json() == first
    for other in ({"seconds": 2}, {"guidance_cache": "alternate"}):
        response = await client.post("/v1/videos", json={**asked, **other}, headers=key)
        assert_envelope(response, 409, "Idempotency-Key")
    for wrong in ("", "k" * 256):
        response = await client.post("/v1/videos", json=asked, headers={"Idempotency-Key": wrong})
        assert_envelope(response, 400, "Idempotency-Key")
    assert service.created() == 1
    assert (await client.post("/v1/videos", json=asked, headers={"Idempotency-Key": "retry-2"})).json() != first


async def test_how_soon_to_ask_again(service: Service, client: httpx.AsyncClient) -> None:
    """Nothing is known before the first video is completed; then its pace is, and soon each video's own."""
    asked = {"prompt": "a red ball"}
    response = await client.post("/v1/videos", json=asked)
    assert response.headers["openai-poll-after-ms"] == "1000"
    first = response.json()["id"]
    await service.completed(first, video_mp4=b"abc")
    assert "openai-poll-after-ms" not in (await client.get(f"/v1/videos/{first}")).headers

    second = (await client.post("/v1/videos", json=asked)).json()["id"]
    video = await service.claimed()
    await service.store.set_progress(second, video.fence, 99)
    soon = await client.get(f"/v1/videos/{second}")
    assert soon.headers["openai-poll-after-ms"] == "250"
    assert soon.json()["progress"] == 99


async def test_a_model_has_other_names(client: httpx.AsyncClient) -> None:
    video = (await client.post("/v1/videos", json={"prompt": "a ball", "model": "sora-2"})).json()
    assert video["model"] == "tiny"
    assert (await client.get("/v1/models/sora-2")).json()["id"] == "sora-2"
    assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["tiny", "sora-2"]


async def test_a_failed_video_says_why(service: Service, client: httpx.AsyncClient) -> None:
    video_id = (await client.post("/v1/videos", json={"prompt": "a red ball"})).json()["id"]
    claimed = await service.store.claim("runner", 60)
    assert claimed is not None
    await service.store.fail(video_id, claimed.fence, "generation_failed", "out of memory")
    video = (await client.get(f"/v1/videos/{video_id}")).json()
    assert video["status"] == "failed"
    assert video["error"] == {"code": "generation_failed", "message": "out of memory"}
    assert_envelope(await client.get(f"/v1/videos/{video_id}/content"), 400, "video_id")


@pytest.mark.parametrize("video_id", ["video_0", "video_" + "0" * 32, "..%2F..%2Fetc%2Fpasswd", "x" * 5000])
async def test_videos_that_are_not_there(client: httpx.AsyncClient, video_id: str) -> None:
    for path in (f"/v1/videos/{video_id}", f"/v1/videos/{video_id}/content"):
        response = await client.get(path)
        assert response.status_code == 404
        assert response.json()["error"]["type"] == "invalid_request_error"


async def test_models_are_listed_with_their_limits(client: httpx.AsyncClient, tiny_bundle: Bundle) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    model = listed["data"][0]
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny", "model", "rushes")
    assert isinstance(model["created"], int)
    assert model["limits"]["max_seconds"] == tiny_bundle.manifest.limits.max_seconds
    assert (await client.get("/v1/models/tiny")).json() == model
    assert_envelope(await client.get("/v1/models/sora-9"), 404, "model")


async def test_the_frameworks_own_errors_have_the_envelope(client: httpx.AsyncClient) -> None:
    assert_envelope(await client.get("/v2/nothing"), 404, None)
    assert_envelope(await client.put("/v1/videos"), 405, None)
    assert_envelope(await client.delete("/v1/models"), 405, None)
    assert (await client.get("/health")).json() == {"status": "ok"}


async def test_an_unexpected_error_has_the_envelope_and_no_details(
    service: Service, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(video_id: str) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(service.store, "get", broken)
    response = await client.get("/v1/videos/video_" + "0" * 32)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text


async def test_the_openapi_document_describes_the_request(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    schema = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["prompt"]
    assert schema["additionalProperties"] is False


async def test_the_openapi_document_says_what_errors_look_like(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    operations = {
        (method, path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if path.startswith("/v1/")
    }
    assert len(operations) >= 20
    for operation in operations.values():
        schema = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}
    assert len({operation["operationId"] for operation in operations.values()}) == len(operations)
