"""The store: a video is run by one runner at a time, is never lost, and is never tried without end."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from serving.jobs.store import SqlVideoStore, StaleFence, Video, VideoNotFound, VideoStatus, new_video_id

SPAWN = multiprocessing.get_context("spawn")


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def make_video(**changes: Any) -> Video:
    values: dict[str, Any] = {"id": new_video_id(), "model": "mini", "prompt": "a red ball", "seconds": "2"}
    return Video(**values | {"size": "128x128", "request": {"seed": 1, "negative_prompt": ""}} | changes)


def url(directory: Path) -> str:
    return f"sqlite:///{directory / 'videos.db'}"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[SqlVideoStore]:
    opened = SqlVideoStore(url(tmp_path), clock=clock)
    yield opened
    opened.dispose()


async def claimed(store: SqlVideoStore, runner: str = "runner", lease_seconds: float = 30) -> Video:
    video = await store.claim(runner, lease_seconds)
    assert video is not None
    return video


async def test_a_video_from_queued_to_completed(store: SqlVideoStore, clock: Clock, tmp_path: Path) -> None:
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
    done = await store.complete(running.id, running.fence, expires_at=5000.0)
    assert (done.status, done.progress, done.completed_at) == (VideoStatus.COMPLETED, 100, 1020.0)
    assert (done.expires_at, done.lease_until, done.runner_id) == (5000.0, None, None)
    reopened = SqlVideoStore(url(tmp_path))
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
    created = await store.create(make_video())
    for attempt in (1, 2, 3):
        assert (await claimed(store, lease_seconds=30)).attempt == attempt
        clock.now += 31
    assert await store.claim("runner", 30) is None
    failed = await store.get(created.id)
    assert failed is not None
    assert (failed.status, failed.error_code, failed.completed_at) == ("failed", "attempts_exhausted", clock.now)


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
    for _ in range(3):
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


async def test_claims_look_only_at_the_row_they_take(store: SqlVideoStore, clock: Clock) -> None:
    statements: list[tuple[str, Any]] = []
    event.listen(store._engine, "before_cursor_execute", lambda *call: statements.append((call[2], call[3])))
    await store.create(make_video())
    await claimed(store)
    selects = [statement for statement in statements if statement[0].startswith("SELECT videos")]
    assert len(selects) == 2
    with store._engine.connect() as connection:
        for statement, parameters in selects:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            steps = [row[3] for row in plan]
            assert len(steps) == 1, steps
            assert steps[0].startswith("SEARCH videos USING INDEX"), steps


async def test_sqlite_keeps_what_was_committed_even_if_the_power_fails(store: SqlVideoStore) -> None:
    with store._engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar_one() == 2


def _claim_together(directory: Path, together: Any, results: Any, rounds: int) -> None:
    """Claim and complete `rounds` times, each time at once with the other processes."""

    async def run() -> list[str | None]:
        store = SqlVideoStore(url(directory))
        mine: list[str | None] = []
        for _ in range(rounds):
            together.wait()
            video = await store.claim("runner", 60)
            mine.append(video and video.id)
            if video is not None:
                await store.set_progress(video.id, video.fence, 50)
                await store.complete(video.id, video.fence)
        store.dispose()
        return mine

    results.put(asyncio.run(run()))


def _open_together(directory: Path, together: Any, results: Any, rounds: int) -> None:
    """Open `rounds` new databases, each at once with the other processes."""
    for index in range(rounds):
        (directory / str(index)).mkdir(exist_ok=True)
        together.wait()
        SqlVideoStore(url(directory / str(index))).dispose()
    results.put([rounds])


async def _in_processes(count: int, target: Callable[..., None], directory: Path, rounds: int) -> list[Any]:
    """What `count` processes that run `target` at once put into their results, one after another."""
    together, results = SPAWN.Barrier(count, timeout=20), SPAWN.Queue()
    running = [SPAWN.Process(target=target, args=(directory, together, results, rounds)) for _ in range(count)]
    for process in running:
        process.start()
    # Joined first, and so few results that they fit into the pipe: a process that dies is seen at once.
    for process in running:
        await asyncio.to_thread(process.join)
    assert [process.exitcode for process in running] == [0] * count
    return [result for _ in running for result in results.get(timeout=10)]


async def test_processes_that_claim_at_once_never_get_the_same_video(tmp_path: Path) -> None:
    store = SqlVideoStore(url(tmp_path))
    created = [(await store.create(make_video())).id for _ in range(45)]
    claims = await _in_processes(3, _claim_together, tmp_path, rounds=15)
    assert sorted(claims, key=str) == sorted(created)
    for video_id in created:
        video = await store.get(video_id)
        assert video is not None
        assert (video.status, video.attempt) == (VideoStatus.COMPLETED, 1)
    store.dispose()


async def test_processes_may_open_a_new_database_at_once(tmp_path: Path) -> None:
    assert await _in_processes(4, _open_together, tmp_path, rounds=40) == [40] * 4


async def test_tasks_of_one_process_that_claim_at_once_never_get_the_same_video(store: SqlVideoStore) -> None:
    for _ in range(20):
        await store.create(make_video())
    claims = await asyncio.gather(*(store.claim(f"runner-{n}", 30) for n in range(25)))
    ids = [video.id for video in claims if video is not None]
    assert len(ids) == len(set(ids)) == 20
