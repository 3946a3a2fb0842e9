"""Webhooks: what is told, how it is signed, what happens when nobody listens, and who is never called."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from receiver import SECRET, Receiver

from serving.api.creation import WebhookPolicy
from serving.api.errors import ApiError
from serving.deployments.courier import Courier
from serving.jobs.batches import Batch, BatchStatus, BatchStore, new_batch_id
from serving.jobs.database import Database
from serving.jobs.outbox import Outbox
from serving.jobs.store import SqlVideoStore, Video, new_video_id
from serving.jobs.targets import BadTarget, resolve


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Office:
    """A store, its outbox, and a courier that may call this machine."""

    def __init__(self, database_url: str, *, allow_private: bool = True) -> None:
        self.clock = Clock()
        self.database = Database.open(database_url)
        self.videos = SqlVideoStore(self.database, clock=self.clock)
        self.batches = BatchStore(self.database, self.videos, clock=self.clock)
        self.outbox = Outbox(self.database, clock=self.clock)
        self.courier = Courier(
            self.outbox, SECRET, allow_private=allow_private, timeout_seconds=30, give_up_seconds=600
        )

    async def running(self, url: str | None) -> Video:
        await self.videos.create(
            Video(id=new_video_id(), model="mini", prompt="a ball", seconds="2", size="128x128", webhook_url=url)
        )
        video = await self.videos.claim("runner", 60)
        assert video is not None
        return video


@pytest.fixture
def office(database_url: str) -> Iterator[Office]:
    opened = Office(database_url)
    yield opened
    opened.database.dispose()


def unwrapped(received: tuple[dict[str, str], bytes]) -> Any:
    """As the openai SDK's users do it. Raises for a wrong signature."""
    headers, body = received
    with openai.OpenAI(api_key="unused", webhook_secret=SECRET) as sdk:
        return sdk.webhooks.unwrap(body, headers)


async def test_a_completed_video_is_told_of_once_and_signed(office: Office, receiver: Receiver) -> None:
    video = await office.running(receiver.url)
    assert not await office.courier.deliver(), "there is nothing to tell yet"
    await office.videos.complete(video.id, video.fence)
    assert await office.courier.deliver()
    assert not await office.courier.deliver()
    ((headers, body),) = receiver.received
    event = unwrapped((headers, body))
    assert (event.type, event.data.id, event.created_at) == ("video.completed", video.id, 1000)
    assert (headers["webhook-id"], headers["host"]) == (event.id, receiver.url.split("/")[2])
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrapped((headers, body.replace(b"completed", b"failed")))


async def test_every_end_is_told_and_only_to_those_who_asked(office: Office, receiver: Receiver) -> None:
    failed = await office.running(receiver.url)
    await office.videos.fail(failed.id, failed.fence, "generation_failed", "out of memory")
    queued = new_video_id()
    await office.videos.create(
        Video(id=queued, model="mini", prompt="a", seconds="2", size="128x128", webhook_url=receiver.url)
    )
    await office.videos.request_cancel(queued)
    silent = await office.running(None)
    await office.videos.complete(silent.id, silent.fence)
    for status in (BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.EXPIRED, BatchStatus.CANCELLED):
        batch = Batch(new_batch_id(), None, "/v1/videos", "file-1", "24h", 1000.0, 2000.0, webhook_url=receiver.url)
        await office.batches.create(batch)
        await office.batches.change(batch.id, (BatchStatus.VALIDATING,), status=status)
        assert await office.batches.change(batch.id, (BatchStatus.VALIDATING,), status=status) is None
    while await office.courier.deliver():
        pass
    told = [json.loads(body) for _, body in receiver.received]
    assert sorted(event["type"] for event in told) == [
        "batch.cancelled",
        "batch.completed",
        "batch.expired",
        "batch.failed",
        "video.failed",
        "video.failed",
    ]
    assert {event["data"]["id"] for event in told if event["type"] == "video.failed"} == {failed.id, queued}
    assert unwrapped(receiver.received[-1]).object == "event"


