"""Files and batches over the real store: what is refused, what is made, and what is answered."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from service import MAX_FILE, Service, assert_envelope


def line(custom_id: Any, **changes: Any) -> dict[str, Any]:
    body = {"prompt": f"a ball named {custom_id}", "seconds": "1"}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/videos", "body": body, **changes}


async def upload(client: httpx.AsyncClient, lines: list[Any] | bytes, **fields: Any) -> httpx.Response:
    data = lines if isinstance(lines, bytes) else "\n".join(json.dumps(one) for one in lines).encode()
    form = {"purpose": "batch", **fields}
    return await client.post("/v1/files", files={"file": ("in.jsonl", data)}, data=form)


async def started(client: httpx.AsyncClient, lines: list[Any] | bytes, **changes: Any) -> dict[str, Any]:
    file_id = (await upload(client, lines)).json()["id"]
    asked = {"input_file_id": file_id, "endpoint": "/v1/videos", "completion_window": "24h", **changes}
    response = await client.post("/v1/batches", json=asked)
    assert response.status_code == 200, response.text
    batch: dict[str, Any] = response.json()
    return batch


async def now(client: httpx.AsyncClient, batch: dict[str, Any]) -> dict[str, Any]:
    seen: dict[str, Any] = (await client.get(f"/v1/batches/{batch['id']}")).json()
    return seen


async def results(client: httpx.AsyncClient, file_id: str) -> list[dict[str, Any]]:
    content = (await client.get(f"/v1/files/{file_id}/content")).text
    return [json.loads(one) for one in content.splitlines()]


async def test_a_file_is_kept_listed_read_and_deleted(service: Service, client: httpx.AsyncClient) -> None:
    first = (await upload(client, b"one\n")).json()
    assert first.pop("id").startswith("file-")
    assert first["expires_at"] == first.pop("created_at") + 30 * 86400
    first.pop("expires_at")
    assert first == {
        "object": "file",
        "bytes": 4,
        "filename": "in.jsonl",
        "purpose": "batch",
        "status": "processed",
    }
    expiring = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    second = (await upload(client, b"two\n", **expiring)).json()
    assert second["expires_at"] == second["created_at"] + 3600
    page = (await client.get("/v1/files", params={"limit": 1})).json()
    assert (page["data"], page["has_more"]) == ([second], True)
    page = (await client.get("/v1/files", params={"after": second["id"]})).json()
    assert (len(page["data"]), page["has_more"]) == (1, False)
    assert (await client.get("/v1/files", params={"purpose": "batch_output"})).json()["data"] == []
    assert (await client.get(f"/v1/files/{second['id']}")).json() == second
    assert (await client.get(f"/v1/files/{second['id']}/content")).content == b"two\n"
    assert (await client.delete(f"/v1/files/{second['id']}")).json() == {
        "id": second["id"],
        "object": "file",
        "deleted": True,
    }
    for path in (f"/v1/files/{second['id']}", f"/v1/files/{second['id']}/content", "/v1/files/..%2f..%2fx"):
        assert (await client.get(path)).status_code == 404
    assert len(list((service.videos_dir.parent / "files").iterdir())) == 1


async def test_uploads_that_are_refused(service: Service, client: httpx.AsyncClient) -> None:
    assert_envelope(await upload(client, b"x", purpose="fine-tune"), 400, "purpose")
    assert_envelope(await upload(client, b"x", colour="red"), 400, "colour")
    assert_envelope(await client.post("/v1/files", data={"purpose": "batch"}), 400, "file")
    assert_envelope(await client.post("/v1/files", data={"purpose": "batch", "file": "text"}), 400, "file")
    assert_envelope(await client.post("/v1/files", files={"file": ("in.jsonl", b"x")}), 400, "purpose")
    wrong = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "5"}
    assert_envelope(await upload(client, b"x", **wrong), 400, "expires_after.seconds")
    assert_envelope(await upload(client, b"x", **{"expires_after[seconds]": "3600"}), 400, "expires_after.anchor")
    assert_envelope(await upload(client, b"x" * MAX_FILE), 413, None)
    assert (await upload(client, b"x" * (MAX_FILE - 2000))).status_code == 200
    assert len(list((service.videos_dir.parent / "files").iterdir())) == 1
    assert list((service.videos_dir.parent / "scratch").iterdir()) == []


async def test_names_are_only_names(service: Service, client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/files", files={"file": ("../../etc/passwd", b"x")}, data={"purpose": "batch"})
    assert response.json()["filename"] == "../../etc/passwd"
    assert [path.name for path in (service.videos_dir.parent / "files").iterdir()] == [response.json()["id"]]


@pytest.mark.parametrize(
    ("wrong", "status", "param"),
    [
        ({"input_file_id": "file-" + "0" * 32}, 404, "input_file_id"),
        ({"input_file_id": "../x"}, 404, "input_file_id"),
        ({"input_file_id": 5}, 400, "input_file_id"),
        ({"endpoint": "/v1/chat/completions"}, 400, "endpoint"),
        ({"completion_window": "1d"}, 400, "completion_window"),
        ({"completion_window": "0h"}, 400, "completion_window"),
        ({"metadata": {"a": 5}}, 400, "metadata"),
        ({"metadata": {"a": "b" * 513}}, 400, "metadata"),
        ({"metadata": {str(n): "b" for n in range(17)}}, 400, "metadata"),
        ({"priority": 5}, 400, "priority"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, 400, "output_expires_after"),
        ({"output_expires_after": {"seconds": 7200}}, 400, "output_expires_after"),
    ],
    ids=str,
)
async def test_batches_that_are_refused(
    client: httpx.AsyncClient, wrong: dict[str, Any], status: int, param: str
) -> None:
    file_id = (await upload(client, [line("a")])).json()["id"]
    asked = {"input_file_id": file_id, "endpoint": "/v1/videos", "completion_window": "24h", **wrong}
    assert_envelope(await client.post("/v1/batches", json=asked), status, param)
    assert (await client.get("/v1/batches")).json()["data"] == []


async def test_every_wrong_line_is_named_and_nothing_is_made(service: Service, client: httpx.AsyncClient) -> None:
    lines = [
        json.dumps(line("good")),
        "{",
        "[]",
        json.dumps(line("a", method="GET")),
        json.dumps(line("b", url="/v1/chat/completions")),
        json.dumps(line("c", body={"prompt": ""})),
        json.dumps(line("d", body={"prompt": "x", "size": "1x1"})),
        json.dumps(line("e", body={"prompt": "x", "model": "none"})),
        json.dumps(line("f", body={"prompt": "x", "stream": True})),
        json.dumps(line("g", body=None)),
        json.dumps(line("good")),
        json.dumps(line(5)),
        json.dumps(line("h", extra=1)),
    ]
    batch = await started(client, "\n".join(lines).encode())
    assert batch["status"] == "validating"
    assert await service.batch_worker.work()
    failed = await now(client, batch)
    assert failed["status"] == "failed"
    assert failed["failed_at"] is not None
    assert [(error["line"], error["code"], error["param"]) for error in failed["errors"]["data"]] == [
        (2, "invalid_json_line", None),
        (3, "invalid_json_line", None),
        (4, "invalid_value", "method"),
        (5, "invalid_value", "url"),
        (6, "invalid_value", "body.prompt"),
        (7, "invalid_value", "body.size"),
        (8, "model_not_found", "body.model"),
        (9, "invalid_value", "body.stream"),
        (10, "invalid_type", "body"),
        (11, "duplicate_custom_id", "custom_id"),
        (12, "invalid_value", "custom_id"),
        (13, "unknown_parameter", "extra"),
    ]
    assert service.created() == 0
    assert not await service.batch_worker.work()


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "empty_file"), (b"\n\n", "empty_file"), (b"\xff\xfe\n", "invalid_json_line")],
)
async def test_files_that_are_no_batch(service: Service, client: httpx.AsyncClient, content: bytes, code: str) -> None:
    batch = await started(client, content)
    await service.batch_worker.work()
    assert [error["code"] for error in (await now(client, batch))["errors"]["data"]] == [code]


async def test_a_batch_from_file_to_files(service: Service, client: httpx.AsyncClient) -> None:
    kept = {"anchor": "created_at", "seconds": 7200}
    batch = await started(
        client, [line("a"), line("b"), line("c")], metadata={"team": "dailies"}, output_expires_after=kept
    )
    await service.batch_worker.work()
    running = await now(client, batch)
    assert (running["status"], running["metadata"]) == ("in_progress", {"team": "dailies"})
    assert running["request_counts"] == {"total": 3, "completed": 0, "failed": 0}
    interactive = (await client.post("/v1/videos", json={"prompt": "a ball"})).json()["id"]
    assert (await service.claimed()).id == interactive, "a batch has a lower priority"

    a, b, c = (video["id"] for video in (await client.get("/v1/videos", params={"order": "asc"})).json()["data"][:3])
    await service.completed(a, video_mp4=b"abc")
    video = await service.claimed()
    await service.store.fail(b, video.fence, "generation_failed", "out of memory")
    await service.batch_worker.work()
    running = await now(client, batch)
    assert (running["status"], running["request_counts"]) == ("in_progress", {"total": 3, "completed": 1, "failed": 1})
    await service.completed(c, video_mp4=b"abc")
    await service.batch_worker.work()

    done = await now(client, batch)
    assert (done["status"], done["request_counts"]) == ("completed", {"total": 3, "completed": 2, "failed": 1})
    assert done["created_at"] <= done["in_progress_at"] <= done["finalizing_at"] <= done["completed_at"]
    good = await results(client, done["output_file_id"])
    assert [(one["custom_id"], one["response"]["body"]["id"], one["error"]) for one in good] == [
        ("a", a, None),
        ("c", c, None),
    ]
    assert {(one["response"]["status_code"], one["response"]["body"]["status"]) for one in good} == {(200, "completed")}
    (bad,) = await results(client, done["error_file_id"])
    assert (bad["custom_id"], bad["response"]) == ("b", None)
    assert bad["error"] == {"code": "generation_failed", "message": "out of memory"}
    for file in (await client.get("/v1/files", params={"purpose": "batch_output"})).json()["data"]:
        assert file["bytes"] > 0
        assert file["expires_at"] == file["created_at"] + 7200
    assert_envelope(await client.post(f"/v1/batches/{batch['id']}/cancel"), 409, "batch_id")


async def test_a_worker_that_died_while_queueing_is_followed_up(service: Service, client: httpx.AsyncClient) -> None:
    batch = await started(client, [line(str(n)) for n in range(5)])
    claimed = await service.storage.batches.claim()
    assert claimed is not None
    file = await service.storage.files.get(claimed.input_file_id)
    assert file is not None
    service.batch_worker._queue(claimed, file)  # and then it is killed
    assert not await service.batch_worker.work(), "the dead worker still has it"
    await service.storage.batches.put_back(batch["id"], 0)
    await service.batch_worker.work()
    assert service.created() == 5
    assert (await now(client, batch))["request_counts"]["total"] == 5


@pytest.mark.parametrize("when", ["validating", "in_progress"])
async def test_a_cancelled_batch_keeps_what_was_made(service: Service, client: httpx.AsyncClient, when: str) -> None:
    batch = await started(client, [line("a"), line("b"), line("c")])
    if when == "in_progress":
        await service.batch_worker.work()
        first = (await client.get("/v1/videos", params={"order": "asc"})).json()["data"][0]["id"]
        await service.completed(first, video_mp4=b"abc")
        running = await service.claimed()
    cancelling = await client.post(f"/v1/batches/{batch['id']}/cancel")
    assert (cancelling.status_code, cancelling.json()["status"]) == (200, "cancelling")
    await service.batch_worker.work()
    if when == "in_progress":
        assert (await now(client, batch))["status"] == "cancelling", "one is still running"
        assert (await service.store.heartbeat(running.id, running.fence, 60)).cancel_requested
        await service.store.fail(running.id, running.fence, "cancelled", "The video was cancelled.")
        await service.batch_worker.work()
    done = await now(client, batch)
    assert done["status"] == "cancelled"
    assert await service.store.claim("runner", 60) is None
    if when == "in_progress":
        assert [one["custom_id"] for one in await results(client, done["output_file_id"])] == ["a"]
        failed = await results(client, done["error_file_id"])
        assert [(one["custom_id"], one["error"]["code"]) for one in failed] == [("b", "cancelled"), ("c", "cancelled")]
    else:
        assert service.created() == 0


async def test_a_batch_expires_with_its_window(
    service: Service, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = await started(client, [line("a"), line("b")], completion_window="1h")
    await service.batch_worker.work()
    first = (await client.get("/v1/videos", params={"order": "asc"})).json()["data"][0]["id"]
    await service.completed(first, video_mp4=b"abc")
    later = service.storage.batches.clock() + 3601
    monkeypatch.setattr(service.storage.batches, "clock", lambda: later)
    await service.batch_worker.work()
    done = await now(client, batch)
    assert (done["status"], done["request_counts"]) == ("expired", {"total": 2, "completed": 1, "failed": 1})
    (bad,) = await results(client, done["error_file_id"])
    assert (bad["custom_id"], bad["error"]["code"]) == ("b", "batch_expired")


async def test_batches_are_listed(client: httpx.AsyncClient) -> None:
    ids = [(await started(client, [line("a")]))["id"] for _ in range(3)]
    page = (await client.get("/v1/batches", params={"limit": 2})).json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == ([ids[2], ids[1]], True)
    page = (await client.get("/v1/batches", params={"after": page["last_id"]})).json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == ([ids[0]], False)
    assert_envelope(await client.get("/v1/batches", params={"after": "x"}), 400, "after")
    assert_envelope(await client.get("/v1/batches/batch_" + "0" * 32), 404, "batch_id")
