"""The store: a video is run by one runner at a time, is never lost, and is never tried without end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from serving.jobs.store import (
    MAX_LAPSES,
    Idempotency,
    IdempotencyConflict,
    SqlVideoStore,
    StaleFence,
    Video,
    VideoNotFound,
    VideoStatus,
    new_video_id,
)
from serving.jobs.video import BATCH


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def make_video(**changes: Any) -> Video:
    values: dict[str, Any] = {"id": new_video_id(), "model": "mini", "prompt": "a red ball", "seconds": "2"}
    return Video(**values | {"size": "128x128", "request": {"seed": 1, "negative_prompt": ""}} | changes)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(database_url: str, clock: Clock) -> Iterator[SqlVideoStore]:
    opened = SqlVideoStore(database_url, clock=clock, retention_seconds=500.0)
    yield opened
    opened.dispose()


async def claimed(store: SqlVideoStore, runner: str = "runner", lease_seconds: float = 30) -> Video:
    video = await store.claim(runner, lease_seconds)
    assert video is not None
    return video


async def test_a_video_from_queued_to_completed(store: SqlVideoStore, clock: Clock, database_url: str) -> None:
    created = await store.create(make_video())
    assert (created.status, created.created_at) == (VideoStatus.QUEUED, 1000.0)
    assert await store.get(created.id) == created
    clock.now = 1001.0
    running = await claimed(store, lease_seconds=30)
    assert (running.id, running.status, running.attempt, running.fence) == (created.id, VideoStatus.IN_PROGRESS, 1, 1)
    assert (running.runner_id, running.lease_until) == ("runner", 1031.0)
    assert (await store.set_progress(running.id, running.fence, 40)).progress == 40
    clock.now = 1020.0
    assert (await store.heartbeat(running.id, running.fence, 30)).lease_until == 1050.0
    done = await store.complete(running.id, running.fence)
    assert (done.status, done.progress, done.completed_at) == (VideoStatus.COMPLETED, 100, 1020.0)
    assert (done.expires_at, done.lease_until, done.runner_id) == (1520.0, None, None)
    reopened = SqlVideoStore(database_url)
    assert await reopened.get(created.id) == done
    reopened.dispose()


async def test_the_oldest_video_is_claimed_first(store: SqlVideoStore, clock: Clock) -> None:
    videos = []
    for now in (1002.0, 1000.0, 1001.0):
        clock.now = now
        videos.append(await store.create(make_video()))
    clock.now = 1003.0
    assert [(await claimed(store)).id for _ in videos] == [videos[1].id, videos[2].id, videos[0].id]
    assert await store.claim("runner", 30) is None


async def test_a_claim_can_leave_batches_where_they_are(store: SqlVideoStore, clock: Clock) -> None:
    lapsed = await store.create(make_video(priority=BATCH))
    await claimed(store, lease_seconds=30)
    clock.now += 31
    queued = await store.create(make_video(priority=BATCH))
    asked = await store.create(make_video())
    watched = await store.claim("runner", 30, below=BATCH)
    assert watched is not None
    assert watched.id == asked.id
    assert await store.claim("runner", 30, below=BATCH) is None
    assert [(await claimed(store)).id for _ in range(2)] == [lapsed.id, queued.id]


async def test_a_lapsed_lease_passes_the_video_on_and_shuts_the_old_runner_out(
    store: SqlVideoStore, clock: Clock
) -> None:
    await store.create(make_video())
    old = await claimed(store, "old", lease_seconds=30)
    await store.create(make_video())
    clock.now = 1030.0
    assert (await claimed(store, "other")).id != old.id
    clock.now = 1030.5
    new = await claimed(store, "new")
    assert (new.id, new.attempt, new.fence, new.runner_id) == (old.id, 2, 2, "new")
    writes: list[Coroutine[Any, Any, Video]] = [
        store.heartbeat(old.id, old.fence, 30),
        store.set_progress(old.id, old.fence, 99),
        store.complete(old.id, old.fence),
        store.fail(old.id, old.fence, "code", "message"),
        store.requeue(old.id, old.fence),
    ]
    for write in writes:
        with pytest.raises(StaleFence):
            await write
    assert await store.get(new.id) == new


async def test_a_runner_that_is_late_but_not_replaced_may_go_on(store: SqlVideoStore, clock: Clock) -> None:
    await store.create(make_video())
    video = await claimed(store, lease_seconds=30)
    clock.now = 1100.0
    assert (await store.heartbeat(video.id, video.fence, 30)).lease_until == 1130.0
    assert await store.claim("other", 30) is None


async def test_a_video_that_has_ended_can_not_be_written(store: SqlVideoStore) -> None:
    await store.create(make_video())
    video = await claimed(store)
    await store.complete(video.id, video.fence)
    with pytest.raises(StaleFence, match="completed"):
        await store.fail(video.id, video.fence, "code", "message")


async def test_attempts_are_bounded_when_runners_die(store: SqlVideoStore, clock: Clock) -> None:
    """By more than when they fail: a runner takes down everything that it has in hand."""
    created = await store.create(make_video())
    for attempt in range(1, MAX_LAPSES + 1):
        video = await claimed(store, lease_seconds=30)
        assert (video.attempt, video.lapses) == (attempt, attempt - 1)
        clock.now += 31
    assert await store.claim("runner", 30) is None
    failed = await store.get(created.id)
    assert failed is not None
    assert (failed.status, failed.error_code, failed.completed_at) == ("failed", "attempts_exhausted", clock.now)


async def test_failures_count_among_dying_runners(store: SqlVideoStore, clock: Clock) -> None:
    await store.create(make_video())
    for _ in range(2):
        video = await claimed(store, lease_seconds=30)
        clock.now += 31
        video = await claimed(store)
        await store.requeue(video.id, video.fence)
    video = await claimed(store)
    assert (video.attempt, video.lapses) == (5, 2)
    assert (await store.requeue(video.id, video.fence)).error_code == "attempts_exhausted"


async def test_headway_gives_a_video_its_attempts_back(store: SqlVideoStore, clock: Clock) -> None:
    await store.create(make_video())
    for _ in range(2 * MAX_LAPSES):
        video = await claimed(store, lease_seconds=30)
        assert video.attempt <= 2
        told = await store.set_progress(video.id, video.fence, 10, headway=True)
        assert (told.attempt, told.lapses, told.fence) == (1, 0, video.fence)
        clock.now += 31
    for attempt in (2, 3):
        video = await claimed(store)
        assert video.attempt - video.lapses == attempt - 1
        await store.set_progress(video.id, video.fence, 20)
        await store.requeue(video.id, video.fence)


async def test_attempts_are_bounded_when_runners_give_up(store: SqlVideoStore) -> None:
    await store.create(make_video())
    for _ in range(2):
        video = await claimed(store)
        assert (await store.requeue(video.id, video.fence)).status is VideoStatus.QUEUED
    video = await claimed(store)
    failed = await store.requeue(video.id, video.fence)
    assert (failed.status, failed.error_code) == (VideoStatus.FAILED, "attempts_exhausted")


async def test_draining_costs_no_attempt_but_a_fence(store: SqlVideoStore) -> None:
    await store.create(make_video())
    for fence in range(1, 6):
        video = await claimed(store)
        assert (video.attempt, video.fence) == (1, fence)
        await store.requeue(video.id, video.fence, count_attempt=False)


async def test_an_exhausted_video_does_not_hide_the_next_one(store: SqlVideoStore, clock: Clock) -> None:
    await store.create(make_video())
    for _ in range(MAX_LAPSES):
        await claimed(store, lease_seconds=30)
        clock.now += 31
    waiting = await store.create(make_video())
    assert (await claimed(store)).id == waiting.id


async def test_a_queued_video_is_cancelled_at_once(store: SqlVideoStore) -> None:
    created = await store.create(make_video())
    cancelled = await store.request_cancel(created.id)
    assert (cancelled.status, cancelled.error_code) == (VideoStatus.FAILED, "cancelled")
    assert await store.get(created.id) == cancelled
    assert await store.claim("runner", 30) is None
    assert await store.request_cancel(created.id) == cancelled


async def test_a_running_video_tells_its_runner_that_it_is_cancelled(store: SqlVideoStore) -> None:
    await store.create(make_video())
    video = await claimed(store)
    assert (await store.request_cancel(video.id)).status is VideoStatus.IN_PROGRESS
    assert (await store.heartbeat(video.id, video.fence, 30)).cancel_requested
    assert (await store.set_progress(video.id, video.fence, 50)).cancel_requested
    failed = await store.fail(video.id, video.fence, "cancelled", "The video was cancelled.")
    assert (failed.status, failed.error_code) == (VideoStatus.FAILED, "cancelled")


@pytest.mark.parametrize("given_back", [True, False])
async def test_a_cancelled_video_whose_runner_is_gone_is_not_run_again(
    store: SqlVideoStore, clock: Clock, given_back: bool
) -> None:
    await store.create(make_video())
    video = await claimed(store, lease_seconds=30)
    await store.request_cancel(video.id)
    if given_back:
        await store.requeue(video.id, video.fence)
    clock.now += 31
    assert await store.claim("runner", 30) is None
    failed = await store.get(video.id)
    assert failed is not None
    assert (failed.status, failed.error_code) == (VideoStatus.FAILED, "cancelled")


async def test_a_video_that_is_not_there(store: SqlVideoStore) -> None:
    missing = new_video_id()
    assert await store.get(missing) is None
    writes: list[Callable[[], Coroutine[Any, Any, Video]]] = [
        lambda: store.request_cancel(missing),
        lambda: store.heartbeat(missing, 1, 30),
        lambda: store.complete(missing, 1),
    ]
    for write in writes:
        with pytest.raises(VideoNotFound):
            await write()


async def test_a_batch_waits_for_interactive_work(store: SqlVideoStore, clock: Clock) -> None:
    batch = await store.create(make_video(priority=BATCH))
    clock.now += 1
    interactive = await store.create(make_video())
    assert [(await claimed(store)).id for _ in range(2)] == [interactive.id, batch.id]


async def test_lists_go_page_by_page_both_ways(store: SqlVideoStore) -> None:
    ids = [(await store.create(make_video(owner="a" if n % 2 else "b"))).id for n in range(7)]
    assert ids == sorted(ids)

    async def pages(**asked: Any) -> list[list[str]]:
        seen: list[list[str]] = []
        after = None
        while True:
            page = await store.list(after=after, **asked)
            seen.append([video.id for video in page.videos])
            if not page.has_more:
                return seen
            after = page.videos[-1].id

    assert await pages(limit=3) == [ids[:3:-1], ids[3:0:-1], ids[:1]]
    assert await pages(limit=7, order="asc") == [ids]
    assert await pages(limit=2, order="asc", owner="a") == [[ids[1], ids[3]], [ids[5]]]
    assert await pages(owner="nobody") == [[]]
    page = await store.list(limit=0)
    assert (page.videos, page.has_more) == ([], True)


async def test_a_list_may_be_read_by_deleting_what_it_shows(store: SqlVideoStore) -> None:
    ids = [(await store.create(make_video())).id for _ in range(5)]
    after, seen = None, []
    while (page := await store.list(limit=2, order="asc", after=after)).videos:
        for video in page.videos:
            seen.append(video.id)
            await store.delete(video.id)
            await store.remove(video.id)
            after = video.id
    assert seen == ids


async def test_a_key_makes_a_request_count_once(store: SqlVideoStore, clock: Clock) -> None:
    asked = Idempotency("retry-1", "digest")
    first = await store.create(make_video(), asked)
    assert await store.create(make_video(), asked) == first
    with pytest.raises(IdempotencyConflict):
        await store.create(make_video(), Idempotency("retry-1", "other"))
    other = await store.create(make_video(owner="key_1"), asked)
    assert other.id != first.id
    clock.now += 86401
    again = await store.create(make_video(), Idempotency("retry-1", "other"))
    assert again.id not in (first.id, other.id)
    assert len((await store.list()).videos) == 3


async def test_requests_with_one_key_at_once_count_once(store: SqlVideoStore) -> None:
    asked = Idempotency("retry-1", "digest")
    created = await asyncio.gather(*(store.create(make_video(), asked) for _ in range(8)))
    assert len({video.id for video in created}) == 1
    assert len((await store.list()).videos) == 1


async def test_a_deleted_queued_video_is_cancelled_hidden_and_then_forgotten(
    store: SqlVideoStore, clock: Clock
) -> None:
    asked = Idempotency("retry-1", "digest")
    created = await store.create(make_video(), asked)
    deleted = await store.delete(created.id)
    assert (deleted.status, deleted.error_code, deleted.deleted_at) == (VideoStatus.FAILED, "cancelled", 1000.0)
    assert await store.claim("runner", 30) is None
    assert (await store.list()).videos == []
    assert (await store.create(make_video(), asked)).id != created.id
    await store.remove(created.id)
    assert await store.get(created.id) is None


async def test_a_deleted_running_video_is_swept_away_after_its_runner_has_let_go(
    store: SqlVideoStore, clock: Clock
) -> None:
    await store.create(make_video())
    video = await claimed(store, lease_seconds=1000)
    await store.delete(video.id)
    assert (await store.heartbeat(video.id, video.fence, 1000)).cancel_requested
    clock.now += 100
    assert await store.expired(10) == []
    await store.remove(video.id)
    assert await store.get(video.id) is not None, "a runner still has it"
    await store.fail(video.id, video.fence, "cancelled", "The video was cancelled.")
    assert await store.expired(10) == []
    clock.now += 61
    assert [swept.id for swept in await store.expired(10)] == [video.id]


async def test_what_has_ended_expires(store: SqlVideoStore, clock: Clock) -> None:
    for code in (None, "generation_failed"):
        await store.create(make_video())
        video = await claimed(store)
        await (store.fail(video.id, video.fence, code, "") if code else store.complete(video.id, video.fence))
        clock.now += 10
    await store.create(make_video())
    clock.now = 1000.0 + 499
    assert await store.expired(10) == []
    clock.now = 1000.0 + 500
    assert [video.status for video in await store.expired(10)] == ["completed"]
    clock.now = 1000.0 + 5000
    assert [video.status for video in await store.expired(10)] == ["completed", "failed"]
    assert len(await store.expired(1)) == 1


async def test_any_message_can_be_kept(store: SqlVideoStore) -> None:
    await store.create(make_video())
    video = await claimed(store)
    failed = await store.fail(video.id, video.fence, "generation_failed", "nul \0, quote ' and \N{SNOWMAN}")
    assert await store.get(video.id) == replace(
        failed, error_message="nul \N{REPLACEMENT CHARACTER}, quote ' and \N{SNOWMAN}"
    )