async def test_a_target_that_fails_is_tried_again_less_and_less_often(office: Office, receiver: Receiver) -> None:
    video = await office.running(receiver.url)
    await office.videos.complete(video.id, video.fence)
    receiver.answers = [(500, {}), (302, {"Location": receiver.url}), (429, {})]
    for pause in (5, 20, 80):
        assert await office.courier.deliver()
        assert not await office.courier.deliver()
        office.clock.now += pause - 1
        assert not await office.courier.deliver()
        office.clock.now += 1
    assert await office.courier.deliver()
    assert len({(headers["webhook-id"], body) for headers, body in receiver.received}) == 1
    assert len(receiver.received) == 4
    office.clock.now += 5000
    assert not await office.courier.deliver()


async def test_a_target_that_is_gone_is_given_up(office: Office, receiver: Receiver) -> None:
    video = await office.running("http://localhost:9/hook")
    await office.videos.complete(video.id, video.fence)
    attempts = 0
    while attempts < 50:
        attempts += await office.courier.deliver()
        office.clock.now += 50
        if office.clock.now > 5000:
            break
    assert 3 <= attempts <= 6


async def test_a_courier_that_dies_leaves_its_delivery_to_the_next(office: Office, receiver: Receiver) -> None:
    video = await office.running(receiver.url)
    await office.videos.complete(video.id, video.fence)
    assert await office.outbox.claim() is not None
    assert not await office.courier.deliver()
    office.clock.now += 121
    assert await office.courier.deliver()
    assert len(receiver.received) == 1


async def test_couriers_share_an_outbox(office: Office, receiver: Receiver) -> None:
    for _ in range(12):
        video = await office.running(receiver.url)
        await office.videos.complete(video.id, video.fence)
    await asyncio.gather(*(office.courier.deliver() for _ in range(14)))
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == len(receiver.received) == 12


async def test_a_private_address_is_not_called(database_url: str, receiver: Receiver) -> None:
    """By a name, which a request's check lets through."""
    office = Office(database_url, allow_private=False)
    video = await office.running(receiver.url)
    await office.videos.complete(video.id, video.fence)
    assert await office.courier.deliver()
    assert receiver.received == []
    office.clock.now += 5000
    assert not await office.courier.deliver()
    office.database.dispose()


REFUSED = [
    "http://127.0.0.1/",
    "http://10.1.2.3:8080/x",
    "http://192.168.0.1/",
    "http://169.254.169.254/latest/meta-data",
    "http://100.64.0.1/",
    "http://0.0.0.0/",
    "http://224.0.0.1/",
    "http://[::1]/",
    "http://[::]/",
    "http://[fd00::1]/",
    "http://[fe80::1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[2002:7f00:1::]/",
    "ftp://example.com/",
    "file:///etc/passwd",
    "example.com/hook",
    "http://",
    "http://user:password@example.com/",
    "http://example.com:99999/",
    "http://example.com:0/",
    "http://example.com/a b",
    "http://example.com/\r\nHost: x",
    "http://example.com/" + "x" * 3000,
]


@pytest.mark.parametrize("url", REFUSED, ids=lambda url: url[:40])
def test_requests_that_name_such_a_target_are_refused(url: str) -> None:
    with pytest.raises(ApiError) as refused:
        WebhookPolicy(enabled=True).checked(url)
    assert (refused.value.status, refused.value.param) == (400, "webhook_url")


@pytest.mark.parametrize("url", ["http://2130706433/", "http://0x7f.1/", "http://localhost/", "http://127.1/"])
async def test_other_spellings_of_this_machine_are_seen_through(url: str) -> None:
    with pytest.raises((BadTarget, OSError)):
        await resolve(url, allow_private=False)


def test_other_targets_are_accepted_where_webhooks_are_on() -> None:
    url = "https://93.184.216.34:8443/hook?x=1"
    assert WebhookPolicy(enabled=True).checked(url) == url
    assert WebhookPolicy().checked(None) is None
    with pytest.raises(ApiError, match="no webhook secret"):
        WebhookPolicy().checked(url)
