"""The log is the truth: every fragment once, in order, for every reader, whatever died while it was written."""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import signal
import time
import tracemalloc
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from serving.jobs import fragment_log
from serving.jobs.fragment_log import FragmentLog, LogEnd, LogEntry, LogError, LogFailed, LogWriter
from serving.jobs.video import StaleFence, new_video_id

INIT = b"ftyp and moov"
SPAWN = multiprocessing.get_context("spawn")


def data(index: int) -> bytes:
    return f"fragment {index} ".encode() * (index + 1)


async def append(writer: LogWriter, index: int, content: bytes | None = None, init: bytes = INIT) -> None:
    await writer.append(index, 12 * index, 12, init, content if content is not None else data(index))


async def read(root: Path, video_id: str, from_fragment: int = 0) -> list[bytes]:
    return [part async for part in FragmentLog.open(root, video_id).follow(from_fragment)]


@pytest.fixture
def video_id() -> str:
    return new_video_id()


async def test_what_is_appended_is_read_back_in_order(tmp_path: Path, video_id: str) -> None:
    writer = await FragmentLog.create(tmp_path, video_id, fence=1)
    for index in range(3):
        await append(writer, index)
    await writer.close()
    assert await read(tmp_path, video_id) == [INIT, data(0), data(1), data(2)]
    assert await read(tmp_path, video_id, from_fragment=2) == [INIT, data(2)]
    log = FragmentLog.open(tmp_path, video_id)
    assert log.entries()[1] == LogEntry(1, 12, 12, len(data(1)), hashlib.sha256(data(1)).hexdigest())
    assert (log.init(), list(log.fragments())) == (INIT, [data(0), data(1), data(2)])
    assert log.end() == LogEnd()


async def test_a_fragment_is_seen_when_its_append_returns(tmp_path: Path, video_id: str) -> None:
    log = FragmentLog.open(tmp_path, video_id)
    assert (log.entries(), log.end()) == ([], None)
    writer = await FragmentLog.create(tmp_path, video_id, fence=1)
    follower = log.follow()
    for index in range(3):
        await append(writer, index)
        if index == 0:
            assert await anext(follower) == INIT
        assert await anext(follower) == data(index)
    await writer.close()
    with pytest.raises(StopAsyncIteration):
        await anext(follower)


async def test_readers_who_wait_at_different_places_all_see_everything_once(tmp_path: Path, video_id: str) -> None:
    readers = [asyncio.create_task(read(tmp_path, video_id, from_fragment=first)) for first in (0, 0, 3)]
    await asyncio.sleep(0)
    writer = await FragmentLog.create(tmp_path, video_id, fence=1)
    for index in range(5):
        await append(writer, index)
    await writer.close()
    everything = [data(index) for index in range(5)]
    assert await asyncio.gather(*readers) == [[INIT, *everything], [INIT, *everything], [INIT, *everything[3:]]]


async def test_out_of_order_or_changed_fragments_are_refused(tmp_path: Path, video_id: str) -> None:
    writer = await FragmentLog.create(tmp_path, video_id, fence=1)
    with pytest.raises(LogError, match="before fragment 0"):
        await append(writer, 1)
    await append(writer, 0)
    await append(writer, 1)
    with pytest.raises(LogError, match="other bytes"):
        await append(writer, 0, b"something else")
    with pytest.raises(LogError, match="init segment"):
        await append(writer, 2, init=b"another init")
    with pytest.raises(LogError, match="before fragment 2"):
        await append(writer, 3)
    await append(writer, 2)
    assert [entry.index for entry in writer.log.entries()] == [0, 1, 2]


async def test_an_attempt_that_begins_again_goes_over_what_is_there_and_on(tmp_path: Path, video_id: str) -> None:
    first = await FragmentLog.create(tmp_path, video_id, fence=1)
    await append(first, 0)
    await append(first, 1)
    before = {path.name: path.stat().st_mtime_ns for path in first.log.path.glob("*.m4s")}
    second = await FragmentLog.create(tmp_path, video_id, fence=2)
    for index in range(3):
        await append(second, index)
    await second.close()
    assert {name: (second.log.path / name).stat().st_mtime_ns for name in before} == before
    third = await FragmentLog.create(tmp_path, video_id, fence=3)
    for index in range(3):
        await append(third, index)
    await third.close()
    assert await read(tmp_path, video_id) == [INIT, data(0), data(1), data(2)]


async def test_a_stale_attempt_cannot_write(tmp_path: Path, video_id: str) -> None:
    old = await FragmentLog.create(tmp_path, video_id, fence=1)
    await append(old, 0)
    new = await FragmentLog.create(tmp_path, video_id, fence=2)
    refused: list[Coroutine[Any, Any, None]] = [
        append(old, 0),
        append(old, 1),
        old.close(),
        old.fail("code", "message"),
    ]
    for write in refused:
        with pytest.raises(StaleFence):
            await write
    with pytest.raises(StaleFence):
        await FragmentLog.create(tmp_path, video_id, fence=1)
    await append(new, 1)
    await new.close()
    assert await read(tmp_path, video_id) == [INIT, data(0), data(1)]


async def test_a_failure_reaches_readers_after_the_fragments_before_it(tmp_path: Path, video_id: str) -> None:
    writer = await FragmentLog.create(tmp_path, video_id, fence=1)
    await append(writer, 0)
    await writer.fail("engine_error", "decoder_next: out of memory\nline two " + "x" * 100_000)
    await writer.fail("engine_error", "again")
    follower = FragmentLog.open(tmp_path, video_id).follow()
    assert [await anext(follower), await anext(follower)] == [INIT, data(0)]
    with pytest.raises(LogFailed, match="out of memory") as failure:
        await anext(follower)
    assert failure.value.code == "engine_error"
    with pytest.raises(LogError, match="after the end"):
        await append(writer, 1)
    with pytest.raises(LogError, match="ended otherwise"):
        await writer.close()


