"""API keys: who gets in, what each sees, and how much it may ask for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from receiver import SECRET
from service import Service, assert_envelope
from sqlalchemy import text
from typer.testing import CliRunner

from models.bundle import Bundle
from serving.cli import app
from serving.config import ServiceConfig
from serving.jobs.batches import Batch, BatchStatus, BatchStore, new_batch_id
from serving.jobs.database import Database
from serving.jobs.keys import KeyStore, LimitReached
from serving.jobs.live import LEASE_SECONDS, LiveSessions
from serving.jobs.outbox import Outbox
from serving.jobs.store import Idempotency, SqlVideoStore, Video, VideoStatus, new_video_id
from serving.jobs.video import BATCH


@pytest.fixture
def service(tiny_bundle: Bundle, tmp_path: Path) -> Service:
    return Service(tiny_bundle, tmp_path, require_keys=True)


@pytest.fixture
async def opened(service: Service) -> AsyncIterator[Callable[[str | None], httpx.AsyncClient]]:
    clients: list[httpx.AsyncClient] = []

    def open_as(secret: str | None) -> httpx.AsyncClient:
        headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        transport = httpx.ASGITransport(service.api, raise_app_exceptions=False)
        clients.append(httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers))
        return clients[-1]

    yield open_as
    for client in clients:
        await client.aclose()


async def test_only_a_valid_key_gets_in(service: Service, opened: Any) -> None:
    key, secret = service.storage.keys.create("dailies")
    paths = ["/v1/videos", "/v1/models", "/v1/files", "/v1/batches", "/v1/videos/characters/x", "/v1/models/tiny"]
    for wrong in (None, "", "wrong", secret + "x", key.id):
        for path in paths:
            response = await opened(wrong).get(path)
            assert_envelope(response, 401, None)
            assert response.headers["www-authenticate"] == "Bearer"
    assert_envelope(await opened(None).post("/v1/videos", json={"prompt": "a ball"}), 401, None)
    assert service.created() == 0
    assert (await opened(None).get("/health")).status_code == 200
    client = opened(secret)
    assert (await client.post("/v1/videos", json={"prompt": "a ball"})).status_code == 200
    assert service.storage.keys.revoke(key.id)
    assert_envelope(await client.get("/v1/videos"), 401, None)


async def test_one_key_never_sees_anothers(service: Service, opened: Any) -> None:
    mine, yours = (opened(service.storage.keys.create(name)[1]) for name in ("mine", "yours"))
    video = (await mine.post("/v1/videos", json={"prompt": "a ball"})).json()["id"]
    await service.completed(video, video_mp4=b"abc")
    line = {"custom_id": "a", "method": "POST", "url": "/v1/videos", "body": {"prompt": "a ball", "seconds": 1}}
    upload = {"file": ("in.jsonl", json.dumps(line).encode())}
    file = (await mine.post("/v1/files", files=upload, data={"purpose": "batch"})).json()["id"]
    asked = {"input_file_id": file, "endpoint": "/v1/videos", "completion_window": "24h"}
    batch = (await mine.post("/v1/batches", json=asked)).json()["id"]
    await service.batch_worker.work()
    inner = (await mine.get("/v1/videos")).json()["first_id"]
    await service.completed(inner, video_mp4=b"abc")
    await service.batch_worker.work()
    output = (await mine.get(f"/v1/batches/{batch}")).json()["output_file_id"]

    hidden = [
        ("GET", f"/v1/videos/{video}"),
        ("GET", f"/v1/videos/{inner}"),
        ("GET", f"/v1/videos/{video}/content"),
        ("HEAD", f"/v1/videos/{video}/content"),
        ("POST", f"/v1/videos/{video}/cancel"),
        ("DELETE", f"/v1/videos/{video}"),
        ("GET", f"/v1/files/{file}"),
        ("GET", f"/v1/files/{output}/content"),
        ("DELETE", f"/v1/files/{file}"),
        ("GET", f"/v1/batches/{batch}"),
        ("POST", f"/v1/batches/{batch}/cancel"),
    ]
    for method, path in hidden:
        assert (await yours.request(method, path)).status_code == 404, (method, path)
    assert (await yours.post("/v1/batches", json=asked)).status_code == 404
    for path, count in (("/v1/videos", 2), ("/v1/files", 2), ("/v1/batches", 1)):
        assert (await yours.get(path)).json()["data"] == []
        assert len((await mine.get(path)).json()["data"]) == count
    assert (await mine.get(f"/v1/videos/{inner}/content")).content == b"abc"


async def test_limits_are_said_with_when_to_come_back(service: Service, opened: Any) -> None:
    client = opened(service.storage.keys.create("dailies", max_unfinished=2)[1])
    other = opened(service.storage.keys.create("others")[1])
    ids = [(await client.post("/v1/videos", json={"prompt": f"ball {n}"})).json()["id"] for n in range(2)]
    refused = await client.post("/v1/videos", json={"prompt": "ball 3"})
    assert_envelope(refused, 429, None)
    assert int(refused.headers["retry-after"]) >= 1
    assert (await other.post("/v1/videos", json={"prompt": "ball 3"})).status_code == 200
    await client.post(f"/v1/videos/{ids[0]}/cancel")
    assert (await client.post("/v1/videos", json={"prompt": "ball 3"})).status_code == 200


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database.open(database_url)
    yield opened
    opened.dispose()


async def test_the_rate_of_a_key_is_limited(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("time.time_ns", lambda: int(clock.now * 1e9))  # what ids are made of
    keys, store = KeyStore(database, clock=clock), SqlVideoStore(database, clock=clock)
    key, _ = keys.create("dailies", max_per_minute=2)

    async def ask(idempotency: Idempotency | None = None) -> Video:
        video = Video(id=new_video_id(), model="mini", prompt="a", seconds="2", size="128x128", owner=key.id)
        return await store.create(video, idempotency)

    await ask()
    clock.now += 20
    retried = Idempotency("retry", "digest")
    second = await ask(retried)
    clock.now += 10
    with pytest.raises(LimitReached) as limited:
        await ask()
    assert limited.value.retry_seconds == pytest.approx(30)
    assert await ask(retried) == second, "a retry asks for nothing more"
    clock.now += 30.5
    await ask()
    with pytest.raises(LimitReached):
        await ask()


def video_of(owner: str | None, **changes: Any) -> Video:
    return Video(new_video_id(), "mini", "a ball", "2", "128x128", owner=owner, **changes)


async def claim_all(store: SqlVideoStore) -> list[Video]:
    claimed = []
    while (video := await store.claim("runner", 60)) is not None:
        claimed.append(video)
    return claimed


async def test_only_so_many_of_a_key_run_at_a_time(database: Database) -> None:
    key, _ = KeyStore(database).create("dailies", max_running=2)
    store = SqlVideoStore(database)
    mine = [(await store.create(video_of(key.id))).id for _ in range(5)]
    other = (await store.create(video_of(None))).id
    running = await claim_all(store)
    assert [video.id for video in running] == [*mine[:2], other], "the rest waits, and stands in nobody's way"
    await store.complete(running[0].id, running[0].fence)
    assert [video.id for video in await claim_all(store)] == [mine[2]]
    requeued = await store.requeue(running[1].id, running[1].fence)
    assert [video.id for video in await claim_all(store)] == [requeued.id], "it keeps its place"
    await store.request_cancel(mine[3])
    assert await claim_all(store) == []
    third = await store.get(mine[2])
    assert third is not None
    await store.fail(third.id, third.fence, "generation_failed", "out of memory")
    assert [video.id for video in await claim_all(store)] == [mine[4]]


async def test_what_matters_more_runs_first_within_a_key(database: Database) -> None:
    key, _ = KeyStore(database).create("dailies", max_running=1)
    store = SqlVideoStore(database)
    batches = BatchStore(database, store)
    lines = [video_of(key.id, priority=BATCH, batch_id="batch_1", batch_line=n) for n in range(3)]
    batches.add_videos(lines)
    batches.add_videos(lines)
    interactive = await store.create(video_of(key.id))
    (running,) = await claim_all(store)
    assert running.id == interactive.id
    for line in lines:
        await store.complete(running.id, running.fence)
        (running,) = await claim_all(store)
        assert running.id == line.id


async def test_an_open_session_takes_a_running_videos_place(database: Database) -> None:
    clock = Clock()
    key, _ = KeyStore(database).create("dailies", max_running=2)
    live, store = LiveSessions(database, clock=clock), SqlVideoStore(database, clock=clock)
    await live.open("sess_1", key.id)
    mine = [(await store.create(video_of(key.id))).id for _ in range(3)]
    (first,) = await claim_all(store)
    with pytest.raises(LimitReached, match="2 videos and sessions may run"):
        await live.open("sess_2", key.id)
    await live.close("sess_1", key.id)
    (second,) = await claim_all(store)
    assert [first.id, second.id] == mine[:2]
    for video in (first, second):
        await store.fail(video.id, video.fence, "generation_failed", "out of memory")
    for session in ("sess_2", "sess_3"):
        await live.open(session, key.id)
    assert await claim_all(store) == [], "the third could have been claimed, and waits again"
    clock.now += LEASE_SECONDS - 1
    assert await live.renew("sess_2", key.id)
    clock.now += 2
    assert await live.forget_lapsed() == 1
    assert [video.id for video in await claim_all(store)] == [mine[2]]


async def test_an_open_session_is_unfinished(database: Database) -> None:
    keys, live, store = KeyStore(database), LiveSessions(database), SqlVideoStore(database)
    key, _ = keys.create("dailies", max_unfinished=1)
    other, _ = keys.create("others")
    await live.open("sess_1", key.id)
    await live.open("sess_2", other.id)
    with pytest.raises(LimitReached):
        await store.create(video_of(key.id))
    await live.close("sess_1", key.id)
    await store.create(video_of(key.id))
    with pytest.raises(LimitReached, match="1 videos and sessions may be queued"):
        await live.open("sess_1", key.id)
    assert await live.renew("sess_2", other.id)
    keys.revoke(other.id)
    assert not await live.renew("sess_2", other.id)


async def test_many_at_once_leave_the_limit_as_it_is(database: Database) -> None:
    key, _ = KeyStore(database).create("dailies", max_running=3)
    store = SqlVideoStore(database)

    async def work() -> int:
        done = 0
        while (video := await store.claim("runner", 60)) is not None:
            assert await running() <= 3
            await store.complete(video.id, video.fence)
            done += 1
        return done

    async def running() -> int:
        page = await store.list(owner=key.id, limit=100)
        return sum(video.status is VideoStatus.IN_PROGRESS for video in page.videos)

    created = await asyncio.gather(*(store.create(video_of(key.id)) for _ in range(20)))
    cancelled = await asyncio.gather(*(store.request_cancel(video.id) for video in created[::4]))
    assert {video.status for video in cancelled} == {VideoStatus.FAILED}
    done = await asyncio.gather(*(work() for _ in range(6)))
    assert sum(done) + await work() == 15


async def test_a_key_is_told_of_every_end_of_its_own(database: Database) -> None:
    hook = "https://example.com/hook"
    key, _ = KeyStore(database).create("dailies", webhook_url=hook)
    store = SqlVideoStore(database)
    batches = BatchStore(database, store)
    video = await store.create(video_of(key.id, webhook_url="https://example.com/other"))
    same = await store.create(video_of(key.id, webhook_url=hook))
    foreign = await store.create(video_of(None))
    for one in (video, same, foreign):
        await store.request_cancel(one.id)
    batch = Batch(new_batch_id(), key.id, "/v1/videos", "file-1", "24h", 1000.0, 2000.0)
    await batches.create(batch)
    await batches.change(batch.id, (BatchStatus.VALIDATING,), status=BatchStatus.FAILED)
    outbox = Outbox(database)
    told = []
    while (delivery := await outbox.claim()) is not None:
        event = json.loads(delivery.payload)
        told.append((event["type"], event["data"]["id"], delivery.url))
    assert sorted(told) == sorted(
        [
            ("video.failed", video.id, "https://example.com/other"),
            ("video.failed", video.id, hook),
            ("video.failed", same.id, hook),
            ("batch.failed", batch.id, hook),
        ]
    )


def test_a_key_is_not_in_the_database(database: Database) -> None:
    _, secret = KeyStore(database).create("dailies")
    with database.read() as connection:
        rows = connection.execute(text("SELECT * FROM keys")).all()
    assert len(rows) == 1
    assert secret not in str(rows)


@pytest.mark.parametrize(
    ("host", "given", "required"),
    [
        ("127.0.0.1", None, False),
        ("localhost", None, False),
        ("::1", None, False),
        ("0.0.0.0", None, True),
        ("10.0.0.5", None, True),
        ("rushes.example.com", None, True),
        ("0.0.0.0", False, False),
        ("127.0.0.1", True, True),
    ],
)
def test_keys_are_required_where_others_can_come_in(host: str, given: bool | None, required: bool) -> None:
    assert ServiceConfig(host=host, require_keys=given).keys_required is required


def test_the_commands(tmp_path: Path) -> None:
    config = tmp_path / "rushes.yaml"
    config.write_text(f"data_dir: {tmp_path / 'data'}\n")

    def rushes(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["keys", *arguments, "--config", str(config)])

    secret = rushes("create", "dailies", "--per-minute", "5").stdout.strip()
    assert secret.startswith("sk-rushes-")
    (line,) = rushes("list").stdout.splitlines()
    key_id, state, name = line.split()
    assert (state, name) == ("active", "dailies")
    assert secret not in line
    assert rushes("revoke", key_id).exit_code == 0
    assert rushes("list").stdout.split()[1] == "revoked"
    assert rushes("revoke", "key_0").exit_code == 2
    refused = rushes("create", "dailies", "--webhook-url", "https://example.com/hook")
    assert (refused.exit_code, "webhooks.secret" in refused.stderr) == (2, True)
    config.write_text(f"data_dir: {tmp_path / 'data'}\nwebhooks: {{secret: {SECRET}}}\n")
    refused = rushes("create", "dailies", "--webhook-url", "http://127.0.0.1/hook")
    assert (refused.exit_code, "can't be called" in refused.stderr) == (2, True)
    limited = rushes("create", "more", "--running", "2", "--webhook-url", "https://example.com/hook")
    assert limited.exit_code == 0, limited.output
    upgraded = CliRunner().invoke(app, ["db", "upgrade", "--config", str(config)])
    assert upgraded.stdout.startswith("schema 0")