async def test_a_log_that_is_whole_stays_whole(tmp_path: Path, video_id: str) -> None:
    writer = await FragmentLog.create(tmp_path, video_id, fence=1)
    await append(writer, 0)
    await writer.close()
    with pytest.raises(LogError, match="ended otherwise"):
        await writer.fail("code", "message")
    with pytest.raises(LogError, match="after the end"):
        await append(writer, 1)
    assert await read(tmp_path, video_id) == [INIT, data(0)]


async def test_a_video_that_failed_before_it_ran_ends_its_followers(tmp_path: Path, video_id: str) -> None:
    async def said() -> LogEnd | None:
        return LogEnd("cancelled", "The video was cancelled.")

    with pytest.raises(LogFailed, match="cancelled"):
        await anext(FragmentLog.open(tmp_path, video_id).follow(ask_end=said))


async def test_the_fragments_win_over_hearsay_of_the_end(tmp_path: Path, video_id: str) -> None:
    """What was written just before somebody else called it the end is still delivered."""
    writer = await FragmentLog.create(tmp_path, video_id, fence=1)

    async def said() -> LogEnd | None:
        await append(writer, 0)
        return LogEnd()

    assert [part async for part in writer.log.follow(ask_end=said)] == [INIT, data(0)]


async def test_what_a_crash_left_is_never_seen_and_cleared_away(tmp_path: Path, video_id: str) -> None:
    writer = await FragmentLog.create(tmp_path, video_id, fence=1)
    await append(writer, 0)
    directory = writer.log.path
    (directory / "00000001.m4s.tmp").write_bytes(b"half a frag")
    (directory / "00000001.m4s").write_bytes(b"whole, but its line was never written")
    index = directory / "index.jsonl"
    index.write_bytes(index.read_bytes() + b'{"index":1,"first_frame":12,"fra')
    follower = writer.log.follow()
    assert [await anext(follower), await anext(follower)] == [INIT, data(0)]

    resumed = await FragmentLog.create(tmp_path, video_id, fence=2)
    assert list(directory.glob("*.tmp")) == []
    for number in range(3):
        await append(resumed, number)
    await resumed.close()
    assert [part async for part in follower] == [data(1), data(2)]
    assert await read(tmp_path, video_id) == [INIT, data(0), data(1), data(2)]


async def test_a_write_that_fails_can_be_tried_again(
    tmp_path: Path, video_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = await FragmentLog.create(tmp_path, video_id, fence=1)
    await append(writer, 0)
    whole_write = os.write
    monkeypatch.setattr(fragment_log.os, "write", lambda fd, line: whole_write(fd, line[:20]))
    with pytest.raises(OSError, match="only 20"):
        await append(writer, 1)
    monkeypatch.undo()
    await append(writer, 1)
    await writer.close()
    assert await read(tmp_path, video_id) == [INIT, data(0), data(1)]


def _write_until_killed(root: str, video_id: str, fence: int) -> None:
    async def write() -> None:
        writer = await FragmentLog.create(Path(root), video_id, fence=fence)
        for index in range(10_000):
            await append(writer, index, data(index % 50) + str(index).encode())

    asyncio.run(write())


def _wait_for_entries(log: FragmentLog, count: int) -> None:
    while len(log.entries()) < count:
        time.sleep(0.001)


def _follow(root: str, video_id: str, connection: Any) -> None:
    connection.send([hashlib.sha256(part).hexdigest() for part in asyncio.run(read(Path(root), video_id))])


async def test_writers_killed_at_any_moment_and_a_follower_in_another_process(tmp_path: Path, video_id: str) -> None:
    receiving, sending = SPAWN.Pipe(duplex=False)
    reader = SPAWN.Process(target=_follow, args=(str(tmp_path), video_id, sending))
    reader.start()
    log = FragmentLog.open(tmp_path, video_id)
    for fence in (1, 2, 3):
        enough = len(log.entries()) + 5
        process = SPAWN.Process(target=_write_until_killed, args=(str(tmp_path), video_id, fence))
        process.start()
        await asyncio.to_thread(_wait_for_entries, log, enough)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        await asyncio.to_thread(process.join)
    last = await FragmentLog.create(tmp_path, video_id, fence=4)
    await last.close()
    seen = await asyncio.to_thread(receiving.recv)
    await asyncio.to_thread(reader.join)
    entries = log.entries()
    assert [entry.index for entry in entries] == list(range(len(entries)))
    assert len(entries) >= 15
    assert seen == [hashlib.sha256(INIT).hexdigest(), *(entry.sha256 for entry in entries)]


async def test_a_reader_holds_one_fragment_however_far_behind_it_is(tmp_path: Path, video_id: str) -> None:
    writer = await FragmentLog.create(tmp_path, video_id, fence=1)
    size = 1 << 20
    for index in range(12):
        await append(writer, index, bytes([index]) * size)
    await writer.close()
    tracemalloc.start()
    try:
        async for part in writer.log.follow():
            assert len(part) in (len(INIT), size)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * size


@pytest.mark.parametrize(
    "name", ["", "..", "video_", "../video_" + "0" * 32, "video_" + "0" * 32 + "/..", "video_" + "G" * 32, "video_1\n"]
)
async def test_only_video_ids_name_a_log(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    with pytest.raises(ValueError, match="not a video id"):
        FragmentLog.open(root, name)
    with pytest.raises(ValueError, match="not a video id"):
        await FragmentLog.create(root, name, fence=1)
    assert os.listdir(tmp_path) == []
